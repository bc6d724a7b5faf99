"""``capture``: store a teacher's distributions at every training target, to train with no teacher in memory."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from jsonargparse import Namespace

from lit_distill import __version__
from lit_distill.checks import check_int, check_range
from lit_distill.commands.annotate import show
from lit_distill.commands.inspect import build_data
from lit_distill.commands.parser import Option
from lit_distill.commands.settings import fabric_of, parse_settings
from lit_distill.commands.train import train_parser
from lit_distill.data import RationaleDataModule
from lit_distill.errors import UserError
from lit_distill.interrupts import Interrupted, interruptible
from lit_distill.progress import ticker
from lit_distill.students import load_tokens
from lit_distill.students.models import Dtype
from lit_distill.teachers.capture import SHARD, Capturer, capture_on_ray
from lit_distill.teachers.frozen import about, check_run, other_vocabulary
from lit_distill.teachers.store import (
    Header,
    check_same,
    data_hash,
    is_store,
    keys_of,
    revision,
    store_size,
    stored_keys,
    tokenizer_hash,
    write_header,
)

_OPTIONS: Sequence[Option] = (
    ("teacher", str | None, None, "The teacher: a run, a folder, a checkpoint or a hub name."),
    ("out", str | None, None, "Folder of the distributions, old and new. A dry run needs none."),
    ("splits", list[Literal["train", "val"]], ["train", "val"], "What to capture; without val there is no val loss."),
    ("temperature", float, 1.0, "Of the teacher's softmax; an objective that learns from it has the same."),
    ("head", int, 4, "Number of the most likely ids that are stored with their probabilities."),
    ("draws", int, 12, "Ids drawn from the rest; with 0 the head is renormalised, a biased target."),
    ("seed", int, 0, "Of the draws."),
    ("dtype", Dtype, "float32", "Of the teacher's weights."),
    ("ray", int, 0, "Number of workers on a Ray cluster, in place of the trainer's devices."),
    ("dry_run", bool, False, "Only say how many rows, bytes and hours it would be."),
)


@interruptible()
def capture(args: list[str]) -> None:
    """Run ``capture``: parse what ``fit`` parses, build the data and the teacher, and store distributions."""
    parser = train_parser("capture", model=False)
    parser.add_options(_OPTIONS)
    config = parse_settings(parser, args)
    _check(config)
    alone = config["ray"] or config["dry_run"]
    fabric = fabric_of(config, **{name: 1 if alone else config["trainer"][name] for name in ("devices", "num_nodes")})
    data = build_data(config)
    # before data is read and a folder is made
    header = _header(config, data)
    with about("teacher"):
        # Ray's workers load it themselves
        capturer = None if config["ray"] else Capturer(header, data.eval_batch_size, fabric.device)
    if config["out"] is not None and is_store(config["out"]):
        header = replace(header, data=check_same(config["out"], header).data)
    data.prepare_data()
    data.setup("fit")
    rows, found = _rows(data, config["splits"])
    header = replace(header, data=header.data | found)
    if config["dry_run"]:
        _estimate(capturer or Capturer(header, data.eval_batch_size, fabric.device), header, rows)
        return
    started, folder = time.monotonic(), Path(config["out"])
    parts = _pending(folder, rows)
    if fabric.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        write_header(folder, header)
    # all know what is to be done before the first writes
    fabric.barrier()
    try:
        if capturer is None:
            capture_on_ray(header, folder, parts, data.eval_batch_size, config["ray"])
        elif own := parts[fabric.global_rank :: fabric.world_size]:
            with ticker("Capturing", sum(map(len, own)), unit=" rows") as advance:
                for part in own:
                    capturer.write(folder, part, advance)
    except Interrupted:
        print("To go on, run the same command; whole files stay.", file=sys.stderr)
        raise
    fabric.barrier()
    if fabric.is_global_zero:
        show(str(folder), _summary(header, store_size(folder)) | {"seconds": round(time.monotonic() - started, 1)})


def _check(config: Namespace) -> None:
    """Check the options. Raises a ``UserError``."""
    for name in ("teacher", *([] if config["dry_run"] else ["out"])):
        if config[name] is None:
            raise UserError(f"{name}: must be given, as --{name}")
    if config["out"] is not None and Path(config["out"]).exists() and not Path(config["out"]).is_dir():
        raise UserError(f"out: {config['out']!r} is a file; give a folder")
    check_range("temperature", config["temperature"], above=0)
    for name, most in (("head", 1000), ("draws", 1000), ("seed", 2**63 - 1), ("ray", 10_000)):
        check_int(name, config[name], 0, most)
    if config["head"] + config["draws"] == 0:
        raise UserError("head: 0 and draws: 0 store nothing; give one of them")
    if not config["splits"]:
        raise UserError("splits: must name train or val, or both")


def _header(config: Namespace, data: RationaleDataModule) -> Header:
    """What is captured. Raises a ``UserError`` if the teacher has another vocabulary than the data."""
    tokens = data.tokens
    with about("teacher"):
        check_run(config["teacher"])
        theirs = load_tokens(config["teacher"])
    if (tokenizer := tokenizer_hash(tokens)) != tokenizer_hash(theirs):
        kinds = [f"{own.family} rows, which end in token {own.tokenizer.eos_token_id}" for own in (theirs, tokens)]
        told = other_vocabulary(theirs.tokenizer, tokens.tokenizer) or f"{kinds[0]}, the student {kinds[1]}"
        raise UserError(f"teacher: {config['teacher']!r} has {told}; distributions can only be learned over the same")
    if config["head"] > len(tokens.tokenizer):
        raise UserError(f"head: {config['head']} is more than the {len(tokens.tokenizer)} ids of the vocabulary")
    return Header(
        revision=revision(config["teacher"]),
        tokenizer=tokenizer,
        vocabulary=len(tokens.tokenizer),
        renormalised=config["draws"] == 0,
        version=__version__,
        **{name: config[name] for name in ("teacher", "dtype", "temperature", "head", "draws", "seed")},
    )


def _rows(data: RationaleDataModule, splits: Sequence[Any]) -> tuple[pa.Table, dict[str, dict[str, Any]]]:
    """The different source and target pairs of all tasks, the longest first, and `Header.data` of the splits."""
    tables, found = [], {}
    for split in dict.fromkeys(splits):
        own = pa.concat_tables(data.token_rows(split).sequences(task) for task in data.tasks)
        keys = keys_of(own)
        found[data_hash(split, keys)] = {"dataset": data.name, "split": split, "rows": len(np.unique(keys))}
        tables.append(own)
    rows = pa.concat_tables(tables)
    rows = rows.take(np.unique(keys_of(rows), return_index=True)[1])
    # equal lengths stay in the order of their keys
    lengths = sum(pc.list_value_length(rows[name]).to_numpy() for name in rows.column_names)
    return rows.take(np.argsort(-lengths, kind="stable")), found


def _pending(folder: Path, rows: pa.Table) -> list[pa.Table]:
    """The rows that a folder lacks, one table a file to write."""
    lacking = pa.array(~np.isin(keys_of(rows), stored_keys(folder)))
    parts = [rows[i : i + SHARD].filter(lacking[i : i + SHARD]) for i in range(0, len(rows), SHARD)]
    return [part for part in parts if len(part)]


def _estimate(capturer: Capturer, header: Header, rows: pa.Table) -> None:
    """Measure a few batches, from the longest rows to the shortest, and print what all rows would need."""
    batch_size = capturer.batch_size
    starts = np.linspace(0, max(len(rows) - batch_size, 0), 4, dtype=int).tolist()
    sample = pa.concat_tables([rows[start : start + batch_size] for start in dict.fromkeys(starts)])
    # not counted: what is loaded at the first use
    capturer.capture(sample[-batch_size:])
    with TemporaryDirectory() as folder:
        started = time.monotonic()
        size = capturer.write(Path(folder), sample).stat().st_size
        seconds = time.monotonic() - started
    of_all = len(rows) and _tokens(rows) / _tokens(sample)
    positions, known = (len(pc.list_flatten(table["target"])) for table in (rows, sample))
    found = _summary(header, (len(rows), positions, round(size * positions / known)))
    show("dry run", found | {"hours of one process": f"{seconds * of_all / 3600:.2f}"})


def _tokens(rows: pa.Table) -> int:
    return sum(len(pc.list_flatten(rows[name])) for name in rows.column_names)


def _summary(header: Header, size: tuple[int, int, int]) -> dict[str, Any]:
    """What a store of this size (see `store_size`) holds."""
    rows, positions, bytes_ = size
    tail = "renormalised" if header.renormalised else f"{header.draws} drawn from the rest"
    return {
        "teacher": f"{header.teacher} ({header.revision})",
        "target": f"{header.head} most likely ids, {tail}; temperature {header.temperature:g}",
        **{f"{one['dataset']} {one['split']}": f"{one['rows']:,} rows" for one in header.data.values()},
        "rows": rows,
        "target positions": positions,
        "bytes a position": f"{bytes_ / max(positions, 1):.1f} on disk, {header.record.itemsize} in memory",
        "MB on disk": f"{bytes_ / 1e6:,.1f}",
    }
