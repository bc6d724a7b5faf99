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
        ({"method": "lit_distill.modules.step_by_step.StepByStepModule"}, "method", "step_by_step"),
        ({"model": "StepByStepModule"}, "method", "step_by_step"),
        ({"model": {"class_path": "StepByStepModule"}}, "method", "step_by_step"),
        ({"model": {"order": "a"}}, "model.init_args.order", "a"),
        ({"data": {"init_args": {"train_fraction": 0.5}}}, "train_fraction", 0.5),
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
    assert grid(tmp_path, cells=[{name: one}]).points() == [{key: value}]
    if not isinstance(one, dict):
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


def test_conditions_set_their_own_cells_alone(tmp_path: Path) -> None:
    when = [{"if": {"train_fraction": 0.25}, "set": {"model.warmup_steps": 77, "data.seed": 4}}]
    given = {"model.init_args": {"learning_rate": 0.001}, "model.adam": {"betas": [1]}}
    found = grid(tmp_path, set=given, grid={"train_fraction": [0.25, 0.5]}, when=when)
    one, two = (settings(found.settings(point)) for point in found.points())
    assert one["model"]["init_args"] == {"learning_rate": 0.001, "adam": {"betas": [1]}, "warmup_steps": 77}
    assert two["model"]["init_args"] == {"learning_rate": 0.001, "adam": {"betas": [1]}}
    one["model"]["init_args"]["adam"]["betas"].append(2)
    assert two["model"]["init_args"]["adam"] == {"betas": [1]}


def test_a_later_condition_wins_by_whatever_name(tmp_path: Path) -> None:
    when = [{"if": {"method": "a"}, "set": given} for given in ({"data.seed": 1}, {"seed": 2}, {"data.seed": 3})]
    found = grid(tmp_path, grid={"method": ["a"]}, when=when)
    config = settings(found.settings({"method": "a"}))
    assert (config["seed_everything"], config["data"]["init_args"]["seed"]) == (2, 3)


@pytest.mark.parametrize(
    ("given", "model"),
    [
        (
            {"model.learning_rate": 0.5, "model.init_args": {"warmup_steps": 3}},
            {"init_args": {"learning_rate": 0.5, "warmup_steps": 3}},
        ),
        (
            {"model": "StandardModule", "model.learning_rate": 0.5},
            {"class_path": "StandardModule", "init_args": {"learning_rate": 0.5}},
        ),
        (
            {"model.learning_rate": 0.5, "model": {"class_path": "StandardModule", "adam": {"beta": 0.9}}},
            {"class_path": "StandardModule", "init_args": {"learning_rate": 0.5, "adam": {"beta": 0.9}}},
        ),
        ({"model.table": {1: "a"}, "model.init_args.none": {}}, {"init_args": {"table": {1: "a"}, "none": {}}}),
    ],
)  # fmt: skip
def test_nested_and_dotted_keys_are_the_same(tmp_path: Path, given: dict[str, Any], model: dict[str, Any]) -> None:
    found = grid(tmp_path, set=given, grid={"train_fraction": [1]})
    assert settings(found.settings({}))["model"] == model


