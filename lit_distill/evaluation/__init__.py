"""Evaluation of a student: its answers, the metrics and the summary of a split."""
