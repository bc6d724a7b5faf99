"""Standard finetuning and standard task distillation."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_distill.modules.base import DistillModule
from lit_distill.tasks import LABEL, Task


class StandardModule(DistillModule):
    """The baseline: labels only, the data's own (finetuning) or the teacher's (``data.label_source: teacher``).

    Args:
        student: as in ``DistillModule``.
        label_prefix: prefix of the inputs; the paper's baselines have none.
        **kwargs: as in ``DistillModule``.
    """

    def __init__(self, student: str | Path, *, label_prefix: str = "", **kwargs: Any) -> None:
        super().__init__(student, **kwargs)

    @classmethod
    def make_tasks(cls, init_args: Mapping[str, Any]) -> dict[str, Task]:
        """The label task."""
        return {"label": replace(LABEL, prefix=cls.init_settings(init_args)["label_prefix"])}
