"""Grids of runs: cells, their folders, and launchers."""
