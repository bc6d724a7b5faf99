"""Tokenise a split once, into a cached Arrow file named by a hash of all that affects it."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from filelock import FileLock
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lit_distill.data.selection import Target
from lit_distill.errors import UserError
from lit_distill.files import atomic_write
from lit_distill.students.tokens import Tokens
from lit_distill.tasks import Row, Task

FORMAT = 3
"""Version of the file layout."""

BATCH = 1000
"""Rows to tokenise and write at a time."""

Choose = Callable[[Task, Row], list[Target]]
"""Selects the targets of a row for a task."""


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
    """The tokenised columns of some rows.

    For each task ``<task>.input_ids`` and ``<task>.labels`` (a possibly empty list of targets), the lengths before
    truncation ``<task>.input_length`` and ``<task>.target_lengths``, and the number of cut labels
    ``<task>.labels_cut``.
    """
    columns: dict[str, list[Any]] = {}
    for name, task in settings.tasks.items():
        sources = tokens.sources([task.prefix + row.input for row in rows], settings.max_source_length)
        found = [choose(task, row) for row in rows]
        flat = [target for several in found for target in several]
        encoded = zip(*encode_targets(tokens, task, flat, settings.max_target_length), strict=True)
        by_row = [[next(encoded) for _ in several] for several in found]
        columns[f"{name}.input_ids"] = sources.ids
        columns[f"{name}.input_length"] = sources.lengths
        columns[f"{name}.labels"] = [[ids for ids, _, _ in several] for several in by_row]
        columns[f"{name}.target_lengths"] = [[length for _, length, _ in several] for several in by_row]
        columns[f"{name}.labels_cut"] = [sum(cut for _, _, cut in several) for several in by_row]
    return columns


def cut_counts(column: Callable[[str], list[Any]], settings: TokenSettings) -> dict[str, int]:
    """Numbers of truncated texts over all tasks; a cut label counts as target and as label."""
    counts = dict.fromkeys(("truncated_inputs", "truncated_targets", "truncated_labels"), 0)
    for name in settings.tasks:
        lengths = [length for several in column(f"{name}.target_lengths") for length in several]
        inputs = column(f"{name}.input_length")
        counts["truncated_inputs"] += sum(length > settings.max_source_length for length in inputs)
        counts["truncated_targets"] += sum(length > settings.max_target_length for length in lengths)
        counts["truncated_labels"] += sum(column(f"{name}.labels_cut"))
    return counts


def fingerprint(rows: Sequence[Row], tokens: Tokens, settings: TokenSettings, choose: Choose) -> str:
    """A hash of all that affects the tokens of a split."""
    tasks = list(settings.tasks.values())
    written = [[task.name, task.prefix, task.target] for task in tasks]
    header = [FORMAT, tokens.fingerprint, written, settings.max_source_length, settings.max_target_length]
    digest = sha256(json.dumps(header).encode())
    for row in rows:
        digest.update(json.dumps([row.id, row.input, *(choose(task, row) for task in tasks)]).encode())
    return digest.hexdigest()


def tokenize_once(
    name: str, rows: Sequence[Row], tokens: Tokens, settings: TokenSettings, choose: Choose, root: Path
) -> Any:
    """The columns of `encode_rows` as a memory-mapped ``datasets.Dataset``, from the cache in ``root`` if possible."""
    from datasets import Dataset  # type: ignore[import-untyped]  # brings pandas, a tenth of the start

    path = root / f"{name}-{fingerprint(rows, tokens, settings, choose)[:32]}.arrow"

    def cached() -> Any:
        try:
            found = Dataset.from_file(str(path)) if path.is_file() else None
        except (OSError, ValueError, pa.ArrowException):
            return None  # damaged: rebuild
        return found if found is not None and len(found) == len(rows) else None

    try:
        root.mkdir(parents=True, exist_ok=True)
        # a second process waits and reads the file of the first
        with FileLock(path.with_suffix(".lock")):
            if (found := cached()) is None:
                schema = _schema(settings.tasks)
                bar = tqdm(total=len(rows), desc=f"Tokenising {name}", delay=3, disable=None)
                with bar, atomic_write(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                    for start in range(0, len(rows), BATCH):
                        columns = encode_rows(rows[start : start + BATCH], tokens, settings, choose)
                        writer.write_batch(pa.record_batch(columns, schema=schema))
                        bar.update(BATCH)
                found = cached()
    except OSError as error:
        raise UserError(f"tokenised rows cannot be kept in {str(root)!r} ({error}); set LIT_DISTILL_CACHE") from error
    return found


def _schema(tasks: Iterable[str]) -> Any:
    ids = pa.list_(pa.int32())
    types = {"input_ids": ids, "input_length": pa.int32(), "labels": pa.list_(ids), "target_lengths": ids}
    types["labels_cut"] = pa.int32()
    return pa.schema([(f"{task}.{part}", kind) for task in tasks for part, kind in types.items()])
