"""``shrink``: a smaller student cut out of a larger one, to be trained as any other."""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any, cast, get_args

import torch
from jsonargparse import Namespace
from rich.console import Console

from lit_distill.batch import TaskBatch, TaskInputs, target_tokens
from lit_distill.checks import check_file, check_int, check_new_folder
from lit_distill.commands.inspect import build_data
from lit_distill.commands.parser import Option
from lit_distill.commands.settings import fabric_of, parse_settings
from lit_distill.commands.train import train_parser
from lit_distill.data import RationaleDataModule
from lit_distill.errors import UserError
from lit_distill.files import atomic_folder, write_text
from lit_distill.interrupts import interruptible
from lit_distill.shrinking.importance import Importance, Scores, best, best_heads, features, magnitude
from lit_distill.shrinking.layers import kept_layers
from lit_distill.shrinking.shrink import shrink as make_smaller
from lit_distill.shrinking.shrink import size_of
from lit_distill.shrinking.structure import Keep, Structure, sizes
from lit_distill.shrinking.vocabulary import Corpus, check_same, lines_of, texts_of, trim, used_pieces
from lit_distill.students import Student, StudentFiles, Tokens, load
from lit_distill.students.base import Stack
from lit_distill.students.models import save_model
from lit_distill.tables import console_table

TRAIN = "train"
"""The word that stands for the config's rows of train among the files of a vocabulary."""

_MAP = "uniform:N, first:N, last:N, or a list such as 0,2,4."
_OPTIONS: Sequence[Option] = (
    ("from", str | None, None, "The larger model: a hub name, a folder, a run or a checkpoint."),
    ("out", str | None, None, "Folder of the student; a new one."),
    ("layers", str | None, None, f"Layers that stay, of both stacks where there are two: {_MAP}"),
    ("encoder_layers", str | None, None, "The same of the encoder alone."),
    ("decoder_layers", str | None, None, "The same of the decoder alone."),
    ("d_ff", int | None, None, "Number of units of a feed-forward layer that stay."),
    ("heads", int | None, None, "Number of heads of an attention that stay."),
    ("d_model", int | None, None, "Number of channels of the hidden states that stay."),
    ("importance", Importance | None, None, "What stays: by the weights, magnitude, or by rows, features [magnitude]."),
    ("sentinels", bool, False, "Keep T5's <extra_id_0> to <extra_id_99>, too, with a vocabulary."),
    ("rows", int, 64, "Rows of train for features and for the first loss, where a config has data."),
    ("json", str | None, None, "File for the same numbers."),
)


@interruptible()
def shrink(args: list[str]) -> None:
    """Run ``shrink``: parse what ``fit`` parses, cut the student, check and save it, and print a table."""
    parser = train_parser("shrink", model=False, data=False)
    parser.add_options(_OPTIONS)
    text = f"Keep the pieces that these texts use: text files, and {TRAIN} for the rows of the config."
    parser.add_argument("--vocabulary", type=str, nargs="+", default=None, help=text)
    config = parse_settings(parser, args)
    _check(config)
    rows = _Rows(config) if config.get("data") is not None else None
    files = StudentFiles(config["from"])
    dtype: Any = files.config.get("dtype") or files.config.get("torch_dtype") or "float32"
    corpora, device = _corpora(config, rows), fabric_of(config, devices=1).device
    # all is checked before gigabytes of weights are read
    shapes = load(config["from"], fast=False, meta=True)
    layers = _layers(config, shapes)
    _check_widths(config, Structure(shapes))
    student = load(config["from"], dtype=dtype, fast=False).eval().to(device)
    structure = Structure(student, layers)
    kept = used_pieces(student.tokens, corpora, sentinels=config["sentinels"]) if corpora else None
    before = _figures(student, rows)
    keep = _keep(config, structure, rows, kept)
    model = make_smaller(structure, keep)
    tokenizer = student.tokenizer if kept is None else trim(student.tokenizer, kept)
    with atomic_folder(config["out"]) as folder:
        save_model(model, tokenizer, folder)
        # what is checked and measured is what was saved
        smaller = load(folder, dtype=dtype, fast=False).eval().to(student.device)
        if kept is not None:
            check_same(student.tokens, smaller.tokens, kept, corpora)
        report = {
            "from": str(config["from"]),
            "out": str(config["out"]),
            "layers": {stack: list(own) for stack, own in layers.items()},
            "before": before,
            "after": _figures(smaller, rows),
        }
    if config["json"] is not None:
        write_text(config["json"], json.dumps(report, indent=2) + "\n")
    render(report)


