"""One example with its teacher's rationale: its type, its targets, JSON lines, filters and counts."""

import importlib
import inspect
import operator
from collections.abc import Callable

from lit_distill.errors import UserError
from lit_distill.tasks import Row

ANSWER_MARK = " So the answer is "
"""Stands between rationale and label in the target of ``rationale_label``."""

RATIONALE_MARK = " Rationale: "
"""Stands between label and rationale in the target of ``label_rationale``."""

TASKS = ("label", "rationale", "rationale_label", "label_rationale")
"""The tasks that a data module can build, each named after what its target holds, in order."""


RationaleFilter = Callable[[Row], bool]
"""Keeps an example's rationale where it returns true."""


def label_agrees(example: Row, agree: Callable[[str, str], bool] = operator.eq) -> bool:
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


def target_text(task: str, example: Row) -> str | None:
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
