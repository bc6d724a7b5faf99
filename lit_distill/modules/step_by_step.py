"""Distilling step-by-step."""

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lit_distill.checks import check_range
from lit_distill.modules.base import DistillModule


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

    tasks: ClassVar[tuple[str, ...]] = ("label", "rationale")

    def __init__(
        self,
        student: str | Path,
        *,
        rationale_weight: float = 1.0,
        label_prefix: str = "predict: ",
        rationale_prefix: str = "explain: ",
        **kwargs: Any,
    ) -> None:
        check_range("rationale_weight", rationale_weight, at_least=0)
        super().__init__(student, **kwargs)
        self.rationale_weight = rationale_weight

    def total_loss(self, terms: dict[str, Tensor]) -> Tensor:
        """The paper's Eq. 1; terms that a subclass adds count once."""
        others = [term for name, term in terms.items() if name not in ("label", "rationale")]
        return sum(others, terms["label"] + self.rationale_weight * terms["rationale"])
