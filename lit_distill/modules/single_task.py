"""One target that holds both the rationale and the label."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from lit_distill.errors import UserError
from lit_distill.modules.base import DistillModule

Order = Literal["rationale_first", "label_first"]

_TASK = {"rationale_first": "rationale_label", "label_first": "label_rationale"}


class SingleTaskModule(DistillModule):
    """The paper's single-task variant (Eq. 5): one target of rationale and label, read apart at test time.

    Args:
        student: as in ``DistillModule``.
        order: what comes first in the target. With ``rationale_first`` the rationale is generated before each label;
            with ``label_first`` it only shapes training.
        input_prefix: prefix of the inputs; the paper's baselines have none.
        **kwargs: as in ``DistillModule``.
    """

    tasks: ClassVar[tuple[str, ...]] = ("rationale_label",)

    def __init__(
        self, student: str | Path, *, order: Order = "rationale_first", input_prefix: str = "", **kwargs: Any
    ) -> None:
        if order not in _TASK:
            raise UserError(f"order must be one of {', '.join(_TASK)}, got {order!r}")
        super().__init__(student, **kwargs)

    @classmethod
    def task_prefixes(cls, init_args: Mapping[str, Any]) -> dict[str, str]:
        """The one task, which depends on the order."""
        settings = cls.init_settings(init_args)
        return {_TASK.get(settings["order"], cls.tasks[0]): settings["input_prefix"]}
