"""Decides: which parallelism, on which ranks, for which part of the work."""
