"""``experiment``: the runs of a grid, each with a config and a folder of its own, each run once."""

import copy
import fnmatch
import os
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from rich.console import Console
from rich.table import Table

# these two make data modules and methods known by their bare names
import lit_distill.data
import lit_distill.modules  # noqa: F401
from lit_distill.commands import train
from lit_distill.commands.parser import import_class
from lit_distill.errors import UserError
from lit_distill.experiments.cells import Cell, State, check_record, lay_out, record_of, written_config
from lit_distill.experiments.grid import Grid, read_grid
from lit_distill.experiments.keys import merge, settings, without_own
from lit_distill.experiments.launchers import Launcher, Local
from lit_distill.experiments.names import cell_name
from lit_distill.experiments.progress import Progress, counts, failure_lines, summary_table
from lit_distill.experiments.schedule import Board, look, run_cells
from lit_distill.experiments.slurm import Slurm
from lit_distill.experiments.sweep import FILE, make_sweep, sweep_text
from lit_distill.experiments.verdict import judge, verdict_table
from lit_distill.files import flatten, write_text
from lit_distill.messages import known_subclasses
from lit_distill.reading import parse_yaml, read_small
from lit_distill.records import RunRecord
from lit_distill.shipped import find_config

_BASES = ("lit_distill.modules.base.DistillModule", "lit_distill.data.base.RationaleDataModule")


def experiment(
    config: str | Path,
    out: str | Path | None = None,
    launcher: Literal["local", "slurm", "print"] = "local",
    jobs: int | None = None,
    only: str | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
    slurm: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run every cell of a grid once; what is done already is not run again, whatever ended the job that ran it.

    A cell's folder holds ``fit.yaml``, which ``fit --config`` runs alone, and what the run leaves. Several of these
    commands may fill one folder, on one machine or on many that share it.

    Args:
        config: the grid: ``base`` (configs of fit), ``set`` (keys that are the same in all cells), ``grid`` (key -> its
            values), ``cells`` (explicit cells, each of which is combined with the grid), ``when`` (what is set where
            ``if`` holds).
        out: folder of the cells; by default as the grid says, else ``runs/<name of the grid>``.
        launcher: ``local`` runs processes on this machine, ``slurm`` submits jobs, ``print`` writes the configs and
            prints the commands, one a line.
        jobs: cells at a time: by default 1 on this machine, where several share the GPUs by turns and the cores, and
            all on a cluster.
        only: run the cells whose names match this pattern, as in ``*-seed0``.
        retry_failed: also run cells that failed before; they go on from their last checkpoint.
        dry_run: list the cells and where they stand; write nothing.
        slurm: arguments of submitit's ``executor.update_parameters``, as in ``--slurm.slurm_partition gpu``.

    Returns:
        The number of cells in each state, each cell's state, and the verdicts on published figures.

    Raises:
        UserError: something in the grid, or in a cell's config, is wrong; no cell has been run, and nothing written.
    """
    grid = read_grid(config)
    folder = Path(out or grid.out or Path("runs") / Path(config).stem)
    _check_out(folder)
    check = FitCheck.make()
    cells = _cells(grid, folder, check)
    if only is not None:
        cells = [cell for cell in cells if fnmatch.fnmatchcase(cell.name, only)]
        if not cells:
            raise UserError(f"only: no cell's name matches {only!r}; --dry_run lists them")
    _refuse_other_runs(cells, check)
    board = look(cells, retry_failed=retry_failed)
    if dry_run:
        _list(board, grid, folder)
        return _summary(board, grid)
    started = None if launcher == "print" else _launcher(launcher, folder, jobs, slurm)
    _lay_out(board, retry_failed=retry_failed)
    if only is None:
        try:
            write_text(folder / FILE, sweep_text(*make_sweep(grid, cells, folder)))
        except OSError as error:
            raise UserError(f"out: {folder} cannot be written ({error.strerror})") from error
    if started is None:
        for cell in cells:
            if board.states[cell.name] is State.PENDING:
                print(cell.line)
        print(f"{folder}: {counts(board)}", file=sys.stderr)
        return _summary(board, grid)
    with Progress() as progress:
        ended = run_cells(board, started, progress)
    _report(board, grid)
    return _summary(board, grid) | {"interrupted": not ended}


class FitCheck(train.DistillCLI):
    """``fit`` without a run: says of a config what ``fit`` would say of it before it reads weights or data."""

    @classmethod
    def make(cls) -> "FitCheck":
        """Build ``fit``'s own parser, once for all cells."""
        # the very parser of `fit`, with all of its defaults
        made = train.run_trainer(["fit"], cli=cls)
        assert isinstance(made, cls)  # noqa: S101 - for the type
        return made

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Nothing is parsed yet."""
        self.config = Namespace(subcommand="fit")

    def _parse_ckpt_path(self) -> None:
        """As yet there are no runs."""

    def _set_seed(self) -> None:
        """This process draws nothing."""

    def before_instantiate_classes(self) -> None:
        """Nothing is settled yet."""

    def instantiate_classes(self) -> None:
        """Nothing is built."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""

    def parsed(self, config: Mapping[str, Any]) -> Namespace:
        """A config as ``fit`` reads it.

        Raises:
            UserError: ``fit`` would refuse it.
        """
        with warnings.catch_warnings():
            # what this process was started with is not what is parsed
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within")
            super().parse_arguments(self._parser("fit"), copy.deepcopy(dict(config)))
        found: Namespace = self.config
        self.config = Namespace(subcommand="fit", fit=found)
        threads = torch.get_num_threads()
        try:
            self._settle()
        finally:
            torch.set_num_threads(threads)
        _try_classes(found)
        return found

    def plain(self, parsed: Namespace) -> dict[str, Any]:
        """A parsed config as a run saves it."""
        content: dict[str, Any] = yaml.safe_load(self._parser("fit").dump(parsed, skip_unset=False))
        return content


class _NoStudent(str):
    """Ends a method's constructor where the student would be loaded: its arguments have been checked by then."""

    class Reached(Exception):
        """All was well so far."""

    def __str__(self) -> str:
        raise self.Reached


def _try_classes(config: Namespace) -> None:
    """Have our own classes check their arguments; constructors of others may do anything, and are left to ``fit``."""
    for group in ("data", "model"):
        found = import_class(config[group]["class_path"])
        if not found.__module__.startswith("lit_distill."):
            continue
        arguments = config[group]["init_args"].as_dict()
        try:
            found(**arguments | ({"student": _NoStudent("")} if group == "model" else {}))
        except _NoStudent.Reached:
            continue


def accepted_arguments(class_path: str) -> Collection[str] | None:
    """The names of the arguments of a method or dataset, with those of the classes below it; ``None`` if unknown."""
    known = {name: found for base in _BASES for name, found in known_subclasses(base).items()}
    found = known.get(class_path)
    if found is None:
        try:
            found = import_class(class_path)
        except (ImportError, AttributeError, ValueError):
            return None
    return {
        name
        for klass in found.__mro__
        if "__init__" in vars(klass) and klass is not object
        for name, parameter in signature(vars(klass)["__init__"]).parameters.items()
        if parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY) and name != "self"
    }


