"""What decides: layer graphs, strategies, plans; prices and searches, runs nothing."""
