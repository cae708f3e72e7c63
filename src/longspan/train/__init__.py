"""Training: where deciding and running meet."""
