"""Tokenise a split once, into a cached Arrow file."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from torch.utils.data import Dataset

from lit_distill.batch import PADDING_ROW
from lit_distill.data.cache import Prepared, key_of, prepare
from lit_distill.data.selection import Target
from lit_distill.data.store import Array, Stored, chunks, of_ints, of_lists, read, written
from lit_distill.data.workers import in_order
from lit_distill.students.tokens import Tokens
from lit_distill.tasks import Row, Task

T = TypeVar("T")

_IDS = pa.list_(pa.int32())
_COLUMNS = {"input_ids": pa.list_(_IDS), "labels": pa.list_(_IDS)}
"""The columns of each task in the cache, after its name and a dot: the sources, one for all targets or one for each,
and a possibly empty list of targets.
"""

Choose = Callable[[Task, Row], list[Target]]
"""Selects the targets of a row for a task."""

TokenRow = dict[str, Any]
"""``index``, and for each task ``<task>.input_ids`` and ``<task>.labels``."""


@dataclass(frozen=True)
class TokenSettings:
    """Settings that affect tokenisation."""

    tasks: dict[str, Task]  # by name
    max_source_length: int  # including end-of-sequence
    max_target_length: int  # including end-of-sequence


def encode_targets(
    tokens: Tokens, task: Task, found: Sequence[Target], max_length: int
) -> tuple[list[list[int]], list[int], list[bool]]:
    """Token ids of targets, their lengths before truncation, and whether the label was cut.

    The rationale is cut first, wherever it is; the label only if it is too long by itself.
    """
    encoded = tokens.targets([target.text for target in found], max_length)
    cut = [False] * len(found)
    long = [i for i, length in enumerate(encoded.lengths) if length > max_length]
    if not task.needs_label or not long:
        return encoded.ids, encoded.lengths, cut
    parts = [task.label_part(found[i].label or "") for i in long]
    labels = tokens.tokenizer(parts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    eos = tokens.tokenizer.eos_token_id
    for i, label in zip(long, labels, strict=True):
        cut[i] = len(label) >= max_length
        if task.ends_in_label:
            ending = [*label[: max_length - 1], eos]
            encoded.ids[i] = [*encoded.ids[i][: max_length - len(ending)], *ending]
    return encoded.ids, encoded.lengths, cut


def encode_rows(rows: Sequence[Row], tokens: Tokens, settings: TokenSettings, choose: Choose) -> dict[str, list[Any]]:
    """The tokenised columns of some rows: for each task, after its name and a dot, those of ``_COLUMNS`` and lengths.

    ``input_lengths`` and ``target_lengths`` are before truncation; ``labels_cut`` is the number of targets whose label
    was cut.
    """
    columns: dict[str, list[Any]] = {}
    for name, task in settings.tasks.items():
        found = [choose(task, row) for row in rows]
        flat = [target for several in found for target in several]
        encoded = zip(*encode_targets(tokens, task, flat, settings.max_target_length), strict=True)
        by_row = [[next(encoded) for _ in several] for several in found]
        texts = [
            # without a target, an evaluation needs a source yet
            [target.source for target in several]
            if task.reads_output and several
            else [task.source(row, next(iter(task.said(row)), None))]
            for row, several in zip(rows, found, strict=True)
        ]
        sources = tokens.sources([text for several in texts for text in several], settings.max_source_length)
        ids, lengths = iter(sources.ids), iter(sources.lengths)
        columns[f"{name}.input_ids"] = [[next(ids) for _ in several] for several in texts]
        columns[f"{name}.input_lengths"] = [[next(lengths) for _ in several] for several in texts]
        columns[f"{name}.labels"] = [[ids for ids, _, _ in several] for several in by_row]
        columns[f"{name}.target_lengths"] = [[length for _, length, _ in several] for several in by_row]
        columns[f"{name}.labels_cut"] = [sum(cut for _, _, cut in several) for several in by_row]
    return columns


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens of a task before truncation -> how many texts have them."""

    inputs: Counter[int]
    targets: Counter[int]
    labels_cut: int  # targets whose label was cut

    def __add__(self, other: "Lengths") -> "Lengths":
        return Lengths(self.inputs + other.inputs, self.targets + other.targets, self.labels_cut + other.labels_cut)


