"""Tests of a corpus to read."""
