"""Tests of tasks and rows."""
