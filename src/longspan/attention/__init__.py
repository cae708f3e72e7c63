"""Exact attention over a sequence that is sharded on many devices."""
