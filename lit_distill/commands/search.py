"""``search``: students of a budget, ranked without training and by shared weights; the best few are trained."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from jsonargparse import Namespace
from rich.console import Console
from torch import Tensor
from torchmetrics.functional.regression import kendall_rank_corrcoef, spearman_corrcoef

from lit_distill.batch import TaskBatch
from lit_distill.checks import check_fraction, check_int, check_range
from lit_distill.commands.compare import compare
from lit_distill.commands.experiment import accepted_arguments, check_teachers, local_launcher, with_location
from lit_distill.commands.parser import Option, Parser
from lit_distill.commands.rounds import run_all
from lit_distill.commands.settings import fabric_of, parse_settings, settle
from lit_distill.commands.train import build, train_parser
from lit_distill.data import RationaleDataModule
from lit_distill.errors import UserError
from lit_distill.experiments.cells import Cell
from lit_distill.experiments.grid import differences, merge
from lit_distill.files import atomic_folder, write_text
from lit_distill.interrupts import interruptible
from lit_distill.progress import ticker
from lit_distill.records import read_record
from lit_distill.searching.cost import config_of, milliseconds, parameters, random_student
from lit_distill.searching.relations import scores
from lit_distill.searching.shared import SuperStudent
from lit_distill.searching.space import Budget, Shape, Space, name_of
from lit_distill.students import Student, load
from lit_distill.students.models import save_description
from lit_distill.tables import console_table
from lit_distill.tasks import answer_task

Ranking = Literal["relations", "shared"]

_RANKED: Sequence[Option] = (
    ("space", dict[str, list[int]] | None, None, "Values of encoder_layers, decoder_layers, d_model, d_ff and heads."),
    ("max_parameters", int | None, None, "The budget in parameters."),
    ("max_ms", float | None, None, "The budget in milliseconds, to answer a batch of val."),
    ("at_least", float, 0.8, "The share of the budget that a student has to use."),
    ("candidates", int, 24, "Number of students that are ranked."),
    ("rankings", list[Ranking], ["relations", "shared"], "Training-free, which needs a teacher; by shared weights."),
    ("initialisations", int, 3, "Random students of each shape whose relations are averaged."),
    ("shared_steps", int, 300, "Steps of the super-student, of three of its parts each."),
    ("search_seed", int, 0, "Of what is drawn."),
)
_TRAINED: Sequence[Option] = (
    ("by", Literal["relations", "shared", "parameters"], "shared", "The ranking whose best students are trained."),
    ("best", int, 3, "Number of the best students that are trained."),
    ("drawn", int, 8, "Number of students that are drawn and trained, for the correlations."),
    ("jobs", int, 1, "Runs of fit at a time."),
    ("out", str, "runs/search", "Folder of the ranking and the runs, finished and new."),
)

_FORMATS = {"parameters": ",", "ms": ".1f", "relations": ".5f", "shared": ".3f"}
"""What is printed of a student, and how."""

RANKING = "ranking.json"
"""The students with their scores, and the settings that they come from."""


@interruptible()
def search(args: list[str]) -> None:
    """Run ``search``: draw students of the budget, rank them, fit some, and say what the rankings told.

    The config's student is the whole of which each student of the space is a part, with random weights. What is ranked
    stays in the folder, finished runs are skipped, a stopped one resumes.
    """
    parser = train_parser("search")
    parser.add_options([*_RANKED, *_TRAINED])
    config = parse_settings(parser, args)
    settle(config, "fit")
    _check(config)
    if config["cpu_threads"] is not None:
        torch.set_num_threads(config["cpu_threads"])
    base = yaml.safe_load(parser.dump(config, skip_unset=False))
    own = {name: base.pop(name) for name, *_ in [*_RANKED, *_TRAINED]}
    whole = load(base["model"]["init_args"]["student"], from_scratch=True, fast=False, meta=True)
    space, out = Space(whole, own["space"]), Path(own["out"])
    settings = {"fit": base, "search": {name: own[name] for name, *_ in _RANKED}}
    if (ranked := _read(out, settings)) is None:
        ranked = _rank(parser, config, space)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / RANKING, json.dumps({"settings": settings, "students": ranked}, indent=2) + "\n")
    best, drawn = choose(ranked, own)
    cells = {}
    for one in ranked:
        if one["name"] in best | drawn:
            folder = out / "students" / one["name"]
            _write_student(folder, whole, one["shape"])
            cells[one["name"]] = cell_of(base, out / "fits" / one["name"], folder)
    for cell in cells.values():
        cell.check_folder()
    run_all(list(cells.values()), local_launcher(own["jobs"]), {cell: cell.state for cell in cells.values()})
    accuracy = {name: read_record(cell.folder).metrics["test/accuracy"] for name, cell in cells.items()}
    rows = [
        one | {"best": one["name"] in best, "drawn": one["name"] in drawn, "accuracy": accuracy.get(one["name"])}
        for one in ranked
    ]
    found = {"by": own["by"], "students": rows, "correlations": correlations([row for row in rows if row["drawn"]])}
    write_text(out / "search.json", json.dumps(found, indent=2) + "\n")
    render(found)
    compare([str(out / "fits")], str(out / "report"))


def _check(config: Namespace) -> None:
    """Raise a ``UserError`` for what a search cannot do, before it begins."""
    if config["space"] is None:
        raise UserError("space: must be given, as {d_model: [32, 64], d_ff: [64, 128]}")
    if (config["max_parameters"] is None) == (config["max_ms"] is None):
        raise UserError("give the budget, either max_parameters or max_ms")
    check_range("max_parameters", config["max_parameters"], at_least=1, whole=True)
    check_range("max_ms", config["max_ms"], above=0)
    check_fraction("at_least", config["at_least"])
    check_int("candidates", config["candidates"], 2, 1000)
    for name, least in (("initialisations", 1), ("shared_steps", 1), ("search_seed", 0), ("jobs", 1)):
        check_int(name, config[name], least)
    check_int("best", config["best"], 0, config["candidates"])
    check_int("drawn", config["drawn"], 0, config["candidates"])
    if not config["test_after_fit"]:
        raise UserError("test_after_fit: must be true, as the rankings are compared with test accuracy")
    if config["trainer"]["limit_test_batches"] == 0:
        raise UserError("trainer.limit_test_batches: must be above 0, as the rankings are compared with test accuracy")
    if config["best"] + config["drawn"] == 0:
        raise UserError("best: 0 and drawn: 0 train nothing; give one of them")
    if config["by"] not in [*config["rankings"], "parameters"]:
        raise UserError(f"by: {config['by']} is not among rankings; allowed are parameters and those of rankings")
    if Path(config["out"]).exists() and not Path(config["out"]).is_dir():
        raise UserError(f"out: {config['out']!r} is a file; give a folder")
    if config["data"]["init_args"].get("streaming"):
        raise UserError("data.streaming: search reads train again and again; leave it out")
    model = config["model"]["init_args"]
    if not model["from_scratch"]:
        raise UserError("model.from_scratch: must be true; the students of a search start from random weights")
    if model["adapter"] is not None:
        raise UserError("model.adapter: the students of a search are trained whole; leave it out")
    teachers = model["teachers"] or {}
    if "relations" in config["rankings"] and not teachers:
        raise UserError("model.teachers: relations compares with a teacher; name one, or set rankings: [shared]")
    if "relations" in config["rankings"] and len(teachers) > 1:
        raise UserError(f"model.teachers: relations compares with one teacher, there are {', '.join(teachers)}")
    check_teachers(teachers)


def _read(out: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """What a folder has ranked. Raises a ``UserError`` if it was with other settings."""
    path = out / RANKING
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        ranked: list[dict[str, Any]] = found["students"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); move it away") from error
    for key, (there, wanted) in differences(found.get("settings"), settings).items():
        raise UserError(f"{path}: ranked with another {key}: {there!r}, {wanted!r} is wanted; give another out")
    return ranked


def _rank(parser: Parser, config: Namespace, space: Space) -> list[dict[str, Any]]:
    """Draw students of the budget, and score each by all rankings."""
    fabric = fabric_of(config, devices=1, precision=config["trainer"]["precision"] or "32-true")
    seed = config["search_seed"]
    # the super-student's weights and dropout
    fabric.seed_everything(seed, verbose=False)
    config["trainer"].update(Namespace(logger=False, enable_checkpointing=False))
    trainer, module, data = build(parser, config, [])
    module.check_teachers(trainer, "fit")
    if "relations" in config["rankings"]:
        name = module.teachers.only("rankings: relations")
        module.teachers.single("rankings: relations", name)
    shared = SuperStudent(module) if "shared" in config["rankings"] else None
    data.prepare_data()
    data.setup("fit")
    if data.split_rows("test") is None:
        raise UserError(f"{data.absence('test')}, and search compares the rankings with test accuracy")
    module.to(fabric.device)
    whole, task = module.student, answer_task(module.tasks).name
    batch, asked = (fabric.to_device(next(iter(own()))) for own in (data.train_dataloader, data.val_dataloader))
    teacher = module.step(batch).teacher(name) if "relations" in config["rankings"] else None

    times: dict[str, float] = {}

    def time_of(shape: Shape) -> float:
        # once: another time may be beyond the budget
        if (known := name_of(shape)) not in times:
            times[known] = milliseconds(random_student(whole, shape, seed), asked, task)
        return times[known]

    unit, cost = ("parameters", partial(parameters, whole)) if config["max_ms"] is None else ("ms", time_of)
    shapes = Budget(config[f"max_{unit}"], config["at_least"], unit).draw(space, config["candidates"], seed, cost)
    ranked: list[dict[str, Any]] = []
    with ticker("Scoring", len(shapes), unit=" students") as advance:
        for shape in shapes:
            row: dict[str, Any] = {
                "name": name_of(shape),
                "shape": shape,
                "parameters": parameters(whole, shape),
                "ms": time_of(shape),
            }
            if teacher is not None:
                make = partial(random_student, whole, shape, from_scratch=config["model"]["init_args"]["from_scratch"])
                row |= scores(teacher, make, range(seed, seed + config["initialisations"]), batch)
            ranked.append(row)
            advance(1)
    if shared is None:
        return ranked
    with ticker("Shared weights", config["shared_steps"], unit=" steps") as advance:
        shared.train(
            config["shared_steps"],
            _windows(data, config["trainer"]["accumulate_grad_batches"]),
            [space.largest, space.smallest, *shapes],
            seed,
            clip=config["trainer"]["gradient_clip_val"],
            autocast=fabric.autocast,
            advance=advance,
        )
    for row in ranked:
        row["shared"] = shared.validation_loss(row["shape"], data.val_dataloader())
    return ranked


def _windows(data: RationaleDataModule, size: int) -> Iterator[list[TaskBatch]]:
    """The micro-batches of one optimizer step after another, epoch after epoch."""
    window: list[TaskBatch] = []
    for epoch in count():
        loader: Any = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            window.append(batch)
            if len(window) == size:
                yield window
                window = []


def choose(ranked: Sequence[Mapping[str, Any]], own: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """The names of the best students, and of those that are drawn among all."""
    order = sorted(ranked, key=lambda row: goodness(row, own["by"]), reverse=True)
    draw = random.Random(f"{own['search_seed']} trained")  # noqa: S311 - no secret
    drawn = draw.sample([row["name"] for row in ranked], own["drawn"])
    return {row["name"] for row in order[: own["best"]]}, set(drawn)


def goodness(row: Mapping[str, Any], ranking: str) -> float:
    """A student's score in a ranking; higher is better."""
    return -float(row[ranking]) if ranking == "shared" else float(row[ranking])


def correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Kendall's tau-b and Spearman's rho of each ranking with accuracy; ``None`` where one of both is constant."""
    found: dict[str, dict[str, float | None]] = {}
    accuracy = torch.tensor([row["accuracy"] for row in rows], dtype=torch.float64)
    for ranking in (name for name in _FORMATS if rows and name in rows[0] and name != "ms"):
        scores = torch.tensor([goodness(row, ranking) for row in rows], dtype=torch.float64)
        varies = min(len(scores.unique()), len(accuracy.unique())) > 1
        found[ranking] = {
            "kendall": float(cast(Tensor, kendall_rank_corrcoef(scores, accuracy))) if varies else None,
            "spearman": float(spearman_corrcoef(scores, accuracy)) if varies else None,
            "n": len(rows),
        }
    return found


def _write_student(folder: Path, whole: Student, shape: Shape) -> None:
    """Write a student's configuration and tokenizer, unless they are there."""
    if folder.exists():
        return
    with atomic_folder(folder) as made:
        save_description(config_of(whole, shape), whole.tokenizer, made)


def cell_of(base: Mapping[str, Any], folder: Path, student: Path) -> Cell:
    """The run of ``fit`` that trains a student."""
    config = merge(base, {"model": {"init_args": {"student": str(student)}}}, accepted_arguments)
    return Cell(folder.name, folder, with_location(config | {"baseline_after_fit": False}, folder))


def render(found: Mapping[str, Any]) -> None:
    """Print the students, the best first, and the correlations."""
    rows = sorted(found["students"], key=lambda row: goodness(row, found["by"]), reverse=True)
    columns = {name: form for name, form in _FORMATS.items() if name in rows[0]}
    table = console_table(f"students, the best by {found['by']} first", ["student", "trained"], [*columns, "accuracy"])
    for row in rows:
        trained = " ".join(kind for kind in ("best", "drawn") if row[kind])
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        table.add_row(row["name"], trained, *(f"{row[name]:{form}}" for name, form in columns.items()), accuracy)
    told = console_table("correlations with test accuracy", ["ranking"], ["Kendall", "Spearman", "n"])
    for ranking, own in found["correlations"].items():
        both = ["none" if own[name] is None else f"{own[name]:+.2f}" for name in ("kendall", "spearman")]
        told.add_row(ranking, *both, str(own["n"]))
    console = Console()
    console.print(table)
    console.print(told)
    console.print("A score that does not beat the number of parameters has found nothing.")