def lengths_of(columns: Mapping[str, list[Any]], settings: TokenSettings) -> dict[str, Lengths]:
    """The lengths of each task in columns of `encode_rows`."""
    return {
        name: Lengths(
            Counter(chain.from_iterable(columns[f"{name}.input_lengths"])),
            Counter(chain.from_iterable(columns[f"{name}.target_lengths"])),
            sum(columns[f"{name}.labels_cut"]),
        )
        for name in settings.tasks
    }


def cut_counts(lengths: Mapping[str, Lengths], settings: TokenSettings) -> dict[str, int]:
    """Numbers of truncated texts over all tasks; a cut label counts as target and as label."""
    of_tasks = lengths.values()
    return {
        "truncated_inputs": sum(beyond(one.inputs, settings.max_source_length) for one in of_tasks),
        "truncated_targets": sum(beyond(one.targets, settings.max_target_length) for one in of_tasks),
        "truncated_labels": sum(one.labels_cut for one in of_tasks),
    }


def beyond(lengths: Mapping[int, int], limit: int) -> int:
    """The number of texts that are longer."""
    return sum(count for length, count in lengths.items() if length > limit)


def row_lengths(columns: Mapping[str, list[Any]], settings: TokenSettings) -> Array:
    """Source and target tokens of each row, summed over the tasks: in training and in evaluation ``(2, rows)``.

    In training a source counts for each of its targets; if some are sampled, the longest count.
    """
    rows = []
    for name, task in settings.tasks.items():
        both = zip(columns[f"{name}.input_ids"], columns[f"{name}.labels"], strict=True)
        for_task = []
        for sources, targets in both:
            pairs = [len(source) + len(target) for source, target in paired(sources, targets)]
            read = sorted(pairs)[-task.draws :] if task.select == "sample" else pairs
            for_task.append((sum(read), pairs[0] if pairs else len(sources[0])))
        rows.append(np.array(for_task, np.int32).reshape(-1, 2).T)
    summed: Array = np.stack(rows).sum(axis=0, dtype=np.int32)
    return summed


def paired(sources: Sequence[T], targets: Sequence[T]) -> Iterator[tuple[T, T]]:
    """Each target with its source: the one of all, or its own."""
    return zip(sources if len(sources) > 1 else repeat(sources[0]), targets, strict=False)


def draw_targets(row: TokenRow, task: Task, draw: random.Random) -> None:
    """Leave of a row a random sample of a task's targets, with their sources."""
    sources, targets = row[f"{task.name}.input_ids"], row[f"{task.name}.labels"]
    if not targets:
        return
    if task.draws == 1:
        places = [int(draw.random() * len(targets))]
    else:
        places = draw.sample(range(len(targets)), min(task.draws, len(targets)))
    row[f"{task.name}.labels"] = [targets[place] for place in places]
    row[f"{task.name}.input_ids"] = [sources[place] for place in places] if len(sources) > 1 else sources


