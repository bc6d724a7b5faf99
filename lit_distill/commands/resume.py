"""``--resume`` and ``--ckpt_path``: find the run and the checkpoint to go on with."""

import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lit_distill.commands.loggers import METRICS, fixed_folder, logger_folder, logger_root, loggers_of
from lit_distill.errors import UserError
from lit_distill.experiments.grid import differences
from lit_distill.files import flatten
from lit_distill.reading import parse_yaml
from lit_distill.records import RECORD
from lit_distill.students import read_config

CONFIG = "config.yaml"
"""A run's whole config, in its folder."""

_NOT_THE_RESULT = {
    "resume", "predictions", "trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.enable_model_summary",
    # a checkpoint keeps what it was trained with
    "model.init_args.fast",
    # gone, but in the configs of runs that an earlier version began
    "model.init_args.compile", "model.init_args.evaluate_losses", "data.init_args.pad_to_multiple_of",
}  # fmt: skip
"""Keys without effect on results, besides those of the location."""

_TRAINED_WITH = re.compile(
    r"seed_everything$|data\.class_path$"
    r"|data\.init_args\.(label_source|train_fraction|rationale_filter|rationale_pairing|seed)\b"
    r"|model\.init_args\.(student|learning_rate|weight_decay|lr_schedule|warmup_steps|dropout|dtype|objectives)\b"
)
"""Keys of a config that a checkpoint's training must share, besides the method's own arguments."""


def check_checkpoint(path: str | Path) -> None:
    """Raise a ``UserError`` unless a path is a whole checkpoint: a file, or the folder of a sharded one."""
    file, fault = Path(path), None
    if not file.exists():
        fault = "is not there"
    elif file.is_dir():
        # the files of FSDP's and of DeepSpeed's sharded checkpoints
        if not any((file / name).exists() for name in ("meta.pt", "latest")):
            fault = "is a folder, and no sharded checkpoint"
    elif file.suffix != ".ckpt":
        fault = "does not end in .ckpt"
    elif (damage := _damage(file)) is not None:
        fault = f"is damaged ({damage})"
    else:
        try:
            read_config(path)
        except UserError as error:
            fault = f"is no checkpoint of lit_distill ({error})"
    if fault is not None:
        raise UserError(f"ckpt_path: {str(path)!r} {fault}; allowed is a checkpoint of a run")


def _damage(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as file:
            part = file.testzip()
    except (zipfile.BadZipFile, RuntimeError, EOFError):
        # its index is at the end
        return f"cut off at {path.stat().st_size} bytes"
    return None if part is None else f"{part} is not what was written"


def read_progress(checkpoint: str | Path | None) -> dict[str, Any]:
    """The progress in a checkpoint, without loading weights; empty if there is none."""
    if checkpoint is not None and Path(checkpoint).is_dir():
        checkpoint = Path(checkpoint) / "meta.pt"
    if checkpoint is None or not Path(checkpoint).is_file():
        return {}
    return dict(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True))


def find_run(config: Namespace, plain: Mapping[str, Any]) -> Path | None:
    """The folder of the run that ``fit`` goes on with; ``None`` if a new one begins.

    With ``resume``, ``ckpt_path`` becomes the newest checkpoint of the run with the same ``plain`` config; the command
    ends with code 0 if that run is finished. All processes of a distributed run decide from files that do not change
    before all have joined.
    """
    path, folder = config["ckpt_path"], fixed_folder(config)
    if not config["resume"]:
        own = folder is not None and path is not None and Path(path).absolute().is_relative_to(folder.absolute())
        return folder if own and folder is not None and not (folder / RECORD).exists() else None
    config["resume"] = False
    if (run := _newest_run(config, plain)) is None:
        return None
    folder, checkpoint = run
    if (folder / RECORD).exists():
        # for restarted jobs
        rank_zero_only(print)(f"--resume: this run is finished: {folder}")
        raise SystemExit(0)
    config["ckpt_path"] = None if checkpoint is None else str(checkpoint)
    rank_zero_info(f"--resume: going on with {folder} from {checkpoint or 'its beginning'}")
    return folder


def _newest_run(config: Namespace, plain: Mapping[str, Any]) -> tuple[Path, Path | None] | None:
    """Folder and newest intact checkpoint of the newest run with this configuration."""
    if (fixed := fixed_folder(config)) is not None:
        folders = [fixed]
    elif loggers := loggers_of(config):
        folders = sorted(logger_root(loggers[0]).glob("*"))
    else:
        folders = [Path(config["trainer"]["default_root_dir"] or ".")]
    found, hint = [], ""
    for folder in (folder for folder in folders if (folder / CONFIG).is_file()):
        try:
            there = parse_yaml((folder / CONFIG).read_bytes())
        except ValueError as error:
            raise UserError(f"resume: {folder / CONFIG} is damaged ({error}); move the run away") from error
        differing = sorted(differences(there, plain).keys() - _NOT_THE_RESULT)
        if not differing:
            found.append((folder, _newest_checkpoint(folder, config)))
        elif not (folder / RECORD).exists():
            hint = f"; the unfinished {folder} differs in {', '.join(differing[:3])}"
    if found:
        return max(found, key=lambda run: (run[1] or run[0] / CONFIG).stat().st_mtime)
    rank_zero_info(f"--resume: no earlier run of this configuration{hint}. A new one begins.")
    return None


def _newest_checkpoint(folder: Path, config: Namespace) -> Path | None:
    """The checkpoint of the latest step, as times change when a folder is copied."""
    whole: list[Path] = []
    for path in Path(config["checkpoint"]["dirpath"] or folder / "checkpoints").glob("*.ckpt"):
        try:
            check_checkpoint(path)
            whole.append(path)
        except UserError as error:
            rank_zero_warn(f"--resume: passed over: {error}")
    return max(whole, key=lambda path: (read_progress(path).get("global_step", 0), path.stat().st_mtime), default=None)


def check_unused(config: Namespace, *, fit: bool) -> None:
    """Refuse to overwrite an earlier run. Raises a ``UserError`` that names its folder."""
    places = [(folder, METRICS) for folder in map(logger_folder, loggers_of(config))]
    if fit:
        places += [(fixed_folder(config), name) for name in (RECORD, CONFIG)]
    for folder, name in places:
        if folder is not None and (folder / name).exists():
            finished = (folder / RECORD).exists()
            kind = "a finished run" if finished else f"an earlier run ({name})"
            go_on = "" if finished or not fit else "go on with it by --resume, or "
            raise UserError(f"{folder}: holds {kind}; {go_on}move it away, or give another folder")


def check_training(plain: Mapping[str, Any], trained: Mapping[str, Any], shared: Collection[str]) -> None:
    """Refuse a config that contradicts the one that a checkpoint was ``trained`` with.

    ``shared`` are the arguments that all methods have; those of one method alone must be the same.
    """
    given = flatten(plain)
    for key, before in flatten(trained).items():
        now, argument = given.get(key), key.removeprefix("model.init_args.")
        own = argument != key and argument.partition(".")[0] not in shared and not key.endswith("_prefix")
        if key not in given or not (own or _TRAINED_WITH.match(key)) or now == before:
            continue
        if argument == "student" and (Path(str(now)).name == Path(str(before)).name or str(now).endswith(".ckpt")):
            continue
        raise UserError(
            f"{key.replace('.init_args.', '.').removesuffix('.class_path')}: the checkpoint was trained with {before},"
            f" got {now}; leave it as it was, or begin another run from the checkpoint's weights: --model.student"
            " CHECKPOINT in place of --ckpt_path"
        )
