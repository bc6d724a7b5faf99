"""Distillation methods as Lightning modules."""

from lit_distill.modules.base import DistillModule
from lit_distill.modules.methods import SingleTaskModule, StandardModule, StepByStepModule

__all__ = ["DistillModule", "SingleTaskModule", "StandardModule", "StepByStepModule"]
