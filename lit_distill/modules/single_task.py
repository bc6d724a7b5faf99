"""One target that holds both the rationale and the label."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lit_distill.checks import check_choice
from lit_distill.modules.base import DistillModule
from lit_distill.tasks import LABEL_RATIONALE, RATIONALE_LABEL, Task

Order = Literal["rationale_first", "label_first"]

_TASK = {"rationale_first": RATIONALE_LABEL, "label_first": LABEL_RATIONALE}


class SingleTaskModule(DistillModule):
    """The paper's single-task baseline (Eq. 5): one target of rationale and label, parsed at test time.

    Args:
        student: as in ``DistillModule``.
        order: which part of the target comes first. With ``rationale_first`` the rationale is generated before each
            label; with ``label_first`` it only shapes training.
        input_prefix: prefix of the inputs; the paper's baselines have none.
        **kwargs: as in ``DistillModule``.
    """

    def __init__(
        self, student: str | Path, *, order: Order = "rationale_first", input_prefix: str = "", **kwargs: Any
    ) -> None:
        super().__init__(student, **kwargs)

    @classmethod
    def make_tasks(cls, init_args: Mapping[str, Any]) -> dict[str, Task]:
        """The one task."""
        settings = cls.init_settings(init_args)
        task = _TASK[check_choice("order", settings["order"], tuple(_TASK))]
        return {task.name: replace(task, prefix=settings["input_prefix"])}
