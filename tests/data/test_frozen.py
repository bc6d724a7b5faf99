"""What each kind of source gives, row by row, against hashes written down once: reading may be rebuilt, not changed."""

import json
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


def texts(module: RationaleDataModule, split: Split) -> tuple[str, dict[str, int]]:
    """The rows that are used as a hash of all that is said of them, and their counts."""
    used = module.used_rows(split)
    rows = [
        [row.id, row.input, row.label, row.choices, row.rationale, row.teacher_label, gold]
        for row, gold in zip(used.rows, used.gold, strict=True)
    ]
    return digest(rows), {name: count for name, count in module.counts[split].items() if count}


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
            {
                "rows": 8766,
                "parsed": 8763,
                "unparsed": 3,
                "teacher_correct": 6481,
                "outside_label_set": 404,
                "used": 8766,
            },
        ),
        "val": (
            "1bffee7f94a10036",
            {"rows": 975, "parsed": 975, "teacher_correct": 753, "outside_label_set": 41, "used": 975},
        ),
        "test": (
            "04d9c5f40127a50e",
            {"rows": 1221, "parsed": 1221, "teacher_correct": 943, "outside_label_set": 46, "used": 1221},
        ),
    },
    "cqa-filtered": {
        "train": (
            "594a7d01eda53fa3",
            {
                "rows": 8766,
                "parsed": 8763,
                "unparsed": 3,
                "teacher_correct": 6481,
                "outside_label_set": 404,
                "left_out_by_fraction": 6574,
                "rationale_filtered": 557,
                "used": 2192,
            },
        ),
        "val": (
            "1bffee7f94a10036",
            {"rows": 975, "parsed": 975, "teacher_correct": 753, "outside_label_set": 41, "used": 975},
        ),
        "test": (
            "04d9c5f40127a50e",
            {"rows": 1221, "parsed": 1221, "teacher_correct": 943, "outside_label_set": 46, "used": 1221},
        ),
    },
    "cqa-teacher": {
        "train": (
            "9519213aaf39e72d",
            {
                "rows": 8766,
                "parsed": 8763,
                "unparsed": 3,
                "teacher_correct": 6481,
                "outside_label_set": 404,
                "dropped_without_teacher_label": 3,
                "used": 8763,
                "rationale_shuffled": 8763,
            },
        ),
        "val": (
            "1bffee7f94a10036",
            {"rows": 975, "parsed": 975, "teacher_correct": 753, "outside_label_set": 41, "used": 975},
        ),
        "test": (
            "04d9c5f40127a50e",
            {"rows": 1221, "parsed": 1221, "teacher_correct": 943, "outside_label_set": 46, "used": 1221},
        ),
    },
    "svamp": {
        "train": (
            "a3baba314bdf8df0",
            {"rows": 720, "parsed": 708, "unparsed": 12, "teacher_correct": 531, "used": 720},
        ),
        "val": ("a1796d5b1277491e", {"rows": 80, "parsed": 79, "unparsed": 1, "teacher_correct": 57, "used": 80}),
        "test": ("8b145a58c2b885ff", {"rows": 200, "parsed": 198, "unparsed": 2, "teacher_correct": 148, "used": 200}),
    },
    "svamp-teacher": {
        "train": (
            "2bae6f2ee19a43cb",
            {
                "rows": 720,
                "parsed": 708,
                "unparsed": 12,
                "teacher_correct": 531,
                "rationale_filtered": 177,
                "dropped_without_teacher_label": 12,
                "used": 708,
            },
        ),
        "val": ("a1796d5b1277491e", {"rows": 80, "parsed": 79, "unparsed": 1, "teacher_correct": 57, "used": 80}),
        "test": ("8b145a58c2b885ff", {"rows": 200, "parsed": 198, "unparsed": 2, "teacher_correct": 148, "used": 200}),
    },
    "esnli": {
        "train": (
            "dc12abf6488076a5",
            {
                "rows": 10000,
                "parsed": 9830,
                "unparsed": 170,
                "teacher_correct": 6986,
                "outside_label_set": 53,
                "left_out_by_fraction": 5000,
                "used": 5000,
            },
        ),
        "val": (
            "c5e80a37a6cef395",
            {"rows": 9842, "parsed": 9838, "unparsed": 4, "teacher_correct": 7201, "used": 9842},
        ),
        "test": (
            "ba93d33e9759546b",
            {"rows": 9824, "parsed": 9824, "teacher_correct": 7171, "outside_label_set": 1, "used": 9824},
        ),
    },
    "anli1": {
        "val": ("7fc2e467a7a3e07d", {"rows": 1000, "parsed": 991, "unparsed": 9, "teacher_correct": 668, "used": 1000}),
        "test": (
            "0e056de253a6bcbf",
            {"rows": 1000, "parsed": 990, "unparsed": 10, "teacher_correct": 656, "used": 1000},
        ),
    },
    "toy": {
        "train": ("806d58bc343fd61b", {"rows": 50, "parsed": 50, "teacher_correct": 50, "used": 50}),
        "val": ("ee953a069d36b7f7", {"rows": 20, "parsed": 20, "teacher_correct": 20, "used": 20}),
        "test": ("c8facae8b1e37cdf", {"rows": 20, "parsed": 20, "teacher_correct": 20, "used": 20}),
    },
}


@pytest.mark.parametrize("name", DATASETS)
def test_released_rows(name: str, shared_data: Path) -> None:
    dataset, arguments = DATASETS[name]
    module = dataset(data_dir=shared_data, allow_extra_outputs=True, tasks=PREFIXED, **arguments)
    found = {split: texts(module, split) for split in ("train", "val", "test") if module.split_rows(split) is not None}
    assert found == RELEASED[name]


