"""Which runs are one setting, and what settings are called."""

from pathlib import Path
from typing import Any

import pytest

from lit_distill.comparison import names
from lit_distill.comparison.runs import Run, find_runs
from lit_distill.comparison.table import runs_table
from tests.comparison.runs import edit, write_run


def runs_of(root: Path, *hows: dict[str, Any]) -> list[Run]:
    for i, how in enumerate(hows):
        write_run(root / f"run{i:02d}", **how)
    return find_runs([root])[0]


def names_of(runs: list[Run]) -> list[str]:
    return list(runs_table(runs)[0].name)


def keys_of(runs: list[Run]) -> list[str]:
    """The keys in which configs differ."""
    return runs_table(runs)[1]


def remarks_of(runs: list[Run]) -> list[str]:
    """What is said of keys that are in no name."""
    return runs_table(runs)[2]["cqa"]


def test_a_key_is_named_for_all_where_few_share_a_value_or_one_leaves_it_unset(tmp_path: Path) -> None:
    rates = runs_of(tmp_path / "a", *[{"model": {"learning_rate": rate}} for rate in (1e-3, 1e-4, 1e-4)])
    assert names_of(rates).count("standard finetuning, learning rate 0.0001") == 2
    dropouts = [0.1, 0.1, 0.1, 0.1, None]
    how = [{"model": {"dropout": dropout, "learning_rate": 10.0**-i}} for i, dropout in enumerate(dropouts)]
    named = names_of(runs_of(tmp_path / "b", *how))
    assert sum("dropout 0.1" in name for name in named) == 4


def test_a_key_may_follow_from_two_others(tmp_path: Path) -> None:
    steps = {(0.5, "Standard"): 100, (0.5, "StepByStep"): 200, (1.0, "Standard"): 200, (1.0, "StepByStep"): 100}
    runs = runs_of(
        tmp_path,
        *[
            {"method": method, "train_fraction": part, "model": {"warmup_steps": number}}
            for (part, method), number in steps.items()
        ],
    )
    shown = "0.5 Standard: 100, 0.5 StepByStep: 200, 1 Standard: 200, 1 StepByStep: 100"
    assert remarks_of(runs) == [f"warmup steps differs with train fraction and method ({shown})"]


def test_seeds_paths_and_loggers_make_no_difference(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"seed": 0}, {"seed": 1, "data": {"data_dir": "/elsewhere", "num_workers": 4}})
    assert runs[0].record.config["checkpoint"] != runs[1].record.config["checkpoint"]
    assert keys_of(runs) == []


def test_what_methods_share_is_compared_and_what_one_has_alone_is_not(tmp_path: Path) -> None:
    runs = runs_of(
        tmp_path,
        {"method": "Standard"},
        {"method": "StepByStep"},
        {"method": "SingleTask", "model": {"learning_rate": 1e-3}},
    )
    assert keys_of(runs) == ["model.init_args.learning_rate"]
    # it tells no settings apart, though it may be what makes the difference
    remark = "learning rate differs with method (SingleTask: 0.001, Standard: 5e-05, StepByStep: 5e-05)"
    assert remarks_of(runs) == [remark]
    assert names_of(runs) == ["standard finetuning", "step-by-step", "single task: rationale and label"]
    runs_of(tmp_path, *[{"method": method} for method in ("Standard", "StepByStep", "SingleTask")])
    write_run(tmp_path / "more", model={"learning_rate": 0.1})
    more = find_runs([tmp_path])[0]
    # all but one setting share it
    assert remarks_of(more) == []
    assert set(runs_table(more)[0].usual) == {"where nothing else is named: learning rate 5e-05"}
    assert sorted(set(names_of(more))) == [
        "single task: rationale and label",
        "standard finetuning",
        "standard finetuning, learning rate 0.1",
        "step-by-step",
    ]


def test_classes_of_one_name_are_two_methods(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"method": "StepByStep"}, *[{"method": "StepByStep", "seed": seed} for seed in (0, 0, 1)])
    for run, module in zip(runs[1:], ("first.losses", "second.losses", "second.losses"), strict=True):
        model = run.record.config["model"] | {"class_path": f"{module}.StepByStepModule"}
        edit(Path(run.source), config=run.record.config | {"model": model})
    found, _ = find_runs([tmp_path])
    assert names_of(found) == ["step-by-step", "first.losses.StepByStep", *["second.losses.StepByStep"] * 2]
    assert names_of(found[:2]) == ["step-by-step", "losses.StepByStep"]
    # one alone has its own name
    assert names_of(found[2:]) == ["step-by-step"] * 2


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
        "step-by-step, callbacks EarlyStopping",
        "step-by-step, from scratch",
    ]


