"""``experiment``: run the cells of a grid, each with its own config and folder."""

import copy
import fnmatch
import os
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from rich.console import Console

# these make data modules, methods and objectives known by their class names
import lit_distill.data
import lit_distill.modules  # noqa: F401
from lit_distill.commands.parser import Parser, constructor_arguments
from lit_distill.commands.settings import parse_settings, settle
from lit_distill.commands.train import train_parser
from lit_distill.errors import UserError
from lit_distill.experiments.cells import Cell, State
from lit_distill.experiments.grid import Grid, as_list, cell_name, fit_keys, merge, nested, read_grid
from lit_distill.experiments.launch import Board, Local, Slurm, run_cells
from lit_distill.experiments.report import SWEEP, counts, show_event, summary_table, sweep_text
from lit_distill.files import write_text
from lit_distill.messages import known_subclasses
from lit_distill.objectives import build_objective
from lit_distill.reading import parse_yaml, read_small
from lit_distill.records import read_record
from lit_distill.shipped import find_config
from lit_distill.teachers.frozen import about, check_place

_BASES = (
    "lit_distill.modules.base.DistillModule",
    "lit_distill.data.student.StudentDataModule",
    "lit_distill.objectives.base.Objective",
)


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
    """Run every cell of a grid once; finished cells are skipped.

    A cell's folder has ``fit.yaml``, which ``fit --config`` can run alone, and the files of the run. Several of these
    commands may share a folder, on one machine or many.

    Args:
        config: the grid: ``base`` (configs of fit), ``set`` (keys for all cells), ``grid`` (key -> values), ``cells``
            (explicit cells, each combined with the grid), ``when`` (``set`` for cells that match ``if``). The key
            ``overlay`` lays another config over the base, as in ``overlay: method/kl``.
        out: folder of the cells; by default that of the grid file, else ``runs/<name of the grid>``.
        launcher: ``local`` starts processes on this machine, ``slurm`` submits jobs, ``print`` writes the configs and
            prints one command per line.
        jobs: cells at a time: by default 1 on this machine (several share cores and take turns on GPUs), all on a
            cluster.
        only: run cells whose names match this pattern, such as ``*-seed0``.
        retry_failed: also run failed cells; they resume from their last checkpoint.
        dry_run: list the cells and their states; write nothing.
        slurm: arguments of submitit's ``executor.update_parameters``, such as ``--slurm.slurm_partition gpu``.

    Returns:
        The number of cells in each state, each cell's state, and the verdicts on published results.

    Raises:
        UserError: the grid or a cell's config is invalid; nothing has been run or written.
    """
    grid = read_grid(config)
    folder = Path(out or grid.out or Path("runs") / Path(config).stem)
    cells = _cells(grid, folder, str(config))
    if only is not None:
        cells = [cell for cell in cells if fnmatch.fnmatchcase(cell.name, only)]
        if not cells:
            raise UserError(f"only: no cell's name matches {only!r}; --dry_run lists them")
    # made first, as it checks its arguments
    local = local_launcher(jobs)
    try:
        board = {cell: _state(cell) for cell in cells}
        for cell, state in board.items():
            if state is not State.DONE:
                _check_teachers(cell, str(config))
        if dry_run:
            Console().print(summary_table(board))
            return _summary(board)
        started = Slurm(folder / ".submitit", jobs, slurm) if launcher == "slurm" else local
        for cell in cells:
            if board[cell] is not State.DONE:
                cell.lay_out(retry_failed=retry_failed)
            board[cell] = cell.state
        if only is None:
            write_text(folder / SWEEP, sweep_text(cells, folder))
    except OSError as error:
        raise UserError(f"out: {str(folder)!r} cannot be used as a folder ({error.strerror})") from error
    if launcher == "print":
        for cell in cells:
            if board[cell] is State.PENDING:
                print(cell.line)
        print(f"{folder}: {counts(board)}", file=sys.stderr)
        return _summary(board)
    ended = run_cells(board, started, show_event)
    Console().print(summary_table(board))
    for cell, state in board.items():
        if state is State.FAILED:
            print(f"{cell.name}: {cell.failure}")
    verdicts = {}
    if grid.tolerance is not None and State.DONE in board.values():
        verdicts = judge(folder, grid.tolerance)
    if grid.deviations:
        print("Deviations from what was published:")
    for text in grid.deviations:
        print(f"- {' '.join(text.split())}")
    return _summary(board) | {"verdicts": verdicts, "interrupted": not ended}


def local_launcher(jobs: int | None) -> Local:
    """Starts cells on this machine, on all GPUs in turn that it may use."""
    devices = [str(i) for i in range(torch.cuda.device_count())]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        devices = visible.split(",")[: len(devices)]
    return Local(1 if jobs is None else jobs, devices)


def judge(folder: Path, tolerance: float) -> dict[str, str]:
    """Whether each setting's mean accuracy is as published, within percentage points; prints it, too."""
    # pandas takes a second to import
    from lit_distill.comparison.comparing import compare_runs
    from lit_distill.comparison.report import number, with_error
    from lit_distill.comparison.runs import find_runs

    comparison = compare_runs(*find_runs([folder]), allow_different_tests=True)
    metric, verdicts = comparison.metric, {}
    for row in comparison.settings.dropna(subset="published").to_dict("records"):
        difference = 100 * (row["mean"] - row["published"])
        verdict = "above" if difference > 0 else "below"
        # 63.29 and 3.1 are not exact in binary
        if abs(difference) <= tolerance + 1e-9:
            verdict = f"within {tolerance:g} points"
        verdicts[row["name"]] = verdict
        measured = with_error(number(row["mean"], metric), row["error"], metric)
        published = number(row["published"], metric)
        print(f"{row['name']}: {measured} ({row['n']} seeds), published {published}: {verdict}")
    return verdicts


