"""The same grid as a W&B sweep, for agents on many machines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_distill.experiments.cells import CONFIG, Cell
from lit_distill.experiments.grid import Grid
from lit_distill.experiments.keys import config_value, settings, targets

FILE = "sweep.yaml"

PROJECT = "lit_distill"
"""Of the runs in W&B."""


def make_sweep(grid: Grid, cells: Sequence[Cell], out: Path) -> tuple[dict[str, Any], str]:
    """A sweep that runs the cells of a grid.

    A plain product of axes is one of parameters, by the keys of ``fit``. What no product can say (``cells``, ``when``,
    values that are no texts or numbers) is one parameter, ``config``, over the cells' own files.

    Args:
        grid: it.
        cells: its cells, laid out in ``out``.
        out: the experiment's folder.

    Returns:
        The content of the file, and a comment for its beginning.
    """
    agents = f"# wandb sweep {out / FILE}; then, on each machine, in this folder: wandb agent ENTITY/{PROJECT}/SWEEP"
    added = "+="
    product = not grid.cells and not grid.when and all(_is_plain(v) for values in grid.axes.values() for v in values)
    parameters: dict[str, Any]
    if product:
        parameters = {key: value for axis, values in grid.axes.items() for key, value in _parameter(axis, values)}
        base = [f"--config={path}" for path in grid.base]
        fixed = [f"--{key}={_text(value)}" for key, value in _fixed(grid)]
        # without a logger of its own, a run has none to which W&B's could be added
        given, added = [*base, *fixed], "="
        comment = (
            f"{agents}\n# Each combination is a cell; its run lies where `fit` puts it, not in {out}, which only the"
            " experiment command fills."
        )
    else:
        parameters = {"config": {"values": [str(cell.folder / CONFIG) for cell in cells]}}
        given = []
        comment = (
            f"{agents}\n# This grid is no product of keys (cells, when, or a value that is no text or number): the one"
            f" parameter is the cell's own\n# config, so that every machine has to see {out}. Runs lie in their cells'"
            " folders."
        )
    logger = [f"--trainer.logger{added}WandbLogger", f"--trainer.logger.project={PROJECT}"]
    logger.append(f"--trainer.logger.save_dir={out}")
    sweep = {
        "name": out.name,
        "project": PROJECT,
        "method": "grid",
        "metric": {"name": "test/accuracy", "goal": "maximize"},
        "program": "lit_distill",
        "command": ["${env}", "${interpreter}", "-m", "${program}", "fit", *given, "${args}", *logger],
        "parameters": parameters,
    }
    return sweep, comment


def sweep_text(sweep: Mapping[str, Any], comment: str) -> str:
    """The file's content."""
    return f"{comment}\n{yaml.safe_dump(dict(sweep), sort_keys=False, allow_unicode=True, width=1000)}"


def _parameter(axis: str, values: Sequence[Any]) -> list[tuple[str, dict[str, Any]]]:
    if len(targets(axis)) == 1:
        return [(targets(axis)[0], {"values": [config_value(axis, value) for value in values]})]
    # two keys of one value: a small config of their own, as --config takes it
    return [("config", {"values": [json.dumps(settings({axis: value})) for value in values]})]


def _fixed(grid: Grid) -> list[tuple[str, Any]]:
    """What is set in all cells; classes before their arguments."""
    found = [(target, config_value(key, value)) for key, value in grid.fixed.items() for target in targets(key)]
    return sorted(found, key=lambda one: not one[0].endswith("class_path"))


def _text(value: Any) -> str:  # noqa: ANN401 - whatever YAML holds
    return value if isinstance(value, str) else json.dumps(value)


def _is_plain(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, str | int | float) and not isinstance(value, bool)
