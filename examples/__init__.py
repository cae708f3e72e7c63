"""Examples: models made parallel by a few lines."""
