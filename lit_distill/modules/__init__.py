"""Distillation methods as Lightning modules."""

from lit_distill.modules.base import DistillModule
from lit_distill.modules.methods import SingleTaskModule, StandardModule, StepByStepModule
from lit_distill.modules.span_corruption import SpanCorruptionModule

__all__ = ["DistillModule", "SingleTaskModule", "SpanCorruptionModule", "StandardModule", "StepByStepModule"]
