"""Decides: which strategy, schedule or grouping is cheapest on a described cluster."""