def _check(config: Namespace) -> None:
    """Check the options, as far as they need no model. Raises a ``UserError``."""
    if config["from"] is None:
        raise UserError("from: must be given, as --from MODEL")
    check_new_folder("out", config["out"])
    check_file("json", config["json"])
    stacks, widths = ("encoder_layers", "decoder_layers"), ("d_ff", "heads", "d_model")
    if all(config[name] is None for name in ("layers", *stacks, *widths, "vocabulary")):
        raise UserError(f"give what is to be smaller: {', '.join(('layers', *stacks, *widths))} or vocabulary")
    if config["layers"] is not None and (both := [name for name in stacks if config[name] is not None]):
        raise UserError(f"layers: not with {both[0]}, which is of one stack alone")
    if config["importance"] is not None and all(config[name] is None for name in widths):
        raise UserError(f"importance: only with {', '.join(widths)}; layers go by a map, pieces by a corpus")
    if config["sentinels"] and config["vocabulary"] is None:
        raise UserError("sentinels: only with vocabulary; without it all pieces stay")
    check_int("rows", config["rows"], 1)
    if config.get("data") is None:
        needed = {"importance": config["importance"] == "features", "vocabulary": TRAIN in _words(config)}
        for name, what in (("importance", "features"), ("vocabulary", TRAIN)):
            if needed[name]:
                raise UserError(f"{name}: {what} needs rows; give a config with data, or --data")


def _words(config: Namespace) -> list[str]:
    return config["vocabulary"] or []


def _layers(config: Namespace, student: Student) -> dict[Stack, list[int]]:
    """The layers of each stack that stay."""
    stacks: Sequence[Stack] = ("encoder", "decoder") if student.tokens.family == "seq2seq" else ("decoder",)
    if config["encoder_layers"] is not None and "encoder" not in stacks:
        raise UserError("encoder_layers: the model has no encoder; give layers")
    found: dict[Stack, list[int]] = {}
    for stack in stacks:
        option = f"{stack}_layers"
        name = option if config[option] is not None else "layers"
        if config[name] is not None:
            found[stack] = kept_layers(name, config[name], student.layers(stack))
    return found


def _check_widths(config: Namespace, structure: Structure) -> None:
    """Check the numbers of units, heads and channels. Raises a ``UserError``."""
    for name in ("d_ff", "heads", "d_model"):
        if config[name] is not None:
            structure.check_widths(name)
            check_int(name, config[name], 1, sizes(structure.config)[name])
    if config["heads"] is not None and config["heads"] % structure.queries:
        shared = f"as {structure.queries} heads share their keys and values"
        raise UserError(f"heads: {config['heads']} must be a multiple of {structure.queries}, {shared}")


