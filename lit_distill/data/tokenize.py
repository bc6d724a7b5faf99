"""Tokenise a split once: Arrow files in a cache, named after everything that changes them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa  # type: ignore[import-untyped]
import tokenizers
import transformers
from filelock import FileLock
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from lit_distill.errors import UserError
from lit_distill.files import atomic_folder
from lit_distill.tasks import Row, Task

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

FORMAT = 2
"""Version of the files' layout; raised when it changes, so that older files are not read."""

BATCH = 1000
"""Rows that are tokenised, and written, at a time."""


CUTS = ("truncated_inputs", "truncated_targets", "truncated_labels")
"""What is counted of rows that are too long; a target whose label is cut counts as both."""


@dataclass(frozen=True)
class TokenSettings:
    """What decides a row's tokens, beside the row and the tokenizer."""

    tasks: dict[str, Task]
    """By name."""
    max_source_length: int
    """Tokens of an input at most, the final end-of-sequence token included."""
    max_target_length: int
    """Tokens of a target at most, the final end-of-sequence token included."""


@dataclass(frozen=True)
class Encoded:
    """Texts as token ids."""

    ids: list[list[int]]
    """Token ids, cut to the length that is allowed."""
    lengths: list[int]
    """How many tokens there were before the cut."""


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, *, is_target: bool) -> Encoded:
    """Tokenise texts; a text that is too long is cut before its final end-of-sequence token.

    Args:
        tokenizer: the student's.
        texts: the texts.
        max_length: tokens of one text at most.
        is_target: the texts are targets, which end in the end-of-sequence token even where the tokenizer adds none.
    """
    if not texts:
        return Encoded([], [])
    # `verbose=False`: a text beyond the tokenizer's own limit is no warning here, cuts are counted
    found: list[list[int]] = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    if is_target:
        found = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in found]
    lengths = [len(ids) for ids in found]
    return Encoded([_cut(ids, max_length, eos) for ids in found], lengths)


def _cut(ids: list[int], max_length: int, eos: int) -> list[int]:
    if len(ids) <= max_length:
        return ids
    return [*ids[: max_length - 1], eos] if ids[-1] == eos else ids[:max_length]