def test_numbers_are_fits(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(
        "base: x\ngrid: {model.learning_rate: [1e-4, 5E+3, -1.5e2, '1e-4 ']}\nset: {label_source: 2024-01-01}\n"
        "when: [{if: {model.learning_rate: 0.0001}, set: {seed: 1}}]\n"
    )
    found = read_grid(path)
    assert [*found.axes["model.init_args.learning_rate"]] == [0.0001, 5000.0, -150.0, "1e-4 "]
    assert found.fixed == {"label_source": "2024-01-01"}


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
        ({"grid": {"seed": list(range(100_000))}}, "grid and cells make 100,000 cells; allowed are 2,000 in one grid"),
        (
            {
                "grid": {"seed": list(range(2001)), "model.a": list(range(1000))},
                "cells": [{"model.b": 1}, {"model.b": 2}],
            },
            "grid and cells make 4,002,000 cells; allowed are 2,000 in one grid",
        ),
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
        ({"grid": SEEDS, "set": {"resume": True}}, "set.resume: the folder of a run is the experiment's own"),
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
        (
            {"set": {"trainer.max_steps": 1, "trainer.max_steps.x": 2}, "grid": SEEDS},
            "set.trainer.max_steps.x: set.trainer.max_steps is set as well, and trainer.max_steps.x lies within",
        ),
        ({"set": {"trainer": 1}, "grid": {"trainer.max_steps": [1]}}, "grid.trainer.max_steps: set.trainer is set as"),
        (
            {"cells": [{"method": "a", "model.class_path.x": 1}]},
            "cells.model.class_path.x: cells.method is set as well",
        ),
        (
            {"set": {"a.b": {"c": 1}}, "grid": SEEDS, "when": [{"if": {"seed": 1}, "set": {"a.b": 1}}]},
            "when[0].set.a.b: set.a.b.c is set as well",
        ),
        (
            {"grid": SEEDS, "when": [{"if": {"seed": 1}, "set": {"a": 1}}, {"if": {"seed": 1}, "set": {"a.b": 1}}]},
            "when[1].set.a.b: when[0].set.a is set as well",
        ),
        (
            {"grid": {"method": ["a"]}, "when": [{"if": {"method": "a"}, "set": {"seed": 1, "data.seed": 2}}]},
            "when[0].set.data.init_args.seed: when[0].set.seed sets data.init_args.seed as well; say it once",
        ),
        (
            {"grid": SEEDS, "set": {"model": {"order": 1}, "model.order": 2}},
            "set.model.order: model.init_args.order is there already",
        ),
        ({"grid": SEEDS, "set": {"checkpoint": {"dirpath": "x"}}}, "set.checkpoint.dirpath: the folder of a run is"),
        ({"grid": SEEDS, "set": {"model..x": 1}}, "set must map keys of fit"),
        (
            {"grid": {"train_fraction": [0.25, 0.5]}, "when": [{"if": {"train_fraction": 0.3}, "set": {"seed": 1}}]},
            "when[0].if.train_fraction: no cell has 0.3; there are 0.25, 0.5",
        ),
        (
            {"grid": {"method": ["step_by_step"]}, "when": [{"if": {"method": "stepbystep"}, "set": {"seed": 1}}]},
            "when[0].if.method: no cell has stepbystep (did you mean step_by_step?); there are step_by_step",
        ),
        (
            {"grid": SEEDS, "when": [{"if": {"seed": [1, 2]}, "set": {"data.batch_size": 1}}]},
            "when[0].if.seed: no cell has 2; there are 0, 1",
        ),
        (
            {"grid": SEEDS, "when": [{"if": {"seed": []}, "set": {"a": 1}}]},
            "when[0].if.seed must be a value, or a list",
        ),
        (
            {
                "cells": [{"method": "a", "seed": 0}, {"method": "b", "seed": 1}],
                "when": [{"if": {"method": "a", "seed": 1}, "set": {"data.batch_size": 1}}],
            },
            "when[0].if: no cell has all of method a, seed 1",
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


def test_a_key_that_is_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    for text, key, line in (
        ("base: x\ngrid: {seed: [0], 'seed': [1]}\n", "seed", 2),
        ("base: x\nset: {a: 1}\ngrid: {seed: [0]}\nset: {b: 1}\n", "set", 4),
    ):
        path.write_text(text)
        with pytest.raises(UserError) as refused:
            read_grid(path)
        assert str(refused.value) == f"{key}: is there twice, again in line {line}; say it once (in {path})"
    # what is merged in may be said anew
    path.write_text("base: x\ncells: [&a {method: a, model.x: 1}, &b {<<: *a, model.x: 2}, {<<: *b, model.x: 3}]\n")
    assert [point["model.init_args.x"] for point in read_grid(path).points()] == [1, 2, 3]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config: no file"):
        read_grid(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_grid(tmp_path)
    path = tmp_path / "grid.yaml"
    path.write_text("a: [")
    with pytest.raises(UserError, match="is not YAML") as refused:
        read_grid(path)
    assert "\n" not in str(refused.value)
    path.write_text("base: x\ngrid: {seed: [0]}\nset: &a {b: *a}\n")
    with pytest.raises(UserError, match="is not YAML"):
        read_grid(path)
    path.write_text("- a")
    with pytest.raises(UserError, match="a grid must hold keys with values"):
        read_grid(path)
