"""Losses in addition to the tasks' cross-entropy, which YAML can list."""

from lit_distill.objectives.base import Objective, Step
from lit_distill.objectives.chunks import divergence

__all__ = ["Objective", "Step", "divergence"]
