"""A plant of coupled tanks, its log, and a model that foretells it."""
