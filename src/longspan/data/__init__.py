"""Documents, their lengths, and how they are packed into batches."""
