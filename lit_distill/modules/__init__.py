"""Distillation methods as Lightning modules."""

from lit_distill.modules.base import DistillModule
from lit_distill.modules.single_task import SingleTaskModule
from lit_distill.modules.standard import StandardModule
from lit_distill.modules.step_by_step import StepByStepModule

__all__ = ["DistillModule", "SingleTaskModule", "StandardModule", "StepByStepModule"]