def tokenize_once(
    name: str, rows: Sequence[Row], key: str | None, tokens: Tokens, settings: TokenSettings, choose: Choose
) -> Prepared:
    """The columns of `encode_rows` in the cache, under a key of the rows and of how targets are chosen."""
    columns = {f"{task}.{part}": kind for task in settings.tasks for part, kind in _COLUMNS.items()}
    limits = [settings.max_source_length, settings.max_target_length]
    of_targets = partial(of_lists, of_items=of_ints)

    def encode(at: Array) -> tuple[list[pa.Array], tuple[Array, dict[str, Lengths]]]:
        found = encode_rows(read(rows, at), tokens, settings, choose)
        kept = []
        for task in settings.tasks:
            kept += [of_lists(found[f"{task}.{part}"], of_targets) for part in _COLUMNS]
        return kept, (row_lengths(found, settings), lengths_of(found, settings))

    def write(folder: Path) -> dict[str, Any]:
        counted = {task: Lengths(Counter(), Counter(), 0) for task in settings.tasks}
        sizes = [np.zeros((2, 0), np.int32)]
        parts = in_order(encode, chunks(len(rows)))
        path, title = folder / "tokens.arrow", f"Tokenising {name}"
        for own_sizes, lengths in written(path, columns, parts, title, len(rows)):
            sizes.append(own_sizes)
            counted = {task: counted[task] + lengths[task] for task in counted}
        np.save(folder / "lengths.npy", np.concatenate(sizes, axis=1))
        of_tasks = counted.items()
        return {
            "tasks": {task: [[*one.inputs.items()], [*one.targets.items()], one.labels_cut] for task, one in of_tasks}
        }

    return prepare(name, key_of(key, tokens.fingerprint, limits), write)


class TokenRows(Dataset[TokenRow]):
    """The rows of a tokenised split (of `tokenize_once`) by position.

    Position ``epoch * rows + i`` is row ``i`` in a later epoch, for tasks that ``sample`` a target: the sample depends
    on seed, epoch and row alone. ``PADDING_ROW`` is the first row without targets.
    """

    def __init__(self, found: Prepared, settings: TokenSettings, seed: int = 0) -> None:
        self.settings = settings
        self.seed = seed
        self.lengths_of = {
            task: Lengths(Counter(dict(inputs)), Counter(dict(targets)), labels_cut)
            for task, (inputs, targets, labels_cut) in found.meta["tasks"].items()
        }
        self._sampled = [task for task in settings.tasks.values() if task.select == "sample"]
        self._stored = Stored(found.folder / "tokens.arrow")
        self._lengths = found.array("lengths")

    def __len__(self) -> int:
        return int(self._stored.rows)

    def sequences(self, task: str) -> pa.Table:
        """The token ids of each of a task's targets: ``source`` and ``target``."""
        table = self._stored.table().select([f"{task}.input_ids", f"{task}.labels"])
        sources, targets = (column.combine_chunks() for column in table)
        rows = pc.list_parent_indices(targets).to_numpy()
        numbers = sources.value_lengths().to_numpy()
        starts = np.cumsum(numbers) - numbers
        # the number of a target in its row, up to that of the last source
        own = np.arange(len(rows)) - np.searchsorted(rows, rows)
        places = starts[rows] + np.minimum(own, numbers[rows] - 1)
        return pa.table({"source": sources.flatten().take(pa.array(places)), "target": targets.flatten()})

    def most_targets(self, task: str) -> int:
        """The largest number of a task's targets that a row has in a batch of training."""
        own, column = self.settings.tasks[task], self._stored.table()[f"{task}.labels"]
        most = int(pc.max(pc.list_value_length(column)).as_py() or 0)
        return min(most, own.draws) if own.select == "sample" else most

    def lengths(self, *, evaluation: bool) -> Array:
        """Source and target tokens of each row, see `row_lengths`."""
        found: Array = self._lengths[int(evaluation)]
        return found

    def __getitem__(self, position: int) -> TokenRow:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[TokenRow]:
        """Read the rows of a batch from Arrow at once; called by PyTorch's loader."""
        rows: list[TokenRow] = []
        for position in positions:
            epoch, index = divmod(max(position, 0), len(self))
            row: TokenRow = self._stored.row(index)
            if position == PADDING_ROW:
                row |= {"index": PADDING_ROW} | {f"{name}.labels": [] for name in self.settings.tasks}
            else:
                row["index"] = index
                for task in self._sampled:
                    draw_targets(row, task, random.Random(f"{self.seed}-{epoch}-{row['index']}"))  # noqa: S311 - no secret
            rows.append(row)
        return rows