# ---------------------------------------------------------------------- from a grid to its cells


def _check_out(folder: Path) -> None:
    """A folder, or where one can be."""
    try:
        there = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), None)
        folder.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise UserError(f"out: {str(folder)!r} cannot be a folder ({getattr(error, 'strerror', error)})") from error
    if any(len(os.fsencode(part)) > 255 for part in folder.parts):
        raise UserError(f"out: {str(folder)!r} cannot be a folder, as a name in it is too long")
    if there is not None and not there.is_dir():
        raise UserError(f"out: {str(folder)!r} cannot be a folder, as {there} is none")


def _cells(grid: Grid, folder: Path, check: FitCheck) -> list[Cell]:
    """The cells, each of which ``fit`` would take."""
    base: dict[str, Any] = {}
    for path in grid.base:
        base = merge(base, _read(path), accepted_arguments)
    cells = []
    shapes: dict[str, str] = {}
    seen: dict[tuple[str, Any], str] = {}
    for point in grid.points():
        name, seed = cell_name(point), point.get("seed")
        config = merge(base, settings(grid.settings(point)), accepted_arguments)
        # of cells that differ in nothing but their seed, one is parsed
        like = config if seed is None else merge(config, settings({"seed": 0}), accepted_arguments)
        shape = repr(like)
        if shape not in shapes:
            try:
                parsed = check.parsed(_with_folder(like, folder / name))
            except UserError as error:
                raise UserError(f"{error} (in the cell {name} of {grid.path})") from error
            shapes[shape] = repr(without_own(parsed.as_dict()))
        same = seen.setdefault((shapes[shape], seed), name)
        if same != name:
            raise UserError(f"grid: the cells {same} and {name} are the same run (in {grid.path})")
        cells.append(Cell(name, folder / name, point, _with_folder(config, folder / name)))
    return cells


