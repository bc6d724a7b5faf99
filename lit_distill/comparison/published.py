"""Results of Hsieh et al. (2023), to compare runs with."""

from typing import Final

from lit_distill.comparison.runs import OURS, Run
from lit_distill.files import flatten

SOURCE: Final = "Hsieh et al. (2023)"
"""https://arxiv.org/abs/2305.02301, T5-v1.1-base trained on all of the data with human labels, means of 4 seeds."""

STUDENT: Final = "t5-v1_1-base"  # the only one whose numbers were printed, not just plotted
_PARAMETERS: Final = 247_577_856
TRAIN_ROWS: Final = {"esnli": 549_367, "anli1": 16_946, "cqa": 8_766, "svamp": 720}
TEST_ROWS: Final = {"esnli": 9824, "anli1": 1000, "cqa": 1221, "svamp": 200}

TEACHER: Final = {"esnli": 0.7299, "anli1": 0.656, "cqa": 0.7723, "svamp": 0.74}
"""Test accuracy of PaLM's labels, computed from the released outputs."""

ROWS: Final[dict[str, dict[str, float]]] = {
    "standard finetuning": {"esnli": 0.8838, "anli1": 0.4358, "cqa": 0.6219, "svamp": 0.6263},
    "single task: rationale and label": {"esnli": 0.8888, "anli1": 0.4350, "cqa": 0.6137, "svamp": 0.6300},
    # cannot be compared: these rationales were not released
    "step-by-step, GPT-NeoX 20B rationales": {"esnli": 0.8912, "anli1": 0.4815, "cqa": 0.6325, "svamp": 0.6300},
    "step-by-step, PaLM 540B rationales": {"esnli": 0.8951, "anli1": 0.4958, "cqa": 0.6329, "svamp": 0.6550},
}
"""Row of the paper's table -> dataset -> accuracy."""

_ROW_OF_METHOD: Final = {
    "Standard": "standard finetuning",
    "SingleTask": "single task: rationale and label",
    "StepByStep": "step-by-step, PaLM 540B rationales",
}

_AS_PUBLISHED: Final = {
    "data.init_args.rationales": (None,),
    "data.init_args.rationale_filter": (None, "none"),
    "model.init_args.rationale_weight": (None, 1),
    "model.init_args.order": (None, "rationale_first"),
    "model.init_args.from_scratch": (None, False),
}
"""Config key -> the values that match the published experiment."""

_ADDED: Final = tuple(f"model.init_args.{name}" for name in ("tasks", "objectives", "adapter"))
"""Arguments that make a method differ from the published one."""


def published_row(run: Run) -> str | None:
    """The row of the paper's table with a run's setting; ``None`` if there is none, or the record says too little."""
    record, config = run.record, flatten(run.record.config)
    dataset = record.dataset
    as_published = (
        dataset in TEST_ROWS
        and run.module_path == OURS
        and run.student_path in (STUDENT, f"google/{STUDENT}")
        and record.label_source == "gold"
        and record.train_fraction == 1
        and record.rationales in (None, "own")
        and record.test_rows == TEST_ROWS[dataset]
        # single task leaves out rows without a rationale: 12 of SVAMP's
        and abs(record.train_rows / TRAIN_ROWS[dataset] - 1) <= 0.02
        and abs(record.parameters / _PARAMETERS - 1) <= 0.05
        and all(value in _AS_PUBLISHED.get(key, (value,)) for key, value in config.items())
        and not any(value for key, value in config.items() if key.startswith(_ADDED))
    )
    return _ROW_OF_METHOD.get(record.method) if as_published else None
