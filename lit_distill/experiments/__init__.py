"""Grids of runs: what varies, a folder a cell, and who starts the cells."""
