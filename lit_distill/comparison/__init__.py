"""Comparing runs: what was found, what may be said of it, and the report that says it."""
