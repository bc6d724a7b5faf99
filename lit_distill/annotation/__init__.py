"""Annotation of datasets by teachers: prompts, questions, answers and their columns."""
