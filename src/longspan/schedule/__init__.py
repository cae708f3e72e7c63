"""The score: what is computed and what is sent, as plain arithmetic on sizes."""
