"""The three methods of the paper."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lit_distill.checks import check_choice, check_range
from lit_distill.modules.base import DistillModule
from lit_distill.tasks import LABEL, LABEL_RATIONALE, RATIONALE, RATIONALE_LABEL, Task


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
        self,
        student: str | Path,
        *,
        order: Literal["rationale_first", "label_first"] = "rationale_first",
        input_prefix: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(student, **kwargs)

    @classmethod
    def make_tasks(cls, init_args: Mapping[str, Any]) -> dict[str, Task]:
        """The one task."""
        settings = cls.init_settings(init_args)
        order = check_choice("order", settings["order"], ("rationale_first", "label_first"))
        task = RATIONALE_LABEL if order == "rationale_first" else LABEL_RATIONALE
        return {task.name: replace(task, prefix=settings["input_prefix"])}