def test_what_follows_from_the_rest_is_said_once(tmp_path: Path) -> None:
    sizes = (("t5-v1_1-small", 8), ("t5-v1_1-base", 4))
    runs = runs_of(
        tmp_path,
        *[{"method": method, "student": student, "data": {"batch_size": size}}
          for student, size in sizes for method in ("Standard", "StepByStep")],
    )  # fmt: skip
    assert names_of(runs) == ["standard finetuning", "step-by-step"] * 2
    assert remarks_of(runs) == ["batch size differs with student (t5-v1_1-base: 4, t5-v1_1-small: 8)"]


def test_a_variant_names_what_else_differs(tmp_path: Path) -> None:
    tasks: dict[str, Any] = {"rationale": {"select": "all"}}
    runs = runs_of(tmp_path, {}, {"model": {"tasks": tasks}}, {"model": {"tasks": tasks, "learning_rate": 0.5}})
    for number in (1, 2):
        config = runs[number].record.config | {"variant": "several_rationales"}
        edit(tmp_path / f"run{number:02d}", config=config)
    found, _ = find_runs([tmp_path])
    assert names_of(found) == [
        "standard finetuning, learning rate 5e-05",
        "standard finetuning, learning rate 5e-05, several rationales",
        "standard finetuning, learning rate 0.5, several rationales",
    ]
    assert remarks_of(found) == []


def test_remarks_on_teachers_are_short(tmp_path: Path) -> None:
    def how(kind: str, steps: int, dtype: str) -> dict[str, Any]:
        objectives = [{"class_path": f"lit_distill.objectives.{kind}", "init_args": {"teacher": "big"}}]
        teachers = {"big": {"model": "runs/big", "dtype": dtype}}
        return {"model": {"objectives": objectives, "teachers": teachers, "warmup_steps": steps}}

    alike = [{"model": {"warmup_steps": 0}}, how("ForwardKL", 0, "float32"), how("ReverseKL", 5, "float32")]
    remark = "warmup steps differs with objectives (ForwardKL: 0, ReverseKL: 5, null: 0)"
    assert remarks_of(runs_of(tmp_path / "alike", *alike)) == [remark]
    other = [*alike[:2], how("ReverseKL", 5, "bfloat16")]
    assert remarks_of(runs_of(tmp_path / "other", *other)) == [
        "big.dtype differs with objectives (ForwardKL: float32, ReverseKL: bfloat16, null: null)", remark
    ]  # fmt: skip


def test_columns_of_their_own_are_named_for_themselves(tmp_path: Path) -> None:
    runs = runs_of(
        tmp_path,
        {"method": "StepByStep"},
        {"method": "StepByStep", "rationales": "shuffled"},
        {"method": "StepByStep", "model": {"rationale_weight": 0.5}},
        {"method": "Standard", "label_source": "teacher"},
    )
    assert keys_of(runs) == ["model.init_args.rationale_weight"]
    assert names_of(runs) == [
        "step-by-step, rationale weight 1",
        "step-by-step, shuffled rationales, rationale weight 1",
        "step-by-step, rationale weight 0.5",
        "standard distillation",
    ]


def test_a_key_is_named_by_as_much_as_tells_it_apart() -> None:
    keys = ["model.init_args.order", "data.init_args.rationale_order", "data.init_args.size", "model.init_args.size"]
    keys.append("model.init_args.vote.samples")
    assert names.short_keys(keys) == {
        "model.init_args.order": "order",
        "data.init_args.rationale_order": "rationale_order",
        "data.init_args.size": "data.size",
        "model.init_args.size": "model.size",
        "model.init_args.vote.samples": "vote.samples",
    }


def test_tasks_are_named_once_and_their_differences_in_full(tmp_path: Path) -> None:
    program: dict[str, Any] = {"prefix": "p: ", "kind": "program"}
    others = [{"program": {**program, "weight": weight}} for weight in (0.3, 0.5)]
    runs = runs_of(tmp_path, *[{"method": "StepByStep", "model": {"tasks": tasks}} for tasks in (None, *others)])
    assert names_of(runs) == [
        "step-by-step",
        "step-by-step, program.kind program, program.weight 0.3",
        "step-by-step, program.kind program, program.weight 0.5",
    ]


