"""Comparison of runs: reading them, statistics, figures and the report."""
