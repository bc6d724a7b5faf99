"""Standard finetuning and standard task distillation."""

from pathlib import Path
from typing import Any, ClassVar

from lit_distill.modules.base import DistillModule


class StandardModule(DistillModule):
    """The baseline: labels only, the data's own (finetuning) or the teacher's (``data.label_source: teacher``).

    Args:
        student: as in ``DistillModule``.
        label_prefix: prefix of the inputs; the paper's baselines have none.
        **kwargs: as in ``DistillModule``.
    """

    tasks: ClassVar[tuple[str, ...]] = ("label",)

    def __init__(self, student: str | Path, *, label_prefix: str = "", **kwargs: Any) -> None:
        super().__init__(student, **kwargs)