def test_values_are_as_short_as_they_stay_different() -> None:
    assert names.short_values(["x" * 90, "annotations/mine/", "[1, 2]", "null", "1000", "2419686"]) == {
        "x" * 90: f"{'x' * 37}...", "annotations/mine/": "mine", "[1, 2]": "[1, 2]", "null": "",
        "1000": "1000", "2419686": "2,419,686",
    }  # fmt: skip
    for alike in (["a/mine", "b/mine"], ["null", "none"], ["x" * 90 + "1", "x" * 90 + "2"]):
        assert names.short_values(["c/other", *alike]) == {"c/other": "other"} | {value: value for value in alike}
    objectives = [f'[{{"class_path": "mine.losses.KL", "init_args": {{"weight": {weight}}}}}]' for weight in (1, 2)]
    assert list(names.short_values(["null", *objectives]).values()) == ["", "KL weight 1", "KL weight 2"]


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        (247_577_856, "248M"),
        (171_712, "172k"),
        (11_135_332_352, "11B"),
        (2_849_757_184, "2.85B"),
        (60_000_000, "60M"),
        (7, "7"),
    ],
)
def test_sizes(parameters: int, name: str) -> None:
    assert names.size(parameters) == name


def test_people_say() -> None:
    assert names.method("MutualInformation") == "Mutual Information"
    assert names.method("Standard", "teacher") == "standard distillation"
    assert names.dataset("anli1") == "ANLI R1"
    assert names.dataset("mine") == "mine"
    assert [names.fraction(part) for part in (1.0, 0.125, 0.0001)] == ["100 %", "12.5 %", "0.01 %"]


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
    assert names.family(student) == name


def test_the_choice_of_a_checkpoint_is_a_difference(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"method": "Standard"}, {"method": "Standard", "seed": 1})
    for run, monitor in zip(runs, ("val/accuracy", "val/label_loss"), strict=True):
        edit(Path(run.source), config=run.record.config | {"checkpoint": {"monitor": monitor, "dirpath": run.source}})
    assert keys_of(find_runs([tmp_path])[0]) == ["checkpoint.monitor"]


def test_what_only_observes_or_places_a_model_is_no_difference(tmp_path: Path) -> None:
    shares: dict[str, Any] = {"class_path": "lit_distill.callbacks.GradientShares", "init_args": {"every_n_steps": 5}}
    stopping: dict[str, Any] = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {}}
    teachers = ({"device": "cuda:1", "offload": True}, {"device": None, "offload": False})
    runs = runs_of(tmp_path, *[{"seed": seed, "model": {"teachers": {"big": teachers[seed]}}} for seed in (0, 1)])

    def with_callbacks(*found: list[dict[str, Any]] | None) -> list[Run]:
        for run, callbacks in zip(runs, found, strict=True):
            edit(Path(run.source), config=run.record.config | {"trainer": {"callbacks": callbacks}})
        return find_runs([tmp_path])[0]

    assert keys_of(with_callbacks([shares], None)) == []
    assert keys_of(with_callbacks([shares, stopping], [stopping])) == []
    found = with_callbacks([shares, stopping], [shares])
    assert keys_of(found) == ["trainer.callbacks"]
    assert names_of(found) == ["standard finetuning, callbacks EarlyStopping", "standard finetuning"]


@pytest.mark.parametrize(("effective", "apart"), [(None, True), (64, False)])
def test_devices_count_where_they_make_the_batch(tmp_path: Path, effective: int | None, apart: bool) -> None:
    runs = runs_of(tmp_path, *[{"seed": seed, "model": {"effective_batch_size": effective}} for seed in (0, 1)])
    for run, trainer in zip(runs, ({"devices": 1}, {"devices": 8, "num_nodes": 1}), strict=True):
        edit(Path(run.source), config=run.record.config | {"trainer": trainer})
    assert keys_of(find_runs([tmp_path])[0]) == (["trainer.devices", "trainer.num_nodes"] if apart else [])


def test_a_key_that_came_later_is_as_if_not_set(tmp_path: Path) -> None:
    runs = runs_of(
        tmp_path, {"seed": 0}, {"seed": 1, "model": {"compile": False}}, {"seed": 2, "data": {"shard": None}}
    )
    assert keys_of(runs) == []
    write_run(tmp_path / "more", model={"compile": None})
    # here both are said
    assert keys_of(find_runs([tmp_path])[0]) == ["model.init_args.compile"]


def test_a_default_that_came_later_is_as_if_not_set(tmp_path: Path) -> None:
    how = [{"model": given} for given in ({}, {"weighting": "fixed", "vote": None}, {"weighting": "uncertainty"})]
    found = runs_of(tmp_path, *how)
    assert names_of(found) == [
        "standard finetuning",
        "standard finetuning",
        "standard finetuning, weighting uncertainty",
    ]


def test_keys_that_only_look_like_paths_are_differences(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"data": {"rationales_file": "a"}}, {"data": {"rationales_file": "b", "noise_seed": 1}})
    assert keys_of(runs) == ["data.init_args.noise_seed", "data.init_args.rationales_file"]
