"""Third-party models made parallel."""