def _read(path: str) -> dict[str, Any]:
    path = find_config(path, "base")
    try:
        content = parse_yaml(read_small(path))
    except (OSError, ValueError) as error:
        raise UserError(f"base: {path!r} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"base: {path!r} must hold keys with values")
    return content


def _with_folder(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A config whose run lies in a folder of its own, and goes on there."""
    for name in ("trainer", "checkpoint"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise UserError(f"{name} must hold keys with values, got {config[name]!r}")
    trainer = dict(config.get("trainer") or {})
    given = trainer.get("logger")
    others = [one for one in (given if isinstance(given, list) else [given]) if not isinstance(one, bool | None)]
    own = {"save_dir": str(folder.parent), "name": folder.name, "version": ""}
    trainer["logger"] = [
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": own},
        *(one for one in others if not _is_csv(one)),
    ]
    checkpoint = {**(config.get("checkpoint") or {}), "dirpath": str(folder / "checkpoints")}
    kept = {key: value for key, value in config.items() if key != "ckpt_path"}
    return {**kept, "trainer": trainer, "checkpoint": checkpoint, "resume": True}


def _is_csv(logger: Any) -> bool:  # noqa: ANN401 - whatever YAML holds
    name = logger.get("class_path", "") if isinstance(logger, Mapping) else logger
    return str(name).rpartition(".")[2] == "CSVLogger"


def _refuse_other_runs(cells: Sequence[Cell], check: FitCheck) -> None:
    """A folder with a finished run of another config, or one that cannot be told, is not taken for the cell's."""
    for cell in cells:
        check_record(cell.folder)
        record = record_of(cell.folder)
        if record is not None and (key := _difference(cell, record, check)):
            raise UserError(
                f"{cell.folder}: holds a finished run of another config ({key}); move it away, or give another out"
            )


def _difference(cell: Cell, record: RunRecord, check: FitCheck) -> str | None:
    """The first key in which a finished run differs from what is wanted, of all that either config says."""
    wanted = check.plain(check.parsed(cell.config))
    for key in flatten(without_own(written_config(cell) or {})) | flatten(without_own(cell.config)):
        found, given = _at(record.config, key), _at(wanted, key)
        if found != given:
            return f"{key}: {found!r} there, {given!r} wanted"
    return None


def _at(config: Mapping[str, Any], key: str) -> Any:  # noqa: ANN401 - whatever YAML holds
    place: Any = config
    for name in key.split("."):
        place = place.get(name) if isinstance(place, Mapping) else None
    return place


# ---------------------------------------------------------------------- from cells to runs


def _launcher(name: str, folder: Path, jobs: int | None, slurm: Mapping[str, Any] | None) -> Launcher:
    if name == "slurm":
        return Slurm(folder / ".submitit", jobs, slurm)
    return Local(1 if jobs is None else jobs, _devices())


def _devices() -> list[str]:
    """The GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` has them."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(i) for i in range(count)]


def _lay_out(board: Board, *, retry_failed: bool) -> None:
    """Write the configs of the cells that are not done."""
    for cell in board.cells:
        if board.states[cell.name] is State.DONE:
            continue
        aside = lay_out(cell)
        if aside is not None:
            print(f"{cell.name}: its config was edited; what was tried with the old one lies in {aside}")
    board.states.update(look(board.cells, retry_failed=retry_failed).states)


def _list(board: Board, grid: Grid, folder: Path) -> None:
    print(f"{grid.path}: {len(board.cells)} cells in {folder}")
    table = Table()
    table.add_column("cell", overflow="fold")
    table.add_column("state")
    for cell in board.cells:
        table.add_row(cell.name, board.states[cell.name])
    Console().print(table)
    print(counts(board))


def _report(board: Board, grid: Grid) -> None:
    console = Console()
    console.print(summary_table(board))
    for line in failure_lines([cell for cell in board.cells if board.states[cell.name] is State.FAILED]):
        print(line)
    if grid.published:
        console.print(verdict_table(judge(grid, board.cells)))
        count = len(grid.points())
        if len(board.cells) < count:
            print(f"Looked at {len(board.cells)} of the grid's {count} cells.")
    if grid.deviations:
        print("Deviations from what was published:")
        for text in grid.deviations:
            print(f"- {' '.join(text.split())}")


def _summary(board: Board, grid: Grid) -> dict[str, Any]:
    return {
        **{str(state): board.count(state) for state in State},
        "cells": {cell.name: str(board.states[cell.name]) for cell in board.cells},
        "verdicts": {one.what: one.verdict for one in judge(grid, board.cells)},
    }
