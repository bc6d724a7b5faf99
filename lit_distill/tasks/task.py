"""A task: the inputs and targets of a student, the teacher outputs that it uses, and how answers are parsed."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from string import Formatter
from typing import Any, Literal, NamedTuple, get_args

from lit_distill import checks
from lit_distill.errors import UserError
from lit_distill.tasks.rows import Row, TeacherOutput

Select = Literal["first", "all", "sample", "vote"]


@cache
def _split(template: str) -> tuple[list[str], list[str]]:
    """The template's fields, and the literal texts around them (one more)."""
    names, marks = [], [""]
    for literal, name, _, _ in Formatter().parse(template):
        marks[-1] += literal
        if name is not None:
            names.append(name)
            marks.append("")
    return names, marks


class Parsed(NamedTuple):
    """The label and rationale in a student's text; ``None`` for a part that its task does not have."""

    label: str | None = None
    rationale: str | None = None


@dataclass(frozen=True)
class Task:
    """One task of a student. Its name has no meaning of its own."""

    name: str = ""
    """Key of its batch and its loss term."""
    prefix: str = ""
    """Put before each input."""
    target: str = "{label}"
    """Template over ``{label}``, ``{rationale}`` (the text of the teacher output), ``{input}`` and columns of that
    output.
    """
    parser: str | None = None
    """Import path of ``(text) -> label`` or ``(text) -> Parsed``; by default the template is inverted."""
    weight: float = 1.0
    """Weight of its cross-entropy in the total loss."""
    max_new_tokens: int | None = None
    """Maximum generated tokens; by default 1.5 times the longest target in train."""
    teacher: str | None = None
    """Use only the outputs of this teacher."""
    kind: str = "rationale"
    """Use only outputs of this kind."""
    select: Select = "first"
    """Of a row's outputs use the ``first``, ``all`` (each as a target), a random ``sample`` in each epoch, or by
    ``vote`` the first one with the most frequent label. Evaluation uses the first where training uses several.
    """

    def __post_init__(self) -> None:
        place = f"tasks: {self.name}" if self.name else "tasks"
        for name in ("prefix", "target", "kind"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{place}: {name} must be a text, got {getattr(self, name)!r}")
        for name in ("name", "parser", "teacher"):
            if not isinstance(getattr(self, name), str | None):
                raise UserError(f"{place}: {name} must be a text, got {getattr(self, name)!r}")
        checks.check_choice(f"{place}: select", self.select, get_args(Select))
        checks.check_range(f"{place}: weight", self.weight, at_least=0)
        checks.check_range(f"{place}: max_new_tokens", self.max_new_tokens, at_least=1, below=10_001, whole=True)
        found = checks.check_format(f"{place}: target", self.target)
        if not found or not all(name.isidentifier() for name in found) or len(set(found)) < len(found):
            raise UserError(
                f"{place}: target must name {{label}}, {{rationale}}, {{input}} or columns in braces, each once,"
                f" got {self.target!r:.200}"
            )
        if self.parser is not None:
            find_function(f"{place}: parser", self.parser)
        elif any(not mark.strip() for mark in _split(self.target)[1][1:-1]):
            raise UserError(f"{place}: target {self.target!r} has no text between two fields: give a parser")

    @property
    def uses_output(self) -> bool:
        """Whether targets need a teacher output."""
        return any(name not in ("label", "input") for name in _split(self.target)[0])

    @property
    def needs_label(self) -> bool:
        """Whether targets contain the label."""
        return "label" in _split(self.target)[0]

    @property
    def columns(self) -> list[str]:
        """The columns of a teacher output that targets need."""
        return [name for name in _split(self.target)[0] if name not in ("label", "rationale", "input")]

    @property
    def gives_label(self) -> bool:
        """Whether a label is parsed from the student's text."""
        return self.parser is not None or self.needs_label

    @property
    def gives_rationale(self) -> bool:
        """Whether the student's text contains a rationale."""
        return "rationale" in _split(self.target)[0]

    def accepts(self, output: TeacherOutput) -> bool:
        """Whether an output has the task's teacher and kind."""
        return output.kind == self.kind and self.teacher in (None, output.teacher)

    def render(self, row: Row, output: TeacherOutput | None = None) -> str | None:
        """The target for a row and a teacher output; ``None`` where a field is missing."""
        values: dict[str, Any] = {"label": row.label, "input": row.input}
        if output is not None:
            values = {**output.columns, **values, "rationale": output.text}
        if any(values.get(name) is None for name in _split(self.target)[0]):
            return None
        return self.target.format_map(values)

    def read(self, text: str) -> Parsed:
        """Parse a student's text.

        Without a parser the text is split at the template's literal texts: at the last one before the label, and the
        first one after it. Where one is missing, the whole text is the label.
        """
        if self.parser is not None:
            found = find_function("parser", self.parser)(text)
            parsed = found if isinstance(found, Parsed) else Parsed(found)
            whole = text.strip() if self.gives_rationale else None
            return parsed if parsed.rationale is not None else parsed._replace(rationale=whole)
        names, marks = _split(self.target)
        marks = [mark.strip() for mark in marks]
        rest = text.strip().removeprefix(marks[0]).removesuffix(marks[-1])
        at = names.index("label") if "label" in names else 0
        parts = dict.fromkeys(names, "")
        head = ""
        if at:
            head, _, rest = rest.rpartition(marks[at])
        for i in range(at, len(names) - 1):
            parts[names[i]], _, rest = rest.partition(marks[i + 1])
        parts[names[-1]] = rest
        for i in range(at - 1, 0, -1):
            head, _, parts[names[i]] = head.rpartition(marks[i])
        if at:
            parts[names[0]] = head
        stripped = {name: part.strip() for name, part in parts.items()}
        return Parsed(stripped.get("label"), stripped.get("rationale"))

    @property
    def ends_in_label(self) -> bool:
        """Whether the label is the last of several fields."""
        names, _ = _split(self.target)
        return len(names) > 1 and names[-1] == "label"

    def label_part(self, label: str) -> str:
        """The part of a target that truncation keeps: the label with the literal text that marks it."""
        names, marks = _split(self.target)
        at = names.index("label")
        before = marks[at] if at in (0, len(names) - 1) else ""
        return before + label + (marks[-1] if at == len(names) - 1 else marks[at + 1].rstrip())

    def plain(self) -> dict[str, Any]:
        """The settings that differ from the defaults in plain types, for `tasks_from`."""
        options = [option for option in fields(self) if option.name != "name"]
        return {option.name: value for option in options if (value := getattr(self, option.name)) != option.default}


LABEL = Task("label")
RATIONALE = Task("rationale", target="{rationale}")
RATIONALE_LABEL = Task("rationale_label", target="{rationale} So the answer is {label}")
LABEL_RATIONALE = Task("label_rationale", target="{label} Rationale: {rationale}")

PRESETS = {task.name: task for task in (LABEL, RATIONALE, RATIONALE_LABEL, LABEL_RATIONALE)}
"""The tasks of the paper and of the single-task baselines, by name."""

_PREFIXES = {"label": "predict: ", "rationale": "explain: "}


def tasks_from(value: Any) -> dict[str, Task]:
    """Tasks by name, from a mapping of names to settings, or a list of names, `Task` objects and settings with a name.

    A name in ``PRESETS`` starts from that task's settings. In a list of several bare names, ``label`` and ``rationale``
    have the prefixes of the paper's code.

    Raises:
        UserError: there is no task, two share a name or prefix, or a setting is invalid.
    """
    if isinstance(value, Mapping):
        listed = [(name, settings) for name, settings in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        listed = [_named(item, len(value) > 1) for item in value]
    else:
        listed = []
    if not listed:
        raise UserError(f"tasks must be a list of names ({', '.join(PRESETS)}) or a mapping, got {value!r}")
    tasks: dict[str, Task] = {}
    for name, settings in listed:
        if name in tasks:
            raise UserError(f"tasks: two tasks have the name {name!r}")
        tasks[name] = _task(name, settings)
    check_prefixes(tasks)
    return tasks


def _named(item: Any, several: bool) -> tuple[Any, Any]:
    if isinstance(item, str):
        checks.check_choice("tasks", item, tuple(PRESETS))
        return item, {"prefix": _PREFIXES.get(item, "") if several else ""}
    if isinstance(item, Task):
        return item.name, item
    if isinstance(item, Mapping):
        return item.get("name"), {key: setting for key, setting in item.items() if key != "name"}
    raise UserError(f"tasks must be names, settings with a name, or Task objects, got {item!r}")


def _task(name: Any, settings: Any) -> Task:
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"tasks: a task's name must be a text, got {name!r}")
    if isinstance(settings, Task):
        return replace(settings, name=name)
    allowed = [option.name for option in fields(Task)]
    if settings is not None and not isinstance(settings, Mapping):
        raise UserError(f"tasks: {name} must map {', '.join(allowed[1:])} to values, got {settings!r}")
    if unknown := [key for key in settings or () if key not in allowed]:
        raise UserError(f"tasks: {name}: unexpected {unknown[0]!r}; allowed are {', '.join(allowed[1:])}")
    return replace(PRESETS.get(name, Task()), **{**(settings or {}), "name": name})


def check_prefixes(tasks: Mapping[str, Task]) -> None:
    """Raise a ``UserError`` if prefixes are equal up to whitespace, which tokenizers may drop."""
    seen: dict[str, str] = {}
    for name, task in tasks.items():
        other = seen.setdefault(" ".join(task.prefix.split()), name)
        if other != name:
            raise UserError(f"tasks: {other} and {name} both have the prefix {task.prefix!r}; give each its own")


def answer_task(tasks: Mapping[str, Task]) -> Task:
    """The first task whose text contains the label. Raises a ``UserError`` without any."""
    found = next((task for task in tasks.values() if task.gives_label), None)
    if found is None:
        raise UserError(f"tasks: none of {', '.join(tasks)} gives a label: name {{label}} in a target or give a parser")
    return found


def rationale_task(tasks: Mapping[str, Task]) -> Task | None:
    """The task whose text contains the rationale: the answer task if it does, else the first that does."""
    giving = [task for task in tasks.values() if task.gives_rationale]
    answer = next((task for task in tasks.values() if task.gives_label), None)
    return answer if answer in giving else next(iter(giving), None)


def find_function(argument: str, path: str) -> Callable[[Any], Any]:
    """Import ``package.module.function``, of one argument. Raises a ``UserError`` that names ``argument`` otherwise."""
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        raise UserError(f"{argument}: not a function's import path (package.module.function): {path!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{argument}: {module_name!r} cannot be imported ({error})") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{argument}: {module_name!r} has no function {attribute!r}")
    if inspect.isbuiltin(function) or inspect.isclass(function):
        # `os._exit` takes an argument too
        raise UserError(f"{argument}: {path!r} is not a Python function")
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError) as error:
        raise UserError(f"{argument}: {path!r} does not take one argument ({error})") from error
    found: Callable[[Any], Any] = function
    return found