def encode_targets(
    tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Row], max_length: int
) -> tuple[Encoded, int]:
    """Targets of a task, of rows that have one, and how many of their labels were cut.

    Of a target that is too long the rationale is cut, wherever it stands, and the label only where it alone is too
    long.
    """
    texts = [text for example in examples if (text := target_of(task, example)) is not None]
    found = encode(tokenizer, texts, max_length, is_target=True)
    long = [i for i, length in enumerate(found.lengths) if length > max_length]
    if not task.needs_label or not long:
        return found, 0
    parts = [task.label_part(examples[i].label or "") for i in long]
    labels = tokenizer(parts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    if task.ends_in_label:
        for i, label in zip(long, labels, strict=True):
            ending = _cut([*label, eos], max_length, eos)
            found.ids[i] = [*found.ids[i][: max_length - len(ending)], *ending]
    return found, sum(len(label) >= max_length for label in labels)


def target_of(task: Task, row: Row) -> str | None:
    """The target of a row with its first teacher output."""
    return task.render(row, row.outputs[0] if row.outputs else None)


def encode_examples(
    examples: Sequence[Row], tokenizer: PreTrainedTokenizerBase, settings: TokenSettings
) -> Iterator[tuple[dict[str, list[Any]], Counter[str]]]:
    """Columns of ``BATCH`` rows at a time, and what of them was cut, over all tasks, as counts of ``CUTS``.

    The columns are ``index``, and for each task ``<task>.input_ids``, ``<task>.labels``, and their untruncated lengths
    ``<task>.input_length`` and ``<task>.target_length``; labels and their length are ``None`` without a target.
    """
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        columns: dict[str, list[Any]] = {"index": list(range(start, start + len(batch)))}
        cut: Counter[str] = Counter(dict.fromkeys(CUTS, 0))
        for name, task in settings.tasks.items():
            sources = [task.prefix + example.input for example in batch]
            encoded = encode(tokenizer, sources, settings.max_source_length, is_target=False)
            present = [target_of(task, example) is not None for example in batch]
            having = [example for example, has in zip(batch, present, strict=True) if has]
            answers, labels_cut = encode_targets(tokenizer, task, having, settings.max_target_length)
            labels, lengths = iter(answers.ids), iter(answers.lengths)
            columns[f"{name}.input_ids"] = encoded.ids
            columns[f"{name}.input_length"] = encoded.lengths
            columns[f"{name}.labels"] = [next(labels) if has else None for has in present]
            columns[f"{name}.target_length"] = [next(lengths) if has else None for has in present]
            cut["truncated_inputs"] += sum(length > settings.max_source_length for length in encoded.lengths)
            cut["truncated_targets"] += sum(length > settings.max_target_length for length in answers.lengths)
            cut["truncated_labels"] += labels_cut
        yield columns, cut


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer does to a text: its class, special tokens, vocabulary and rules."""
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    content: dict[str, Any] = {
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "special": special,
        "special_ids": tokenizer.all_special_ids,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        # the library's own rules change between releases
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # set by whoever called it last, and set again by each call
        content["rules"] = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(examples: Sequence[Row], tokenizer: str, settings: TokenSettings) -> str:
    """A hash of everything that changes the tokens of a split.

    Args:
        examples: the rows.
        tokenizer: the tokenizer's `tokenizer_fingerprint`.
        settings: prefixes and lengths.
    """
    tasks = {name: task.plain() for name, task in settings.tasks.items()}
    header = [FORMAT, tokenizer, tasks, list(tasks), settings.max_source_length, settings.max_target_length]
    digest = sha256(json.dumps(header).encode())
    for example in examples:
        row = [example.id, example.input, *(target_of(task, example) for task in settings.tasks.values())]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def tokenize_once(
    name: str,
    examples: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenSettings,
    root: Path,
) -> tuple[Dataset, dict[str, int]]:
    """The tokenised rows, out of the cache where they are in it.

    Args:
        name: names the folder in the cache, with the fingerprint.
        examples: the rows.
        tokenizer: the student's.
        settings: prefixes and lengths.
        root: folder of the cache; created where it is absent.

    Returns:
        The rows, memory-mapped, and how many of ``CUTS`` there were, over all tasks.

    Raises:
        UserError: the cache cannot be written.
    """
    mark = fingerprint(examples, tokenizer_fingerprint(tokenizer), settings)
    folder = root / f"{name}-{mark[:32]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # whoever comes second waits, and then reads what the first one wrote
        with FileLock(f"{folder}.lock"):
            if (found := _read(folder, mark)) is None:
                _write(folder, mark, examples, tokenizer, settings)
                found = _read(folder, mark)
    except OSError as error:
        raise UserError(f"cache_dir: tokenised rows cannot be kept in {root} ({error})") from error
    if found is None:
        raise UserError(f"cache_dir: what was written to {folder} does not read back; is the disk full?")
    return found


def _read(folder: Path, mark: str) -> tuple[Dataset, dict[str, int]] | None:
    """What is in a folder, or ``None`` where that is not whole."""
    # brings pandas, which commands that train nothing have no use for
    from datasets import Dataset

    table = folder / "rows.arrow"
    try:
        done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        if done["fingerprint"] != mark or table.stat().st_size != done["bytes"]:
            return None
        rows = Dataset.from_file(str(table))
        return (rows, done["truncated"]) if len(rows) == done["rows"] else None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def _write(
    folder: Path, mark: str, examples: Sequence[Row], tokenizer: PreTrainedTokenizerBase, settings: TokenSettings
) -> None:
    """Write a folder whole, in the place of whatever is there; only the holder of its lock may."""
    with atomic_folder(folder) as tmp_folder:
        table = tmp_folder / "rows.arrow"
        cut = dict.fromkeys(CUTS, 0)
        schema = _schema(list(settings.tasks))
        bar = tqdm(total=len(examples), desc=f"Tokenising {folder.name.rsplit('-', 1)[0]}", delay=3, disable=None)
        with bar, pa.OSFile(str(table), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for columns, counts in encode_examples(examples, tokenizer, settings):
                writer.write_batch(pa.record_batch(columns, schema=schema))
                cut = {key: cut[key] + counts[key] for key in CUTS}
                bar.update(len(columns["index"]))
        done = {"fingerprint": mark, "rows": len(examples), "bytes": table.stat().st_size, "truncated": cut}
        (tmp_folder / "done.json").write_text(json.dumps(done), encoding="utf-8")


def _schema(tasks: Sequence[str]) -> Any:  # noqa: ANN401 - pyarrow has no types
    ids = pa.list_(pa.int32())
    fields = [("index", pa.int32())]
    for task in tasks:
        fields += [(f"{task}.input_ids", ids), (f"{task}.input_length", pa.int32())]
        fields += [(f"{task}.labels", ids), (f"{task}.target_length", pa.int32())]
    return pa.schema(fields)
