"""What is minimised beside the tasks' cross-entropy: losses of one micro-batch, as objects that YAML can list."""

from lit_distill.objectives.base import Objective, Step
from lit_distill.objectives.chunks import divergence

__all__ = ["Objective", "Step", "divergence"]
