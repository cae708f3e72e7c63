"""Models to plan, in a few lines each: what the papers measured."""