TOKENS: dict[str, dict[str, Any]] = {
    "svamp": {
        "test": ("af61a6b65ec19214", {"truncated_inputs": 56, "truncated_targets": 262, "truncated_labels": 0}),
        "train": ("e5cfe6cf2671f594", {"truncated_inputs": 192, "truncated_targets": 914, "truncated_labels": 0}),
        "val": ("53efdaf3fb76a468", {"truncated_inputs": 20, "truncated_targets": 95, "truncated_labels": 0}),
    },
    "svamp-teacher": {
        "test": ("af61a6b65ec19214", {"truncated_inputs": 56, "truncated_targets": 262, "truncated_labels": 0}),
        "train": ("e27c0962f9c69640", {"truncated_inputs": 184, "truncated_targets": 436, "truncated_labels": 0}),
        "val": ("53efdaf3fb76a468", {"truncated_inputs": 20, "truncated_targets": 95, "truncated_labels": 0}),
    },
    "anli1": {
        "test": ("d1ea254c2eb99f6d", {"truncated_inputs": 4000, "truncated_targets": 308, "truncated_labels": 0})
    },
}


@pytest.mark.parametrize("name", ["svamp", "svamp-teacher", "anli1"])
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
    cut = {
        split: {part: n for part, n in counts.items() if "truncated" in part} for split, counts in module.counts.items()
    }
    assert {split: (tokens(module, split), cut[split]) for split in module._tokenized} == TOKENS[name]


OWN: dict[str, dict[str, Any]] = {
    "tickets": {
        "train": (
            "adcd34fb549b5cad",
            {"rows": 198, "parsed": 147, "no_output": 51, "used": 198, "truncated_targets": 424},
            "3c8af11c508b7f22",
        ),
        "val": (
            "ca536590bfbf5d5d",
            {"rows": 22, "parsed": 15, "no_output": 7, "used": 22, "truncated_targets": 44},
            "b149942d912aab15",
        ),
        "test": ("cd1d2b4c61b30a05", {"rows": 80, "no_output": 80, "used": 80}, "cacf52595e90e59a"),
    },
    "jsonl": {
        "train": (
            "2b0494e53f30683f",
            {"rows": 36, "parsed": 35, "no_output": 1, "teacher_correct": 15, "used": 36},
            "dec7d3345aa7c0c5",
        ),
        "val": ("a155c13f85c004b9", {"rows": 4, "parsed": 3, "no_output": 1, "used": 4}, "2538ba8d919d4ac8"),
        "test": ("7e8e156a429449e8", {"rows": 1, "no_output": 1, "used": 1}, "b5b80d17b68598a5"),
    },
    "annotated": {
        "train": (
            "1855ab7c5f85ba6f",
            {"rows": 36, "parsed": 21, "unparsed": 3, "no_output": 12, "teacher_correct": 17, "used": 36},
            "f24ca1709bbac460",
        ),
        "val": (
            "b2a652ea3a826a04",
            {"rows": 4, "parsed": 2, "no_output": 2, "teacher_correct": 2, "used": 4},
            "cbefaef0d7c346cd",
        ),
        "test": ("7e8e156a429449e8", {"rows": 1, "no_output": 1, "used": 1}, "b5b80d17b68598a5"),
    },
    "annotated-condition": {
        "train": (
            "fa186f8cfffd471d",
            {
                "rows": 36,
                "parsed": 21,
                "unparsed": 3,
                "no_output": 12,
                "teacher_correct": 17,
                "rationale_filtered": 11,
                "used": 36,
            },
            "ee2970f185d42dc0",
        ),
        "val": (
            "b2a652ea3a826a04",
            {"rows": 4, "parsed": 2, "no_output": 2, "teacher_correct": 2, "used": 4},
            "cbefaef0d7c346cd",
        ),
        "test": ("7e8e156a429449e8", {"rows": 1, "no_output": 1, "used": 1}, "b5b80d17b68598a5"),
    },
    "annotated-votes": {
        "train": (
            "c11b01ad835077fa",
            {
                "rows": 36,
                "parsed": 21,
                "unparsed": 3,
                "no_output": 12,
                "teacher_correct": 17,
                "rationale_filtered": 8,
                "dropped_without_teacher_label": 13,
                "used": 23,
            },
            "0dcd52cefd45d252",
        ),
        "val": (
            "b2a652ea3a826a04",
            {"rows": 4, "parsed": 2, "no_output": 2, "teacher_correct": 2, "used": 4},
            "cbefaef0d7c346cd",
        ),
        "test": ("7e8e156a429449e8", {"rows": 1, "no_output": 1, "used": 1}, "b5b80d17b68598a5"),
    },
    "annotated-agrees": {
        "train": (
            "3f89240727518922",
            {
                "rows": 36,
                "parsed": 21,
                "unparsed": 3,
                "no_output": 12,
                "teacher_correct": 17,
                "rationale_filtered": 1,
                "used": 36,
                "rationale_shuffled": 22,
            },
            "a12113189e7f7d18",
        ),
        "val": (
            "b2a652ea3a826a04",
            {"rows": 4, "parsed": 2, "no_output": 2, "teacher_correct": 2, "used": 4},
            "cbefaef0d7c346cd",
        ),
        "test": ("7e8e156a429449e8", {"rows": 1, "no_output": 1, "used": 1}, "b5b80d17b68598a5"),
    },
}


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


@pytest.mark.parametrize(
    "name", ["tickets", "jsonl", "annotated", "annotated-condition", "annotated-votes", "annotated-agrees"]
)
def test_own_rows(name: str, tmp_path: Path, write_lines: WriteLines) -> None:
    module = own(name, tmp_path, write_lines)
    module.setup("fit")
    module.setup("test")
    found = {split: (*texts(module, split), tokens(module, split)) for split in module._tokenized}
    assert found == OWN[name]
