"""A run's name, its folder and its checkpoints."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.comparison.settings import FRACTION, LABELS, PAIRING, STUDENT, WEIGHT, telling
from lit_distill.errors import UserError
from lit_distill.files import flatten
from lit_distill.students import read_config


def find_checkpoint(path: str | Path | None, folder: str | None, *, required: bool) -> str | Path | None:
    """See that a checkpoint is one.

    Args:
        path: a file, a folder (a sharded checkpoint), or ``last``, ``hpc`` or ``registry``.
        folder: the folder of checkpoints that ``last`` is looked for in.
        required: ``last`` has to be there; else a run that has none yet starts anew, and starts again with one.

    Raises:
        UserError: there is none.
    """
    if path is None or path in ("hpc", "registry") or str(path).startswith("registry:"):
        return path
    if "://" in str(path):
        raise UserError(f"ckpt_path: {str(path)!r} is elsewhere; copy the file here first")
    if path == "last":
        last = None if folder is None else Path(folder) / "last.ckpt"
        if last is not None and last.exists():
            check_whole(last)
            return str(last)
        if required or last is None:
            where = "needs checkpoint.dirpath" if last is None else f"there is no {last}"
            raise UserError(f"ckpt_path: 'last' {where}; fit --resume finds the run by itself")
        return None
    allowed = "allowed is a file of a run's checkpoints, or 'last' with checkpoint.dirpath"
    if not Path(path).exists():
        raise UserError(f"ckpt_path: no checkpoint {str(path)!r}; {allowed}")
    if Path(path).is_dir():
        # the files of FSDP's and of DeepSpeed's sharded checkpoints
        if not any((Path(path) / name).exists() for name in ("meta.pt", "latest")):
            raise UserError(f"ckpt_path: {str(path)!r} is a folder, and no sharded checkpoint; {allowed}")
        return path
    if Path(path).suffix != ".ckpt":
        raise UserError(f"ckpt_path: {str(path)!r} does not end in .ckpt; {allowed}")
    check_whole(Path(path))
    try:
        read_config(path)
    except UserError as error:
        raise UserError(f"ckpt_path: {str(path)!r} is no checkpoint of lit_distill ({error}); {allowed}") from error
    return path


def check_whole(path: Path) -> None:
    """See that a checkpoint file was written to its end, and that its parts have the checksums that they were given.

    Raises:
        UserError: it was not; the newest one in its folder that was is named.
    """
    if (damage := _damage(path)) is None:
        return
    others = sorted(path.parent.glob("*.ckpt"), key=lambda other: other.stat().st_mtime, reverse=True)
    whole = next((other for other in others if _damage(other) is None), None)
    advice = "no other in its folder is whole" if whole is None else f"the newest that is whole: --ckpt_path {whole}"
    raise UserError(f"ckpt_path: {str(path)!r} is damaged ({damage}); {advice}")


def _damage(path: Path) -> str | None:
    if path.is_dir():
        return None
    try:
        with zipfile.ZipFile(path) as file:
            part = file.testzip()
    except (zipfile.BadZipFile, RuntimeError, EOFError):
        # its table of contents stands at its end
        return f"cut off at {path.stat().st_size} bytes"
    return None if part is None else f"{part} is not what was written"


def best_checkpoint(trainer: pl.Trainer) -> Path | None:
    """The best checkpoint of a run; ``None`` where none was kept."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            # of a resumed run it may lie elsewhere, or be gone
            found = Path(callback.best_model_path)
            return found if found.exists() else None
    return None


def run_folder(trainer: pl.Trainer) -> Path:
    """Where a run keeps its files: the folder above its checkpoints, else the logger's."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return Path(callback.dirpath).parent
    return Path(trainer.log_dir or trainer.default_root_dir)


def names(config: Namespace) -> tuple[str, str]:
    """What the dataset and the method are called in a run's name; of ANLI, each round is a dataset."""
    data, model = config["data"], config["model"]
    dataset = data["class_path"].rpartition(".")[2].removesuffix("DataModule").lower()
    part = (data.get("init_args") or Namespace()).get("round", "")
    return f"{dataset}{part}", model["class_path"].rpartition(".")[2].removesuffix("Module")


def run_name(config: Namespace) -> str:
    """A run's name, by which its folder is found."""
    arguments = config["data"].get("init_args") or Namespace()
    source, fraction = arguments.get("label_source", "gold"), arguments.get("train_fraction", 1.0)
    return f"{'-'.join(names(config))}-{source}-{fraction:g}-seed{config['seed_everything']}"


def wandb_naming(config: Namespace) -> dict[str, Any]:
    """The name, the group and the tags of a run in W&B: runs that differ in more than their seeds are in other groups.

    A group is called by what is looked for most, and ends in a hash of all that tells runs apart in a comparison.
    """
    known = telling({key: value for key, value in config.as_dict().items() if key != "config"})
    dataset, method = names(config)
    student = Path(known.get(STUDENT, "")).name
    source, fraction = known.get(LABELS, "gold"), float(known.get(FRACTION, 1))
    weight = known.get(WEIGHT, "1")
    odd = [f"weight{weight}"] * (weight != "1") + ["shuffled"] * (known.get(PAIRING) == "shuffled")
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:8]
    group = "-".join([dataset, method, source, f"{fraction:g}", student[:60], *odd, digest])
    seed = config["seed_everything"]
    tags = [dataset, method, student, f"{source} labels", f"fraction {fraction:g}", *odd, f"seed {seed}"]
    return {"name": f"{group}-seed{seed}", "group": group, "tags": [tag[:64] for tag in tags]}


def plain_config(config: Namespace) -> dict[str, Any]:
    """A config with its keys joined by dots and plain values, as loggers take it."""
    flat = flatten(config.as_dict())
    return {
        key: value if isinstance(value, int | float | str | bool | None) else str(value) for key, value in flat.items()
    }