def check_config(parser: Parser, config: Mapping[str, Any]) -> Namespace:
    """A config as ``fit`` parses it. Raises a ``UserError`` if ``fit`` would refuse it before it reads anything."""
    found = parse_settings(parser, copy.deepcopy(dict(config)))
    settle(found, "fit")
    _try_classes(found)
    return found


class _StudentReached(Exception):
    """All other arguments of a method have passed."""


class _NoStudent(str):
    """Stops a method's constructor before the student is loaded, after its arguments are checked."""

    def __str__(self) -> str:
        raise _StudentReached


def _try_classes(config: Namespace) -> None:
    """Let our own classes check their arguments; those of others run in ``fit`` only, as they may have side effects."""
    for group, instead in (("data", {}), ("model", {"student": _NoStudent("")})):
        found, arguments = resolve_name(config[group]["class_path"]), config[group]["init_args"].as_dict() | instead
        if found.__module__.startswith("lit_distill."):
            if given := arguments.get("objectives"):
                own = [each for each in given if each["class_path"].startswith("lit_distill.")]
                arguments["objectives"] = [build_objective(each) for each in own]
            with suppress(_StudentReached):
                found(**arguments)


def accepted_arguments(class_path: str) -> Collection[str] | None:
    """The argument names of a method, dataset or objective, with those of its base classes; ``None`` if unknown."""
    known = {name: found for base in _BASES for name, found in known_subclasses(base).items()}
    try:
        return constructor_arguments(known.get(class_path) or resolve_name(class_path)).keys()
    except (ImportError, AttributeError, ValueError):
        return None


def _cells(grid: Grid, folder: Path, path: str) -> list[Cell]:
    """The cells, after checking that ``fit`` accepts each."""
    parser = train_parser("fit")
    base: dict[str, Any] = {}
    for name in grid.base:
        base = merge(base, _read(name, "base"), accepted_arguments)
    cells: list[Cell] = []
    checked = set()
    for point in grid.points():
        name = cell_name(point)
        try:
            settings = grid.settings(point)
            laid = str(settings.pop("overlay", ""))
            overlay = {**_read(laid, "overlay"), "variant": Path(laid).stem} if laid else {}
            config = merge(merge(base, overlay, accepted_arguments), nested(settings), accepted_arguments)
            # check one of the cells that differ only in their seed
            like = config if "seed" not in point else merge(config, nested(fit_keys({"seed": 0})), accepted_arguments)
            if repr(like) not in checked:
                check_config(parser, with_location(like, folder / name))
                checked.add(repr(like))
        except UserError as error:
            raise UserError(f"{error} (in the cell {name} of {path})") from error
        cells.append(Cell(name, folder / name, with_location(config, folder / name)))
    return cells


def _check_teachers(cell: Cell, path: str) -> None:
    """Raise a ``UserError`` if a cell's teacher is not there, such as a run that is still to be made."""
    try:
        check_teachers(cell.config["model"].get("init_args", {}).get("teachers") or {})
    except UserError as error:
        raise UserError(f"{error} (in the cell {cell.name} of {path})") from error


def check_teachers(teachers: Mapping[str, Any]) -> None:
    """Raise a ``UserError`` if one of a model's teachers is not there."""
    for teacher, settings in teachers.items():
        with about(f"teachers: {teacher}"):
            for name in as_list(settings["model"]):
                check_place(name)


def _read(given: str, key: str) -> dict[str, Any]:
    path = find_config(given, key)
    try:
        content = parse_yaml(read_small(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path!r} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{key}: {path!r} must hold keys with values")
    return content


def with_location(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A config that runs in a folder of its own, and resumes there."""
    trainer, checkpoint = config.get("trainer") or {}, config.get("checkpoint") or {}
    if not isinstance(trainer, Mapping) or not isinstance(checkpoint, Mapping):
        # fit says what is wrong
        return dict(config)
    own = {"save_dir": str(folder.parent), "name": folder.name, "version": ""}
    given = [logger for logger in as_list(trainer.get("logger")) if not isinstance(logger, bool | None)]
    paths = [logger.get("class_path") if isinstance(logger, Mapping) else logger for logger in given]
    others = [logger for logger, path in zip(given, paths, strict=True) if not str(path).endswith("CSVLogger")]
    return {
        **{key: value for key, value in config.items() if key != "ckpt_path"},
        "trainer": {**trainer, "logger": [{"class_path": "CSVLogger", "init_args": own}, *others]},
        "checkpoint": {**checkpoint, "dirpath": str(folder / "checkpoints")},
        "resume": True,
    }


def _state(cell: Cell) -> State:
    """The state of a cell whose folder holds no run of another config."""
    state = cell.state
    if state is State.DONE:
        try:
            read_record(cell.folder)
        except UserError as error:
            raise UserError(f"{error}; move it away to run the cell again") from error
    cell.check_folder()
    return state


def _summary(board: Board) -> dict[str, Any]:
    cells = {cell.name: str(state) for cell, state in board.items()}
    return {str(state): list(cells.values()).count(state) for state in State} | {"cells": cells}
