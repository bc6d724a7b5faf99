"""Word problems whose answer is an equation (SVAMP)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lit_distill.data.base import RationaleDataModule
from lit_distill.data.sources import text_of
from lit_distill.equations import evaluate
from lit_distill.evaluation.answers import Split
from lit_distill.evaluation.metrics import MetricName
from lit_distill.tasks import Row


class SVAMPDataModule(RationaleDataModule):
    """SVAMP: the label is an equation, compared by value; val is a tenth of train."""

    name = "svamp"
    hub_name = "ChilleD/SVAMP"
    prompt: ClassVar[str] = "svamp"
    splits: Mapping[Split, str] = {"train": "train", "test": "test"}
    released_rows: Mapping[Split, int] = {"train": 800, "test": 200}
    metric: MetricName = "equation"

    def read_row(self, row: dict[str, Any]) -> Row:
        """Body and question; the label is the equation."""
        return Row(id="", input=text_of(row, "input"), label=text_of(row, "label"))

    def parse_teacher(self, text: str) -> tuple[str, str] | None:
        """``... The answer is (84 / 2).``: from the first parenthesis after the mark to the last.

        Both parentheses belong to the equation, as in ``(19 - 6) + (18 - 15)``.
        """
        rationale, _, answer = text.partition("Q:")[0].partition("The answer is")
        equation = answer[answer.find("(") : answer.rfind(")") + 1] if "(" in answer else ""
        rationale = rationale.strip()
        return (rationale, equation) if rationale and equation[1:-1].strip() else None

    def teacher_agrees(self, teacher_label: str, label: str) -> bool:
        """By value; several equations, as in ``(29/2) and (30/2)``, are worth what Python's ``and`` gives.

        So the reference has it. A student is not excused: its metric reads one equation.
        """
        for several in (teacher_label, teacher_label[1:-1]):  # as they are, or in parentheses together
            equations = several.split(" and ")
            values = [evaluate(equation) for equation in equations]
            if len(equations) > 1 and None not in values:
                # the first that is zero, else the last
                return super().teacher_agrees(equations[values.index(0) if 0 in values else -1], label)
        return super().teacher_agrees(teacher_label, label)
