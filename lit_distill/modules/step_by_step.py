"""Distilling step-by-step."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_distill.checks import check_range
from lit_distill.modules.base import DistillModule
from lit_distill.tasks import LABEL, RATIONALE, Task


class StepByStepModule(DistillModule):
    r"""Labels and rationales as two tasks of one student, told apart by a prefix (Eq. 1 of the paper).

    .. math:: L = L_\text{label} + \lambda \, L_\text{rationale}

    with each L the mean over the target tokens of its task. At inference only the label task is used.

    Args:
        student: as in ``DistillModule``.
        rationale_weight: the paper's lambda, at least 0; the reference code's alpha is 1 / (1 + lambda).
        label_prefix: prefix of the label task's inputs.
        rationale_prefix: prefix of the rationale task's inputs.
        **kwargs: as in ``DistillModule``.
    """

    def __init__(
        self,
        student: str | Path,
        *,
        rationale_weight: float = 1.0,
        label_prefix: str = "predict: ",
        rationale_prefix: str = "explain: ",
        **kwargs: Any,
    ) -> None:
        super().__init__(student, **kwargs)

    @classmethod
    def make_tasks(cls, init_args: Mapping[str, Any]) -> dict[str, Task]:
        """The label and rationale tasks."""
        settings = cls.init_settings(init_args)
        check_range("rationale_weight", weight := settings["rationale_weight"], at_least=0)
        return {
            "label": replace(LABEL, prefix=settings["label_prefix"]),
            "rationale": replace(RATIONALE, prefix=settings["rationale_prefix"], weight=weight),
        }
