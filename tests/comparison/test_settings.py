"""Which runs are one setting, and what settings are called."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_distill.comparison.names import (
    dataset_name,
    family,
    fraction_name,
    method_name,
    short_keys,
    size_name,
    variant_name,
    variant_names,
)
from lit_distill.comparison.runs import Run, find_runs
from lit_distill.comparison.settings import Setting, differing_keys, following_keys, setting_of, student_sizes
from lit_distill.files import flatten
from tests.comparison.runs import edit, write_run


def runs_of(root: Path, *hows: dict[str, Any]) -> list[Run]:
    for i, how in enumerate(hows):
        write_run(root / f"run{i:02d}", **how)
    return list(find_runs([root]).runs)


def names_of(runs: list[Run]) -> list[str]:
    differing = differing_keys(runs)
    keys = [key for key in differing if key not in following_keys(runs, differing)]
    settings = [setting_of(run, keys, run.record.parameters) for run in runs]
    return [variant_name(setting, settings) for setting in settings]


def test_a_config_is_flattened() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [{"e": 2}]}) == {"a.b": 1, "d": [{"e": 2}]}


def test_seeds_paths_and_loggers_make_no_difference(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"seed": 0}, {"seed": 1, "data": {"data_dir": "/elsewhere", "num_workers": 4}})
    assert flatten(runs[0].record.config)["checkpoint.dirpath"] != flatten(runs[1].record.config)["checkpoint.dirpath"]
    assert differing_keys(runs) == []


def test_what_methods_share_is_compared_and_what_one_has_alone_is_not(tmp_path: Path) -> None:
    runs = runs_of(
        tmp_path,
        {"method": "Standard"},
        {"method": "StepByStep"},
        {"method": "SingleTask", "model": {"learning_rate": 1e-3}},
    )
    keys = differing_keys(runs)
    assert keys == ["model.init_args.learning_rate"]
    # it tells no settings apart, though it may be what makes the difference
    assert following_keys(runs, keys) == {
        "model.init_args.learning_rate": {"SingleTask": "0.001", "Standard": "5e-05", "StepByStep": "5e-05"}
    }
    assert names_of(runs) == ["standard finetuning", "step-by-step", "single task: rationale and label"]
    runs_of(tmp_path, *[{"method": method} for method in ("Standard", "StepByStep", "SingleTask")])
    write_run(tmp_path / "more", model={"learning_rate": 0.1})
    more = list(find_runs([tmp_path]).runs)
    assert following_keys(more, differing_keys(more)) == {}
    assert sorted(set(names_of(more))) == [
        "single task: rationale and label, learning rate 5e-05",
        "standard finetuning, learning rate 0.1",
        "standard finetuning, learning rate 5e-05",
        "step-by-step, learning rate 5e-05",
    ]


def test_any_other_key_makes_a_setting_of_its_own(tmp_path: Path) -> None:
    stopping = [{"class_path": "lightning.EarlyStopping", "init_args": {"patience": 3}}]
    runs = runs_of(
        tmp_path,
        {"method": "StepByStep"},
        {"method": "StepByStep", "data": {"rationales": "annotations/other-teacher/"}},
        {"method": "StepByStep", "data": {"rationale_filter": "label_agrees"}},
        {"method": "StepByStep", "model": {"order": "label_first"}},
        {"method": "StepByStep", "data": {"callbacks": stopping}},
        {"method": "StepByStep", "model": {"from_scratch": True}},
    )
    assert names_of(runs) == [
        "step-by-step",
        "step-by-step, rationales other-teacher",
        "step-by-step, rationale filter label_agrees",
        "step-by-step, order label_first",
        "step-by-step, callbacks EarlyStopping(patience=3)",
        "step-by-step, from scratch",
    ]


def test_columns_of_their_own_are_named_for_themselves(tmp_path: Path) -> None:
    runs = runs_of(
        tmp_path,
        {"method": "StepByStep"},
        {"method": "StepByStep", "rationales": "shuffled"},
        {"method": "StepByStep", "model": {"rationale_weight": 0.5}},
        {"method": "Standard", "label_source": "teacher"},
    )
    assert differing_keys(runs) == []
    assert names_of(runs) == [
        "step-by-step, rationale weight 1",
        "step-by-step, shuffled rationales, rationale weight 1",
        "step-by-step, rationale weight 0.5",
        "standard distillation",
    ]


def test_a_key_is_named_by_as_much_as_tells_it_apart() -> None:
    keys = ["model.init_args.order", "data.init_args.rationale_order", "data.init_args.size", "model.init_args.size"]
    assert short_keys(keys) == {
        "model.init_args.order": "order",
        "data.init_args.rationale_order": "rationale_order",
        "data.init_args.size": "data.size",
        "model.init_args.size": "model.size",
    }


def test_long_values_are_cut() -> None:
    setting = Setting("cqa", "Standard", "s", 1, "gold", 1.0, None, None, (("a.b", "x" * 90),))
    assert variant_name(setting, [setting]) == f"standard finetuning, b {'x' * 37}..."


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        (247_577_856, "248M"),
        (171_712, "172k"),
        (11_135_332_352, "11B"),
        (2_849_757_184, "2.8B"),
        (60_000_000, "60M"),
        (7, "7"),
    ],
)
def test_sizes(parameters: int, name: str) -> None:
    assert size_name(parameters) == name


def test_people_say() -> None:
    assert method_name("MutualInformation") == "Mutual Information"
    assert method_name("Standard", "teacher") == "standard distillation"
    assert dataset_name("anli1") == "ANLI R1"
    assert dataset_name("mine") == "mine"
    assert [fraction_name(part) for part in (1.0, 0.125, 0.0001)] == ["100 %", "12.5 %", "0.01 %"]


@pytest.mark.parametrize(
    ("student", "name"),
    [
        ("t5-v1_1-base", "t5-v1_1"),
        ("t5-v1_1-xxl", "t5-v1_1"),
        ("flan-t5-xl", "flan-t5"),
        ("t5-3b", "t5"),
        ("database-t5", "database-t5"),
    ],
)
def test_families(student: str, name: str) -> None:
    assert family(student) == name


def test_sizes_of_students_are_known_from_any_run(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"student": "a", "parameters": 0}, {"student": "a", "parameters": 5})
    assert student_sizes(runs) == {"google/a": 5}


def test_the_choice_of_a_checkpoint_is_a_difference(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"method": "Standard"}, {"method": "Standard", "seed": 1})
    for run, monitor in zip(runs, ("val/accuracy", "val/label_loss"), strict=True):
        edit(Path(run.source), config=run.record.config | {"checkpoint": {"monitor": monitor, "dirpath": run.source}})
    assert differing_keys(list(find_runs([tmp_path]).runs)) == ["checkpoint.monitor"]


@pytest.mark.parametrize(
    ("effective", "devices", "nodes", "apart"),
    [(None, 8, 1, True), (None, 1, 4, True), (None, [0], 1, False), (None, "0,1", 1, True), (64, 8, 4, False)],
)
def test_devices_count_where_they_make_the_batch(
    tmp_path: Path, effective: int | None, devices: object, nodes: int, apart: bool
) -> None:
    runs = runs_of(tmp_path, *[{"seed": seed, "model": {"effective_batch_size": effective}} for seed in (0, 1)])
    for run, trainer in zip(runs, ({"devices": 1}, {"devices": devices, "num_nodes": nodes}), strict=True):
        edit(Path(run.source), config=run.record.config | {"trainer": trainer})
    assert differing_keys(list(find_runs([tmp_path]).runs)) == (["devices"] if apart else [])


def test_a_key_that_came_later_is_as_if_not_set(tmp_path: Path) -> None:
    runs = runs_of(
        tmp_path, {"seed": 0}, {"seed": 1, "model": {"compile": False}}, {"seed": 2, "data": {"shard": None}}
    )
    assert differing_keys(runs) == []
    write_run(tmp_path / "more", model={"compile": None})
    # here both are said
    assert differing_keys(list(find_runs([tmp_path]).runs)) == ["model.init_args.compile"]


def test_keys_that_only_look_like_paths_are_differences(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"data": {"rationales_file": "a"}}, {"data": {"rationales_file": "b", "noise_seed": 1}})
    assert differing_keys(runs) == ["data.init_args.noise_seed", "data.init_args.rationales_file"]


def test_names_that_clash_are_numbered() -> None:
    plain = Setting("cqa", "Standard", "s", 1, "gold", 1.0, None, None)
    settings = [replace(plain, extra=(("a.b", "x" * 90 + end),)) for end in "12"]
    first, second = variant_names(settings).values()
    assert (first[-7:], second[-7:]) == ("xxx... (1)"[-7:], "xxx... (2)"[-7:])
    other = replace(settings[0], student="t")
    assert variant_names([settings[0], other])[other].endswith("...")
