"""What each kind of source gives, row by row, against hashes written down once: reading may be rebuilt, not changed."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from lit_distill.data import (
    ANLIDataModule,
    CQADataModule,
    ESNLIDataModule,
    JSONLDataModule,
    RationaleDataModule,
    SVAMPDataModule,
    ToyDataModule,
)
from lit_distill.evaluation.answers import Split
from tests.data.conftest import WriteLines, character_tokenizer

TASKS = ("label", "rationale", "rationale_label", "label_rationale")
PREFIXES = {"label": "predict: ", "rationale": "explain: ", "rationale_label": "both: ", "label_rationale": "other: "}
PREFIXED = {task: {"prefix": prefix} for task, prefix in PREFIXES.items()}
TICKETS = Path(__file__).parents[2] / "configs" / "tickets"


def digest(values: Any) -> str:
    return sha256(json.dumps(values).encode()).hexdigest()[:16]


def told(counts: Mapping[str, int], *, truncated: bool = False) -> str:
    """The counts that are not 0, or with ``truncated`` all of what is cut."""
    shown = {name: count for name, count in counts.items() if ("truncated" in name if truncated else count)}
    return ", ".join(f"{count} {name}" for name, count in shown.items())


def texts(module: RationaleDataModule, split: Split) -> tuple[str, str]:
    """The rows that are used as a hash of all that is said of them, and their counts."""
    used = module.used_rows(split)
    rows = [
        [row.id, row.input, row.label, row.choices, row.rationale, row.teacher_label, gold]
        for row, gold in zip(used.rows, used.gold, strict=True)
    ]
    return digest(rows), told(module.counts[split])


def tokens(module: RationaleDataModule, split: Split) -> str:
    """The token ids of each task."""
    rows = module._tokenized[split]
    columns = [f"{task}.{part}" for task in TASKS for part in ("input_ids", "labels")]
    found = [[row[name] for name in columns] for row in map(rows.__getitem__, range(len(rows)))]
    # one source a row, and one target or none
    for row in found:
        row[::2] = [source for (source,) in row[::2]]
        row[1::2] = [targets[0] if targets else None for targets in row[1::2]]
    return digest(found)


DATASETS: dict[str, tuple[type[RationaleDataModule], dict[str, Any]]] = {
    "cqa": (CQADataModule, {}),
    "cqa-filtered": (CQADataModule, {"rationale_filter": "label_agrees", "train_fraction": 0.25, "seed": 3}),
    "cqa-teacher": (CQADataModule, {"label_source": "teacher", "rationale_pairing": "shuffled"}),
    "svamp": (SVAMPDataModule, {}),
    "svamp-teacher": (SVAMPDataModule, {"label_source": "teacher", "rationale_filter": "label_agrees"}),
    "esnli": (ESNLIDataModule, {"train_fraction": 0.5}),
    "anli1": (ANLIDataModule, {}),
    "toy": (ToyDataModule, {"train_size": 50, "val_size": 20, "test_size": 20}),
}
RELEASED: dict[str, dict[str, Any]] = {
    "cqa": {
        "train": (
            "060138660eca63c7",
            "8766 rows, 8763 parsed, 3 unparsed, 6481 teacher_correct, 404 outside_label_set, 8766 used",
        ),
        "val": ("1bffee7f94a10036", "975 rows, 975 parsed, 753 teacher_correct, 41 outside_label_set, 975 used"),
        "test": ("04d9c5f40127a50e", "1221 rows, 1221 parsed, 943 teacher_correct, 46 outside_label_set, 1221 used"),
    },
    "svamp": {
        "train": ("a3baba314bdf8df0", "720 rows, 708 parsed, 12 unparsed, 531 teacher_correct, 720 used"),
        "val": ("a1796d5b1277491e", "80 rows, 79 parsed, 1 unparsed, 57 teacher_correct, 80 used"),
        "test": ("8b145a58c2b885ff", "200 rows, 198 parsed, 2 unparsed, 148 teacher_correct, 200 used"),
    },
    "esnli": {
        "train": (
            "dc12abf6488076a5",
            "10000 rows, 9830 parsed, 170 unparsed, 6986 teacher_correct, 53 outside_label_set,"
            " 5000 left_out_by_fraction, 5000 used",
        ),
        "val": ("c5e80a37a6cef395", "9842 rows, 9838 parsed, 4 unparsed, 7201 teacher_correct, 9842 used"),
        "test": ("ba93d33e9759546b", "9824 rows, 9824 parsed, 7171 teacher_correct, 1 outside_label_set, 9824 used"),
    },
    "anli1": {
        "val": ("7fc2e467a7a3e07d", "1000 rows, 991 parsed, 9 unparsed, 668 teacher_correct, 1000 used"),
        "test": ("0e056de253a6bcbf", "1000 rows, 990 parsed, 10 unparsed, 656 teacher_correct, 1000 used"),
    },
    "toy": {
        "train": ("806d58bc343fd61b", "50 rows, 50 parsed, 50 teacher_correct, 50 used"),
        "val": ("ee953a069d36b7f7", "20 rows, 20 parsed, 20 teacher_correct, 20 used"),
        "test": ("c8facae8b1e37cdf", "20 rows, 20 parsed, 20 teacher_correct, 20 used"),
    },
}
RELEASED_TRAIN: dict[str, Any] = {
    "cqa-filtered": (
        "594a7d01eda53fa3",
        "8766 rows, 8763 parsed, 3 unparsed, 6481 teacher_correct, 404 outside_label_set,"
        " 6574 left_out_by_fraction, 557 rationale_filtered, 2192 used",
    ),
    "cqa-teacher": (
        "9519213aaf39e72d",
        "8766 rows, 8763 parsed, 3 unparsed, 6481 teacher_correct, 404 outside_label_set,"
        " 3 dropped_without_teacher_label, 8763 used, 8763 rationale_shuffled",
    ),
    "svamp-teacher": (
        "2bae6f2ee19a43cb",
        "720 rows, 708 parsed, 12 unparsed, 531 teacher_correct, 177 rationale_filtered,"
        " 12 dropped_without_teacher_label, 708 used",
    ),
}
RELEASED |= {name: RELEASED[name.partition("-")[0]] | {"train": train} for name, train in RELEASED_TRAIN.items()}


@pytest.mark.parametrize("name", DATASETS)
def test_released_rows(name: str, shared_data: Path) -> None:
    dataset, arguments = DATASETS[name]
    module = dataset(data_dir=shared_data, allow_extra_outputs=True, tasks=PREFIXED, **arguments)
    found = {split: texts(module, split) for split in ("train", "val", "test") if module.split_rows(split) is not None}
    assert found == RELEASED[name]


TOKENS: dict[str, dict[str, Any]] = {
    "svamp": {
        "test": ("af61a6b65ec19214", "56 truncated_inputs, 262 truncated_targets, 0 truncated_labels"),
        "train": ("e5cfe6cf2671f594", "192 truncated_inputs, 914 truncated_targets, 0 truncated_labels"),
        "val": ("53efdaf3fb76a468", "20 truncated_inputs, 95 truncated_targets, 0 truncated_labels"),
    },
    "anli1": {
        "test": ("d1ea254c2eb99f6d", "4000 truncated_inputs, 308 truncated_targets, 0 truncated_labels"),
    },
}
TOKENS_TRAIN: dict[str, Any] = {
    "svamp-teacher": ("e27c0962f9c69640", "184 truncated_inputs, 436 truncated_targets, 0 truncated_labels"),
}
TOKENS |= {name: TOKENS[name.partition("-")[0]] | {"train": train} for name, train in TOKENS_TRAIN.items()}


@pytest.mark.parametrize("name", TOKENS)
def test_released_tokens(name: str, shared_data: Path, shared_tokenizer: Path) -> None:
    dataset, arguments = DATASETS[name]
    # short enough that rationales and inputs are cut
    module = dataset(
        data_dir=shared_data,
        tokenizer=shared_tokenizer,
        tasks=PREFIXED,
        max_source_length=60,
        max_target_length=48,
        **arguments,
    )
    module.setup("test")
    if module.split_rows("train") is not None:
        module.setup("fit")
    cut = {split: told(counts, truncated=True) for split, counts in module.counts.items()}
    assert {split: (tokens(module, split), cut[split]) for split in module._tokenized} == TOKENS[name]


OWN: dict[str, dict[str, Any]] = {
    "tickets": {
        "train": (
            "adcd34fb549b5cad",
            "198 rows, 147 parsed, 51 no_output, 198 used, 424 truncated_targets",
            "3c8af11c508b7f22",
        ),
        "val": (
            "ca536590bfbf5d5d",
            "22 rows, 15 parsed, 7 no_output, 22 used, 44 truncated_targets",
            "b149942d912aab15",
        ),
        "test": ("cd1d2b4c61b30a05", "80 rows, 80 no_output, 80 used", "cacf52595e90e59a"),
    },
    "jsonl": {
        "train": (
            "2b0494e53f30683f",
            "36 rows, 35 parsed, 1 no_output, 15 teacher_correct, 36 used",
            "dec7d3345aa7c0c5",
        ),
        "val": ("a155c13f85c004b9", "4 rows, 3 parsed, 1 no_output, 4 used", "2538ba8d919d4ac8"),
        "test": ("7e8e156a429449e8", "1 rows, 1 no_output, 1 used", "b5b80d17b68598a5"),
    },
    "annotated": {
        "train": (
            "1855ab7c5f85ba6f",
            "36 rows, 21 parsed, 3 unparsed, 12 no_output, 17 teacher_correct, 36 used",
            "f24ca1709bbac460",
        ),
        "val": ("b2a652ea3a826a04", "4 rows, 2 parsed, 2 no_output, 2 teacher_correct, 4 used", "cbefaef0d7c346cd"),
        "test": ("7e8e156a429449e8", "1 rows, 1 no_output, 1 used", "b5b80d17b68598a5"),
    },
}
OWN_TRAIN: dict[str, Any] = {
    "annotated-condition": (
        "fa186f8cfffd471d",
        "36 rows, 21 parsed, 3 unparsed, 12 no_output, 17 teacher_correct, 11 rationale_filtered, 36 used",
        "ee2970f185d42dc0",
    ),
    "annotated-votes": (
        "c11b01ad835077fa",
        "36 rows, 21 parsed, 3 unparsed, 12 no_output, 17 teacher_correct, 8 rationale_filtered,"
        " 13 dropped_without_teacher_label, 23 used",
        "0dcd52cefd45d252",
    ),
    "annotated-agrees": (
        "3f89240727518922",
        "36 rows, 21 parsed, 3 unparsed, 12 no_output, 17 teacher_correct, 1 rationale_filtered, 36 used,"
        " 22 rationale_shuffled",
        "a12113189e7f7d18",
    ),
}
OWN |= {name: OWN[name.partition("-")[0]] | {"train": train} for name, train in OWN_TRAIN.items()}


def own(name: str, folder: Path, write_lines: WriteLines) -> RationaleDataModule:
    """A user's own rows, from files that are made here."""
    common: dict[str, Any] = {
        "tokenizer": character_tokenizer(),
        "tasks": PREFIXED,
        "max_target_length": 40,
    }
    if name == "tickets":
        return JSONLDataModule(
            train=TICKETS / "train.csv",
            test=TICKETS / "test.csv",
            input_template="{subject}\n{message}",
            label_column="team",
            label_set=["account", "billing", "repairs", "shipping"],
            rationale_column="why",
            **common,
        )
    rows: list[dict[str, Any]] = []
    for i in range(40):
        row: dict[str, Any] = {"id": f"r{i}", "input": f"question {i} ?", "label": "yes" if i % 3 else "no"}
        if i % 4:
            row["rationale"] = f" because {i} "
        if i % 5:
            row["teacher_label"] = "yes" if i % 2 else "no"
        if i % 2:
            row["choices"] = ["yes", "no"]
        rows.append(row)
    train = write_lines(folder / "train.jsonl", rows)
    test = write_lines(folder / "test.jsonl", [{"id": "x", "input": "in x", "label": "yes"}])
    if name == "jsonl":
        return JSONLDataModule(train=train, test=test, **common)
    said = []
    for i in range(36):
        for sample in range(i % 4):
            label = "yes" if (i + sample) % 3 else "no"
            teacher = "A" if (i + sample) % 5 else "B"
            line: dict[str, Any] = {"id": f"r{i}", "split": "train", "sample": sample, "teacher": teacher}
            if (i + sample) % 7 == 0:
                line |= {"text": "gibberish", "parsed": False}
            elif (i + sample) % 11 == 0:
                line |= {"error": "timed out"}
            else:
                line |= {"text": "t", "rationale": f"sample {sample} of {i}", "label": label, "parsed": True}
                line |= {"length": 4 + sample, "quality": sample / 4}
            said.append(line)
    write_lines(folder / "said" / "rationales.jsonl", said)
    arguments: dict[str, dict[str, Any]] = {
        "annotated": {},
        "annotated-condition": {"rationale_filter": "quality >= 0.25 and teacher == A"},
        "annotated-votes": {"rationale_filter": "in_majority and vote_share >= 0.6", "label_source": "teacher"},
        "annotated-agrees": {"rationale_filter": "label_agrees", "rationale_pairing": "shuffled", "seed": 4},
    }
    return JSONLDataModule(train=train, test=test, rationales=folder / "said", **common | arguments[name])


@pytest.mark.parametrize("name", OWN)
def test_own_rows(name: str, tmp_path: Path, write_lines: WriteLines) -> None:
    module = own(name, tmp_path, write_lines)
    module.setup("fit")
    module.setup("test")
    found = {split: (*texts(module, split), tokens(module, split)) for split in module._tokenized}
    assert found == OWN[name]
