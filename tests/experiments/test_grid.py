"""Grid files: what they expand to, and how a wrong one is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_distill.errors import UserError
from lit_distill.experiments.grid import Grid, read_grid
from lit_distill.experiments.keys import settings
from lit_distill.experiments.names import cell_name


def grid(tmp_path: Path, **content: Any) -> Grid:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", **content}, sort_keys=False))
    return read_grid(path)


def refusal(tmp_path: Path, **content: Any) -> str:
    with pytest.raises(UserError) as refused:
        grid(tmp_path, **content)
    line = str(refused.value)
    assert "\n" not in line
    place = f" (in {tmp_path / 'grid.yaml'})"
    assert line.endswith(place)
    return line.removesuffix(place)


# ---------------------------------------------------------------------- what they expand to


def test_a_grid_is_every_combination_in_the_files_order(tmp_path: Path) -> None:
    axes = {"method": ["standard", "StepByStepModule"], "train_fraction": [0.5, 1], "seed": [0, 1]}
    found = grid(tmp_path, grid=axes)
    assert found.base == ("base.yaml",)
    assert found.points() == [
        {"method": "standard", "train_fraction": 0.5, "seed": 0},
        {"method": "standard", "train_fraction": 0.5, "seed": 1},
        {"method": "standard", "train_fraction": 1, "seed": 0},
        {"method": "standard", "train_fraction": 1, "seed": 1},
        {"method": "step_by_step", "train_fraction": 0.5, "seed": 0},
        {"method": "step_by_step", "train_fraction": 0.5, "seed": 1},
        {"method": "step_by_step", "train_fraction": 1, "seed": 0},
        {"method": "step_by_step", "train_fraction": 1, "seed": 1},
    ]
    assert [cell_name(point) for point in found.points()] == [
        "standard-fraction0.5-seed0",
        "standard-fraction0.5-seed1",
        "standard-fraction1-seed0",
        "standard-fraction1-seed1",
        "step_by_step-fraction0.5-seed0",
        "step_by_step-fraction0.5-seed1",
        "step_by_step-fraction1-seed0",
        "step_by_step-fraction1-seed1",
    ]


def test_each_explicit_cell_is_combined_with_the_grid(tmp_path: Path) -> None:
    cells = [{"method": "single_task", "model.order": "label_first"}, {"method": "step_by_step", "rationales": "own"}]
    found = grid(tmp_path, cells=cells, grid={"seed": [0, 7]})
    assert found.points() == [
        {"method": "single_task", "model.init_args.order": "label_first", "seed": 0},
        {"method": "single_task", "model.init_args.order": "label_first", "seed": 7},
        {"method": "step_by_step", "rationales": "own", "seed": 0},
        {"method": "step_by_step", "rationales": "own", "seed": 7},
    ]
    assert [cell_name(point) for point in found.points()] == [
        "single_task-order_label_first-seed0",
        "single_task-order_label_first-seed7",
        "step_by_step-own-seed0",
        "step_by_step-own-seed7",
    ]
    assert len(grid(tmp_path, cells=cells).points()) == 2


def test_short_names_are_keys_of_fit() -> None:
    point = {
        "method": "single_task", "student": "google/t5", "dataset": "CQADataModule", "train_fraction": 0.5,
        "label_source": "teacher", "rationales": "shuffled", "rationale_weight": 2.0, "seed": 3,
        "trainer.max_steps": 10, "model.init_args.dropout": None,
    }  # fmt: skip
    assert settings(point) == {
        "seed_everything": 3,
        "model": {
            "class_path": "SingleTaskModule",
            "init_args": {"student": "google/t5", "rationale_weight": 2.0, "dropout": None},
        },
        "data": {
            "class_path": "CQADataModule",
            "init_args": {
                "train_fraction": 0.5, "label_source": "teacher", "rationale_pairing": "shuffled", "seed": 3,
            },
        },
        "trainer": {"max_steps": 10},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"model.class_path": "StepByStepModule"}, "method", "step_by_step"),
        ({"method": "lit_distill.modules.StepByStepModule"}, "method", "step_by_step"),
        ({"method": "own.stuff.OwnModule"}, "method", "own.stuff.OwnModule"),
        # not what `mi_cot` would be the name of
        ({"method": "MICoTModule"}, "method", "MICoTModule"),
        ({"data.train_fraction": 0.5}, "train_fraction", 0.5),
        ({"data.init_args.rationale_pairing": "own"}, "rationales", "own"),
        ({"data.rationales": "folder"}, "data.init_args.rationales", "folder"),
        ({"data.seed": 1}, "data.init_args.seed", 1),
        ({"seed_everything": 1}, "seed_everything", 1),
    ],
)
def test_a_key_has_one_name(tmp_path: Path, given: dict[str, Any], key: str, value: object) -> None:
    [(name, one)] = given.items()
    assert grid(tmp_path, grid={name: [one]}).points() == [{key: value}]
    assert grid(tmp_path, grid={"trainer.max_steps": [1]}, set=given).fixed == {key: value}


def test_conditions_hold_for_some_cells(tmp_path: Path) -> None:
    when = [
        {"if": {"method": "StepByStepModule"}, "set": {"rationale_weight": 0.5}},
        {"if": {"student": ["a/large", "a/xl"]}, "set": {"data.batch_size": 8, "trainer.max_steps": 5}},
        {"if": {"student": "a/xl", "data.num_workers": 2}, "set": {"data.batch_size": 4}},
    ]
    found = grid(
        tmp_path, set={"trainer.max_steps": 9, "data.num_workers": 2}, when=when,
        grid={"method": ["standard", "step_by_step"], "student": ["a/base", "a/large", "a/xl"]},
    )  # fmt: skip
    batch, steps, weight = "data.init_args.batch_size", "trainer.max_steps", "rationale_weight"
    shown = [
        (point["method"], point["student"], all_.get(batch), all_[steps], all_.get(weight))
        for point in found.points()
        for all_ in [found.settings(point)]
    ]
    assert shown == [
        ("standard", "a/base", None, 9, None),
        ("standard", "a/large", 8, 5, None),
        ("standard", "a/xl", 4, 5, None),
        ("step_by_step", "a/base", None, 9, 0.5),
        ("step_by_step", "a/large", 8, 5, 0.5),
        ("step_by_step", "a/xl", 4, 5, 0.5),
    ]


# ---------------------------------------------------------------------- what is refused

SEEDS = {"seed": [0, 1]}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"gird": SEEDS}, "gird: no such key (did you mean grid?); allowed are base, set, when, grid, cells, out,"),
        ({"base": []}, "base must be given: a config of fit, or a list of them"),
        ({"base": 3}, "base must be a text or a list of texts, got 3"),
        ({"base": ["a", ""]}, "base must be a text or a list of texts, got ['a', '']"),
        ({}, "grid must have a key with values, or cells one cell: nothing varies"),
        ({"grid": []}, "grid must map keys of fit, or method, student,"),
        ({"grid": {"seed": []}}, "grid.seed must be a list of one or more values, got []"),
        ({"grid": {"seed": 1}}, "grid.seed must be a list of one or more values, got 1"),
        ({"grid": {"seed": None}}, "grid.seed must be a list of one or more values, got None"),
        ({"grid": {"seed": [1, 2, 1]}}, "grid.seed must name each value once, got 1 twice"),
        ({"grid": {"train_fraction": [1, 1.0]}}, "grid.train_fraction must name each value once, got 1 twice"),
        (
            {"grid": {"method": ["standard", "StandardModule"]}},
            "grid.method must name each value once, got standard twice",
        ),
        ({"grid": {"seed": [True]}}, "grid.seed must be an integer in [0, 4294967295], got True"),
        ({"grid": {"seed": ["1"]}}, "grid.seed must be an integer in [0, 4294967295], got '1'"),
        ({"cells": [{"seed": -1}]}, "cells: seed must be an integer in [0, 4294967295], got -1"),
        ({"grid": {"student": [["a"]]}}, "grid.student must be texts, numbers, true, false or null, got ['a']"),
        ({"grid": {"student": [""]}}, "grid.student must be texts, numbers, true, false or null, got ''"),
        ({"grid": {3: [1]}}, "grid must map keys of fit"),
        ({"grid": {"seed": [0], "seed_everything": [1]}}, "grid.seed_everything: grid.seed sets seed_everything as"),
        (
            {"grid": SEEDS, "set": {"data.seed": 1}},
            "grid.seed: set.data.init_args.seed sets data.init_args.seed as well",
        ),
        (
            {"grid": {"method": ["a"], "model.class_path": ["b"]}},
            "grid.model.class_path: method is there already; say it once",
        ),
        ({"grid": SEEDS, "cells": [{"seed": 1}]}, "cells.seed: grid.seed sets seed_everything as well; say it once"),
        ({"grid": SEEDS, "cells": []}, "cells must be a list of one or more entries, got []"),
        ({"grid": SEEDS, "cells": None}, "cells must be a list, got nothing"),
        ({"grid": SEEDS, "cells": [{}]}, "cells[0] must map keys of fit"),
        ({"cells": [{"method": ["a"]}]}, "cells: method must be texts, numbers, true, false or null, got ['a']"),
        ({"cells": [{"method": "a"}, {"method": "a"}]}, "cells: a is there twice"),
        ({"grid": SEEDS, "set": [1]}, "set must map keys of fit"),
        ({"grid": SEEDS, "set": {"ckpt_path": "x"}}, "set.ckpt_path: the folder of a run is the experiment's own"),
        ({"grid": {"checkpoint.dirpath": ["x"]}}, "grid.checkpoint.dirpath: the folder of a run is the experiment's"),
        ({"grid": SEEDS, "when": {"if": 1}}, "when must be a list of one or more entries"),
        ({"grid": SEEDS, "when": [{"if": {"seed": 1}}]}, "when[0] must hold the keys if and set"),
        (
            {"grid": SEEDS, "when": [{"if": {"sede": 1}, "set": {"data.batch_size": 1}}]},
            "when[0].if.sede: no key of set, grid or cells (did you mean seed?)",
        ),
        (
            {"grid": SEEDS, "when": [{"if": {"seed": 1}, "set": {"data.seed": 1}}]},
            "when[0].set.data.init_args.seed: varies in grid or cells, whose names would be wrong",
        ),
        ({"grid": SEEDS, "out": 3}, "out must be a folder, got 3"),
        ({"grid": SEEDS, "tolerance": 1}, "published and tolerance must be given together"),
        ({"grid": SEEDS, "published": [{"accuracy": 3}], "tolerance": 1}, "published[0] must hold accuracy and which"),
        (
            {"grid": SEEDS, "published": [{"seed": 0, "accuracy": 0}], "tolerance": 1},
            "published[0].accuracy must be a number of percent above 0 and at most 100, got 0",
        ),
        (
            {"grid": SEEDS, "published": [{"method": "a", "accuracy": 3}], "tolerance": 1},
            "published[0].method: no key of set, grid or cells",
        ),
        ({"grid": SEEDS, "deviations": [1]}, "deviations must be a text or a list of texts, got [1]"),
    ],
)
def test_a_wrong_grid_is_one_line(tmp_path: Path, content: dict[str, Any], line: str) -> None:
    assert refusal(tmp_path, **content).startswith(line)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config: no file"):
        read_grid(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_grid(tmp_path)
    path = tmp_path / "grid.yaml"
    path.write_text("a: [")
    with pytest.raises(UserError, match="is not YAML"):
        read_grid(path)
    path.write_text("- a")
    with pytest.raises(UserError, match="a grid must hold keys with values"):
        read_grid(path)
