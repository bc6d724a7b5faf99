"""What runs are called."""

from pathlib import Path

import pytest
from jsonargparse import Namespace

from lit_distill.commands.experiment import accepted_arguments, check_config
from lit_distill.commands.loggers import run_name, wandb_naming
from lit_distill.commands.parser import Parser
from lit_distill.commands.train import train_parser
from lit_distill.experiments.grid import LOCATION, fit_keys, merge, nested


@pytest.fixture(scope="module")
def parser() -> Parser:
    """``fit``'s parser."""
    return train_parser("fit")


def config(parser: Parser, student: Path, **changes: object) -> Namespace:
    base = nested(fit_keys({"method": "step_by_step", "student": str(student), "dataset": "ToyDataModule", "seed": 0}))
    given = {key.replace("__", "."): value for key, value in changes.items()}
    location = {key: given.pop(key) for key in LOCATION if key in given}
    return check_config(parser, merge(base, nested(fit_keys(given) | location), accepted_arguments))


@pytest.mark.parametrize(
    "changes",
    [
        {"rationale_weight": 0.5},
        {"rationales": "shuffled"},
        {"data__init_args__rationale_filter": "label_agrees"},
        {"train_fraction": 0.5},
        {"label_source": "teacher"},
        {"model__init_args__learning_rate": 1e-3},
        {"model__init_args__from_scratch": True},
        {"trainer__max_steps": 7},
        {"method": "standard"},
    ],
)
def test_what_differs_but_seeds_makes_another_group(
    parser: Parser, student_folder: Path, changes: dict[str, object]
) -> None:
    plain = wandb_naming(config(parser, student_folder))
    other = wandb_naming(config(parser, student_folder, **changes))
    assert plain["group"] != other["group"]
    assert plain["name"] != other["name"]


def test_another_student_makes_another_group(parser: Parser, student_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(student_folder)
    groups = [wandb_naming(config(parser, student))["group"] for student in (student_folder, other)]
    assert groups[0].startswith(f"toy-StepByStep-gold-1-{student_folder.name}-")
    assert groups[1].startswith("toy-StepByStep-gold-1-other-")


def test_seeds_paths_loggers_and_strategies_make_no_other_group(parser: Parser, student_folder: Path) -> None:
    plain = config(parser, student_folder)
    other = config(
        parser, student_folder, seed=3, trainer__strategy="ddp", trainer__num_nodes=1, cpu_threads=2,
        trainer__default_root_dir="/elsewhere", trainer__enable_progress_bar=False, data__init_args__num_workers=2,
        checkpoint__dirpath="/elsewhere/checkpoints", push_to_hub="own/student-seed3", resume=True,
    )  # fmt: skip
    one, two = wandb_naming(plain), wandb_naming(other)
    assert one["group"] == two["group"]
    assert one["name"] == f"{one['group']}-seed0"
    assert two["name"] == f"{two['group']}-seed3"
    # the folder's, as the README says it
    assert run_name(other) == "toy-StepByStep-gold-1-seed3"
