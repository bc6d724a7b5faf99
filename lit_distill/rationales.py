"""One example with its teacher's rationale: its type, its targets, JSON lines, filters and counts."""

import hashlib
import importlib
import inspect
import json
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_distill.errors import UserError
from lit_distill.files import atomic_write
from lit_distill.reading import parse_json

ANSWER_MARK = " So the answer is "
"""Stands between rationale and label in the target of ``rationale_label``."""

RATIONALE_MARK = " Rationale: "
"""Stands between label and rationale in the target of ``label_rationale``."""

TASKS = ("label", "rationale", "rationale_label", "label_rationale")
"""The tasks that a data module can build, each named after what its target holds, in order."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a dataset with what the teacher said of it."""

    id: str
    """Identifier, unique in its split."""
    input: str
    """The student's input, without a prefix."""
    label: str | None
    """The gold answer; ``None`` where the data has none."""
    choices: tuple[str, ...] | None = None
    """The row's closed choices, where it has its own."""
    rationale: str | None = None
    """The teacher's rationale; ``None`` where the output is absent or did not parse."""
    teacher_label: str | None = None
    """The teacher's answer; ``None`` where the output is absent or did not parse."""
    columns: Mapping[str, Any] | None = field(default=None, hash=False)
    """What else is known of the teacher's output, by which rationales are filtered; ``None`` where nothing is."""


RationaleFilter = Callable[[Example], bool]
"""Keeps an example's rationale where it returns true."""


def label_agrees(example: Example, agree: Callable[[str, str], bool] = operator.eq) -> bool:
    """Keep a rationale only where the teacher's label is the gold one.

    Args:
        example: the example, with its gold label.
        agree: ``(teacher's label, gold label) -> the same answer``; for equations two strings can be one answer.
    """
    if example.teacher_label is None or example.label is None:
        return False
    return agree(example.teacher_label, example.label)


def find_filter(name: str) -> RationaleFilter:
    """The function behind the import path ``package.module.function``.

    Raises:
        UserError: there is no such module or function.
    """
    module_name, _, attribute = name.rpartition(".")
    allowed = "allowed are none, label_agrees or a function's import path (package.module.function)"
    if not module_name:
        raise UserError(f"rationale_filter: {allowed}, got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"rationale_filter: {module_name!r} cannot be imported ({error}); {allowed}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"rationale_filter: {module_name!r} has no function {attribute!r}; {allowed}")
    if inspect.isbuiltin(function) or inspect.isclass(function):
        # `os._exit` takes an argument too
        raise UserError(f"rationale_filter: {name!r} is no function of an example in Python; {allowed}")
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError) as error:
        raise UserError(f"rationale_filter: {name!r} takes no single example ({error}); {allowed}") from error
    found: RationaleFilter = function
    return found


def filter_name(rationale_filter: str | RationaleFilter) -> str:
    """The name that `find_filter` finds a filter by, as far as it has one."""
    if isinstance(rationale_filter, str):
        return rationale_filter
    module = getattr(rationale_filter, "__module__", type(rationale_filter).__module__)
    return f"{module}.{getattr(rationale_filter, '__qualname__', type(rationale_filter).__qualname__)}"


def fingerprint(examples: Iterable[Example], *, rationales: bool = False) -> str:
    """A hash of rows in their order: ids, inputs and labels.

    Args:
        examples: the rows.
        rationales: their rationales count too.
    """
    found = hashlib.sha256()
    for example in examples:
        row = [example.id, example.input, example.label, *([example.rationale] if rationales else [])]
        found.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return found.hexdigest()[:16]


def target_text(task: str, example: Example) -> str | None:
    """The target of a task, or ``None`` where the example lacks a part of it.

    Args:
        task: one of ``TASKS``.
        example: the example; its ``label`` is the one to train on.
    """
    label, rationale = example.label, example.rationale
    if task == "label":
        return label
    if task == "rationale":
        return rationale
    if label is None or rationale is None:
        return None
    if task == "rationale_label":
        return f"{rationale}{ANSWER_MARK}{label}"
    if task == "label_rationale":
        return f"{label}{RATIONALE_MARK}{rationale}"
    raise UserError(f"tasks: unknown task {task!r}; allowed are {', '.join(TASKS)}")


def label_part(task: str, label: str) -> str:
    """What a target has of its label, with the mark that sets it apart from a rationale: what must not be cut."""
    if task == "rationale_label":
        return f"{ANSWER_MARK}{label}"
    return f"{label}{RATIONALE_MARK.rstrip()}" if task == "label_rationale" else label


def read_label(task: str, text: str) -> str:
    """The label in what a student generated for a task; the whole text where a mark is missing."""
    if task == "rationale_label":
        return text.rpartition(ANSWER_MARK.strip())[2].strip()
    if task == "label_rationale":
        return text.partition(RATIONALE_MARK.strip())[0].strip()
    return text.strip()


def read_rationale(task: str, text: str) -> str:
    """The rationale in what a student generated for a task; empty where its mark is missing."""
    if task == "rationale_label":
        return text.rpartition(ANSWER_MARK.strip())[0].strip()
    if task == "label_rationale":
        return text.partition(RATIONALE_MARK.strip())[2].strip()
    return text.strip()


def write_examples(path: str | Path, examples: Iterable[Example]) -> int:
    """Write examples as JSON lines, one object each with the fields' names as keys; absent parts are left out.

    The file appears whole or not at all.

    Returns:
        How many were written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with atomic_write(path) as file:
        for example in examples:
            kept = {key: value for key, value in asdict(example).items() if value is not None}
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_examples(path: str | Path) -> list[Example]:
    """Read what `write_examples` wrote.

    Raises:
        UserError: a line is not such an object; the message names the file and the line.
    """
    with Path(path).open("rb") as file:
        return [_example_of(line, f"{path}:{number}") for number, line in enumerate(file, start=1) if line.strip()]


def _example_of(line: bytes, where: str) -> Example:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object but {type(row).__name__}")
    missing = {"id", "input"} - row.keys()
    if missing:
        raise UserError(f"{where}: missing {', '.join(sorted(missing))}; there are {', '.join(sorted(row))}")
    texts: dict[str, Any] = {key: row.get(key) for key in ("id", "input", "label", "rationale", "teacher_label")}
    wrong = [
        key
        for key, value in texts.items()
        if not isinstance(value, str) and (value is not None or key in ("id", "input"))
    ]
    if wrong:
        raise UserError(f"{where}: {', '.join(wrong)} must be a string")
    choices = row.get("choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        raise UserError(f"{where}: choices must be a list of strings")
    return Example(**texts, choices=None if choices is None else tuple(choices))
