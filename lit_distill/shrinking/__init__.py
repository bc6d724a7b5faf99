"""Smaller students cut out of larger ones: fewer layers, units, heads, channels and pieces of the vocabulary."""