def _keep(config: Namespace, structure: Structure, rows: "_Rows | None", kept: list[int] | None) -> Keep:
    """What stays of the student's layers."""
    units, heads, channels = (config[name] for name in ("d_ff", "heads", "d_model"))
    scores = Scores()
    if any(width is not None for width in (units, heads, channels)):
        given = rows if config["importance"] == "features" else None
        scores = magnitude(structure) if given is None else features(structure, given.batches(structure.student))
    return Keep(
        units={} if units is None else {name: best(own, units) for name, own in scores.units.items()},
        heads={} if heads is None else best_heads(structure, scores.heads, heads // structure.queries),
        d_model=None if channels is None else best(cast(torch.Tensor, scores.d_model), channels),
        vocabulary=None if kept is None else torch.tensor(kept),
    )


def _corpora(config: Namespace, rows: "_Rows | None") -> list[Corpus]:
    """The texts of the vocabulary; with data also the prefixes of its tasks and the words of its labels."""
    words = _words(config)
    found = [lines_of([word for word in words if word != TRAIN])] if set(words) - {TRAIN} else []
    if words and rows is not None:
        if TRAIN in words:
            found.append(rows.ids)
        found.append(rows.words)
    return found


class _Rows:
    """The rows of train of a config, by any tokenizer."""

    def __init__(self, config: Namespace) -> None:
        self.config = config
        self.number: int = config["rows"]
        self.data = cache(self._data)

    def _data(self, tokens: Tokens) -> RationaleDataModule:
        data = build_data(self.config)
        data.tokenizer = tokens
        data.batch_size = min(data.batch_size, self.number)
        data.prepare_data()
        data.tokenized("train")
        return data

    def ids(self, tokens: Tokens) -> Iterator[Sequence[int]]:
        """All sources and targets, as far as they are not truncated."""
        data = self.data(tokens)
        for task in data.tasks:
            for column in data.token_rows("train").sequences(task).columns:
                for chunk in column.chunks:
                    yield from chunk.to_pylist()

    def words(self, tokens: Tokens) -> Iterator[Sequence[int]]:
        """The prefixes of the tasks, and the labels of a closed set."""
        data = self.data(tokens)
        yield from texts_of([*(task.prefix for task in data.tasks.values()), *(data.label_set or ())])(tokens)

    def batches(self, student: Student) -> Iterator[TaskBatch]:
        """Batches of as many rows as asked for."""
        data = self.data(student.tokens)
        for batch in islice(data.train_dataloader(), -(-self.number // data.batch_size)):
            yield {
                task: cast(TaskInputs, {name: tensor.to(student.device) for name, tensor in inputs.items()})
                for task, inputs in batch.items()
            }


@torch.no_grad()
def _figures(student: Student, rows: _Rows | None) -> dict[str, Any]:
    """Sizes of a student, and its loss on rows of train: for each task the mean over target tokens, in nats."""
    stacks = get_args(Stack) if student.tokens.family == "seq2seq" else ("decoder",)
    found: dict[str, Any] = size_of(student.network) | sizes(student.network.config)
    found |= {f"{stack} layers": student.layers(stack) for stack in stacks}
    totals: dict[str, list[float]] = {}
    for batch in () if rows is None else rows.batches(student):
        passed = student(batch)
        for task, inputs in batch.items():
            loss, tokens = totals.get(task, (0.0, 0))
            totals[task] = [loss + float(passed.token_losses(task).sum()), tokens + target_tokens(inputs)]
    return found | {f"{task} loss": loss / tokens for task, (loss, tokens) in totals.items() if tokens}


def render(report: dict[str, Any]) -> None:
    """Print a report as a table."""
    before, after = report["before"], report["after"]
    table = console_table(f"{report['out']}, from {report['from']}", [""], ["before", "after", "of it"])
    for name, old in before.items():
        new, shown = after[name], "{:,}" if isinstance(old, int) else "{:.3f}"
        if name == "bytes":
            name, shown, old, new = "MB of weights", "{:,.1f}", old / 1e6, new / 1e6
        table.add_row(name, shown.format(old), shown.format(new), f"{new / old:.0%}")
    console = Console()
    console.print(table)
    for stack, kept in report["layers"].items():
        console.print(f"{stack} layers that stay: {', '.join(map(str, kept))}", soft_wrap=True)
    # a config may train from scratch, which would draw new weights
    given = f"--config FILE --model.student {report['out']} --model.from_scratch false"
    console.print(f"Train it: lit-distill fit {given}", soft_wrap=True)
