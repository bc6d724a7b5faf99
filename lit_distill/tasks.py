"""Rows with their teacher outputs, and the tasks that a student is trained on."""

import hashlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from string import Formatter
from typing import Any, Literal, NamedTuple, get_args

from lit_distill import checks
from lit_distill.errors import UserError

# one for all outputs: there may be millions
_NO_COLUMNS: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class TeacherOutput:
    """One of a teacher's outputs for a row."""

    text: str | None  # the rationale, program, or other text; `None` where the output did not parse
    label: str | None = None  # the teacher's answer; `None` where it gave none, or the output did not parse
    teacher: str | None = None  # the teacher's name, if known
    kind: str = "rationale"  # what the text is, such as `rationale` or `program`
    columns: Mapping[str, Any] = field(default_factory=lambda: _NO_COLUMNS, hash=False)  # for filters and templates


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a dataset."""

    id: str  # unique in its split
    input: str  # the student's input, without a prefix
    label: str | None  # the gold label, or the one to train on
    choices: tuple[str, ...] | None = None  # the row's own closed choices
    outputs: tuple[TeacherOutput, ...] = ()
    group: str | None = None  # in evaluation, the group that it counts in

    @property
    def first(self) -> TeacherOutput | None:
        """The first output, of kind ``rationale`` if there is one: other kinds may be wrong by design."""
        usual = (output for output in self.outputs if output.kind == "rationale")
        return next(usual, self.outputs[0] if self.outputs else None)

    @property
    def rationale(self) -> str | None:
        """The text of the `first` output."""
        return self.first.text if self.first else None

    @property
    def teacher_label(self) -> str | None:
        """The label of the `first` output."""
        return self.first.label if self.first else None

    @property
    def columns(self) -> Mapping[str, Any]:
        """The columns of the `first` output."""
        return self.first.columns if self.first else {}


RowFilter = Callable[[Row], bool]
"""Whether to train on a teacher output, given the row with this output alone."""


def fingerprint(rows: Iterable[Row], *, rationales: bool = False) -> str:
    """A hash of rows in their order: ids, inputs, labels, and with ``rationales`` the teachers' texts."""
    found = hashlib.sha256()
    for row in rows:
        texts = [output.text for output in row.outputs] or [None]
        values = [row.id, row.input, row.label, *(texts if rationales else [])]
        found.update(json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return found.hexdigest()[:16]


Select = Literal["first", "all", "sample", "vote"]


class Parsed(NamedTuple):
    """The label and rationale in a student's text; ``None`` for a part that its task does not have."""

    label: str | None = None
    rationale: str | None = None


@dataclass(frozen=True)
class Task:
    """One task of a student. Its name has no meaning of its own."""

    name: str = ""  # key of its batch and its loss term
    prefix: str = ""  # put before each input
    input: str = "{input}"
    """Template of the student's input: the fields of ``target`` but ``{label}``, and ``{candidates}``, what all of the
    row's outputs say. A field is empty in evaluation if there is no output; in training there is no target then.
    """
    after: str | None = None
    """In evaluation the input has the text that the student writes for this task, in place of the teacher output."""
    target: str = "{label}"
    """Template over ``{label}``, ``{rationale}`` (the text of the teacher output), ``{teacher_label}`` (its label),
    ``{input}`` and columns of that output.
    """
    parser: str | None = None
    """Import path of ``(text) -> label`` or ``(text) -> Parsed``; by default the template is inverted."""
    weight: float = 1.0  # of its cross-entropy in the total loss
    final_weight: float | None = None  # of the last optimizer step, to which ``weight`` moves linearly
    max_new_tokens: int | None = None  # by default 1.5 times the longest target in train
    teacher: str | None = None  # use only the outputs of this teacher
    kind: str = "rationale"  # use only outputs of this kind
    select: Select = "first"
    """Of a row's outputs use the ``first``, ``all`` (each as a target), a random ``sample`` in each epoch, or by
    ``vote`` the first one with the most frequent label. Evaluation uses the first where training uses several.
    """
    draws: int = 1  # different outputs in a random ``sample``

    def __post_init__(self) -> None:
        place = f"tasks: {self.name}" if self.name else "tasks"
        for name in ("name", "prefix", "input", "after", "target", "kind", "parser", "teacher"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name in ("after", "parser", "teacher")):
                raise UserError(f"{place}: {name} must be a text, got {value!r}")
        checks.check_choice(f"{place}: select", self.select, get_args(Select))
        checks.check_range(f"{place}: weight", self.weight, at_least=0)
        checks.check_range(f"{place}: final_weight", self.final_weight, at_least=0)
        checks.check_range(f"{place}: max_new_tokens", self.max_new_tokens, at_least=1, below=10_001, whole=True)
        checks.check_range(f"{place}: draws", self.draws, at_least=1, whole=True)
        if self.draws > 1 and self.select != "sample":
            raise UserError(f"{place}: draws is for select: sample, got select: {self.select}")
        read = checks.check_format(f"{place}: input", self.input)
        if not all(name.isidentifier() for name in read) or "label" in read or not {"input", "candidates"} & {*read}:
            raise UserError(
                f"{place}: input must name {{input}} or {{candidates}}, and may name {{rationale}}, {{teacher_label}}"
                f" and columns in braces, but not {{label}}, got {self.input!r:.200}"
            )
        if self.after is not None and "rationale" not in read:
            raise UserError(
                f"{place}: after: {self.after} needs an input that names {{rationale}}, got {self.input!r:.200}"
            )
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

    def weight_at(self, done: float) -> float:
        """The weight after this share of the run's optimizer steps."""
        return self.weight if self.final_weight is None else (1 - done) * self.weight + done * self.final_weight

    @property
    def template_fields(self) -> list[str]:
        """The fields of the template, in order."""
        return _split(self.target)[0]

    @property
    def columns(self) -> list[str]:
        """The columns of a teacher output that inputs and targets need."""
        named = [*_split(self.input)[0], *self.template_fields]
        return [name for name in named if name not in ("label", *_FIELDS)]

    @property
    def reads_output(self) -> bool:
        """Whether the student's input has something of a teacher output."""
        return any(name != "input" for name in _split(self.input)[0])

    @property
    def uses_output(self) -> bool:
        """Whether inputs or targets need a teacher output."""
        return self.reads_output or any(name not in ("label", "input") for name in self.template_fields)

    @property
    def needs_label(self) -> bool:
        """Whether targets contain the label."""
        return "label" in self.template_fields

    @property
    def gives_label(self) -> bool:
        """Whether a label is parsed from the student's text."""
        return self.parser is not None or self.needs_label

    @property
    def gives_rationale(self) -> bool:
        """Whether the student's text contains a rationale."""
        return "rationale" in self.template_fields

    @property
    def scores_labels(self) -> bool:
        """Whether a label alone makes a target, so that closed choices can be scored."""
        return self.needs_label and set(self.template_fields) <= {"label", "input"}

    @property
    def ends_in_label(self) -> bool:
        """Whether the label is the last of several fields."""
        return len(self.template_fields) > 1 and self.template_fields[-1] == "label"

    def max_length(self, label: int | None = None, rationale: int | None = None, known: int | None = None) -> int:
        """Maximum tokens of the student's text: ``max_new_tokens``, or else the sum over its parts.

        ``label`` and ``rationale`` are the configured lengths of these parts. Where one is not, ``known`` is what the
        targets of train need, or else a label has 64 and a rationale 256.
        """
        parts = [(label, 64)] if self.gives_label else []
        if self.gives_rationale or not self.gives_label:
            parts.append((rationale, 256))
        length = sum(configured or 0 for configured, _ in parts)
        if any(configured is None for configured, _ in parts):
            length += sum(usual for _, usual in parts) if known is None else known
        return self.max_new_tokens or length

    def accepts(self, output: TeacherOutput) -> bool:
        """Whether an output has the task's teacher and kind."""
        return output.kind == self.kind and self.teacher in (None, output.teacher)

    def said(self, row: Row) -> list[TeacherOutput]:
        """The outputs of a row that it accepts and that have a text."""
        return [output for output in row.outputs if self.accepts(output) and output.text is not None]

    def render(self, row: Row, output: TeacherOutput | None = None) -> str | None:
        """The target for a row and a teacher output; ``None`` where a field of it or of the input is missing."""
        values = {**self._fields(row, output), "label": row.label}
        if any(values.get(name) is None for name in (*self.template_fields, *_split(self.input)[0])):
            return None
        return self.target.format_map(values)

    def source(self, row: Row, output: TeacherOutput | None = None) -> str:
        """The student's input for a row and a teacher output, with the prefix; a missing field is empty."""
        if self.input == "{input}":
            return self.prefix + row.input
        known = self._fields(row, output)
        names = _split(self.input)[0]
        return self.prefix + self.input.format_map({name: known.get(name) or "" for name in names}).strip()

    def _fields(self, row: Row, output: TeacherOutput | None) -> dict[str, Any]:
        """The fields of templates but the label."""
        values: dict[str, Any] = {"input": row.input}
        if output is not None:
            values = {**output.columns, **values, "rationale": output.text, "teacher_label": output.label}
        if "candidates" in self.input and (said := self.said(row)):
            whole = [RATIONALE_LABEL.target.format(rationale=one.text, label=one.label or "unknown") for one in said]
            values["candidates"] = "\n".join(f"({number}) {text}" for number, text in enumerate(whole, start=1))
        return values

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
        text = text.strip().removeprefix(marks[0].strip()).removesuffix(marks[-1].strip())
        match = _pattern(self.target).fullmatch(text)
        whole_to = "label" if "label" in names else names[0]
        parts = match.groupdict() if match else dict.fromkeys(names, "") | {whole_to: text}
        stripped = {name: part.strip() for name, part in parts.items()}
        return Parsed(stripped.get("label"), stripped.get("rationale"))

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


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """The template's fields, without the literal texts before the first and after the last one."""
    names, marks = _split(template)
    at = names.index("label") if "label" in names else 0
    pattern = ""
    for i, name in enumerate(names):
        if i > 0:
            pattern += re.escape(marks[i].strip())
        # as much as possible before the label, which follows the last of its marks
        text = ".*" if i < at or name == names[-1] else ".*?"
        pattern += f"(?P<{name}>{text})"
    return re.compile(pattern, re.DOTALL)


_FIELDS = ("input", "rationale", "teacher_label", "candidates")
"""The fields of an input's template, besides columns."""

LABEL = Task("label")
RATIONALE = Task("rationale", target="{rationale}")
RATIONALE_LABEL = Task("rationale_label", target="{rationale} So the answer is {label}")
LABEL_RATIONALE = Task("label_rationale", target="{label} Rationale: {rationale}")

PRESETS = {task.name: task for task in (LABEL, RATIONALE, RATIONALE_LABEL, LABEL_RATIONALE)}
"""The tasks of the paper and of the single-task baselines, by name."""

TEXT = Task("text", target="{input}")
"""What a student that reads a corpus is trained on: texts, without labels."""

_PREFIXES = {"label": "predict: ", "rationale": "explain: "}


def tasks_from(value: Any) -> dict[str, Task]:
    """Tasks by name, from a mapping of names to settings or `Task` objects, or a list of names in ``PRESETS``.

    A name in ``PRESETS`` starts from that task's settings; in a list of several, ``label`` and ``rationale`` have the
    prefixes of the paper's code. Raises a ``UserError`` if there is no task, two share a prefix, or a setting is
    invalid.
    """
    if isinstance(value, str) or not isinstance(value, Mapping | Sequence) or not value:
        raise UserError(f"tasks must be a list of names ({', '.join(PRESETS)}) or a mapping, got {value!r}")
    if not isinstance(value, Mapping):
        for name in value:
            checks.check_choice("tasks", name, tuple(PRESETS))
        if len(set(value)) < len(value):
            raise UserError(f"tasks must have different names, got {value!r}")
        value = {name: {"prefix": _PREFIXES.get(name, "")} if len(value) > 1 else {} for name in value}
    tasks = {name: _task(name, settings) for name, settings in value.items()}
    seen: dict[str, str] = {}
    for name, task in tasks.items():
        # tokenizers may drop whitespace
        other = seen.setdefault(" ".join(task.prefix.split()), name)
        if other != name:
            raise UserError(f"tasks: {other} and {name} both have the prefix {task.prefix!r}; give each its own")
        before = None if task.after is None else tasks.get(task.after)
        if task.after is not None and (before is None or before.after is not None or not before.gives_rationale):
            giving = [name for name, one in tasks.items() if one.gives_rationale and one.after is None]
            raise UserError(
                f"tasks: {name}: after must name a task that writes a rationale from the input alone"
                f" ({', '.join(giving) or 'there is none'}), got {task.after!r}"
            )
        known = ("input", "rationale", *["teacher_label"] * bool(before and before.gives_label))
        if task.after is not None and (strange := [field for field in _split(task.input)[0] if field not in known]):
            raise UserError(f"tasks: {name}: after {task.after}, input may name {', '.join(known)}, got {strange[0]!r}")
    return tasks


def _task(name: Any, settings: Any) -> Task:
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"tasks: a task's name must be a text, got {name!r}")
    if isinstance(settings, Task):
        return replace(settings, name=name)
    allowed = [option.name for option in fields(Task) if option.name != "name"]
    if settings is not None and not isinstance(settings, Mapping):
        raise UserError(f"tasks: {name} must map {', '.join(allowed)} to values, got {settings!r}")
    if unknown := [key for key in settings or () if key not in allowed]:
        raise UserError(f"tasks: {name}: unexpected {unknown[0]!r}; allowed are {', '.join(allowed)}")
    return replace(PRESETS.get(name, Task()), name=name, **settings or {})


def task_texts(tasks: Mapping[str, Task]) -> dict[str, list[str]]:
    """Prefixes, inputs and targets in plain types, to compare with those of the data module or a checkpoint."""
    return {
        # older checkpoints have no input
        name: [task.prefix, *([] if task.input == "{input}" else [task.input]), task.target]
        for name, task in tasks.items()
    }


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
    try:
        function = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{argument}: {path!r} cannot be imported ({error})") from error
    if not callable(function) or inspect.isbuiltin(function) or inspect.isclass(function):
        # `os._exit` takes an argument too
        raise UserError(f"{argument}: {path!r} is not a Python function (package.module.function)")
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError) as error:
        raise UserError(f"{argument}: {path!r} does not take one argument ({error})") from error
    found: Callable[[Any], Any] = function
    return found
