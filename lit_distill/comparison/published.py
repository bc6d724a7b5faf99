"""What Hsieh et al. (2023) published, to stand beside runs of the same kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

SOURCE: Final = "Hsieh et al. (2023)"
"""https://arxiv.org/abs/2305.02301, T5-v1.1-base trained on all of the data with human labels, means of 4 seeds."""

TRAIN_ROWS: Final = {"esnli": 549_367, "anli1": 16_946, "cqa": 8_766, "svamp": 720}
"""That were trained on."""

_PARAMETERS: Final = 247_577_856
"""Of the student."""

STUDENT: Final = "t5-v1_1-base"
"""The only student of which numbers were published in figures one can read."""

TEST_ROWS: Final = {"esnli": 9824, "anli1": 1000, "cqa": 1221, "svamp": 200}
"""Of the released test sets."""

TEACHER: Final = {"esnli": 0.7299, "anli1": 0.656, "cqa": 0.7723, "svamp": 0.74}
"""Accuracies on test of PaLM's labels, computed from the released outputs."""

GPT_NEOX: Final = "step-by-step, GPT-NeoX 20B rationales"
"""The one row that no run stands beside: those rationales were not released."""

ROWS: Final[dict[str, dict[str, float]]] = {
    "standard finetuning": {"esnli": 0.8838, "anli1": 0.4358, "cqa": 0.6219, "svamp": 0.6263},
    "single task: rationale and label": {"esnli": 0.8888, "anli1": 0.4350, "cqa": 0.6137, "svamp": 0.6300},
    GPT_NEOX: {"esnli": 0.8912, "anli1": 0.4815, "cqa": 0.6325, "svamp": 0.6300},
    "step-by-step, PaLM 540B rationales": {"esnli": 0.8951, "anli1": 0.4958, "cqa": 0.6329, "svamp": 0.6550},
}
"""Row -> dataset -> accuracy."""

_ROW_OF: Final = dict(
    zip(("Standard", "SingleTask", "StepByStep"), (name for name in ROWS if name != GPT_NEOX), strict=True)
)


@dataclass(frozen=True)
class Published:
    """A published accuracy."""

    row: str
    """What it was published as."""
    accuracy: float
    """In 0..1."""


def published(
    dataset: str,
    method: str,
    student: str,
    parameters: int,
    train_rows: int,
    label_source: str,
    train_fraction: float,
    rationales: str | None,
    test_rows: int,
    config: Mapping[str, Any],
) -> Published | None:
    """The published accuracy of a run's setting; ``None`` where there is none.

    Args:
        dataset: as in a record.
        method: as in a record.
        student: as in the config, its owner or path included.
        parameters: as in a record; what is not known is no match.
        train_rows: as in a record.
        label_source: as in a record.
        train_fraction: as in a record.
        rationales: as in a record.
        test_rows: as in a record.
        config: the run's, with its keys joined by dots.
    """
    row = _ROW_OF.get(method)
    if row is None or dataset not in TEST_ROWS or student not in (STUDENT, f"google/{STUDENT}"):
        return None
    as_published = (
        label_source == "gold"
        and train_fraction == 1
        and rationales in (None, "own")
        and test_rows == TEST_ROWS[dataset]
        and _near(train_rows, TRAIN_ROWS[dataset], 0.01)
        and _near(parameters, _PARAMETERS, 0.05)
        # rationales of another teacher, a part of them, another mixture, another order, no pretraining
        and config.get("data.init_args.rationales") is None
        and config.get("data.init_args.rationale_filter") in (None, "none")
        and config.get("model.init_args.rationale_weight") in (None, 1)
        and config.get("model.init_args.order") in (None, "rationale_first")
        and not config.get("model.init_args.from_scratch")
    )
    return Published(row, ROWS[row][dataset]) if as_published else None


def _near(number: int, expected: int, part: float) -> bool:
    return abs(number - expected) <= part * expected
