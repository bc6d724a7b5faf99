"""A trained student with its tasks: texts in, texts and likelihoods out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lit_distill.exporting.engine import Engine, EngineName, load_engine
from lit_distill.students import StudentFiles
from lit_distill.tasks import PRESETS, Row, Task, TeacherOutput, tasks_from

REPORT = "export.json"
"""What an export says of itself, beside its files."""

_RECORDED = ("prefix", "input", "after", "target", "parser")


class Predictor:
    """A student with its tasks.

    Args:
        engine: computes.
        tasks: by name.
        num_beams: of each task that is not decoded greedily.
        max_source_length: tokens that an input is cut to.
        labels: the closed set of labels, if there is one.
    """

    def __init__(
        self,
        engine: Engine,
        tasks: Mapping[str, Task],
        num_beams: Mapping[str, int] | None = None,
        max_source_length: int = 1024,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.engine, self.tokens = engine, engine.tokens
        self.tasks, self.num_beams = dict(tasks), dict(num_beams or {})
        self.max_source_length, self.labels = max_source_length, labels

    def sources(self, inputs: Sequence[str], task: str) -> list[list[int]]:
        """The token ids of each input, with what the student writes for the task that this one comes after, if any."""
        own = self.tasks[task]
        outputs: list[TeacherOutput | None] = [None] * len(inputs)
        if own.after is not None:
            parsed = map(self.tasks[own.after].read, self.generate(inputs, own.after))
            outputs = [TeacherOutput(one.rationale, one.label) for one in parsed]
        texts = [own.source(Row("", text, None), output) for text, output in zip(inputs, outputs, strict=True)]
        return self.tokens.sources(texts, self.max_source_length).ids

    def generate(self, inputs: Sequence[str], task: str, *, num_beams: int | None = None) -> list[str]:
        """The student's text for each input; ``Task.read`` parses it."""
        beams, length = num_beams or self.num_beams.get(task, 1), self.tasks[task].max_length()
        ids = self.engine.generate(self.sources(inputs, task), max_new_tokens=length, num_beams=beams)
        return self.tokens.decode(ids)

    def likelihoods(self, inputs: Sequence[str], labels: Sequence[str], task: str) -> list[list[float]]:
        """Log-likelihood in nats of each label as the whole target, for each input."""
        own = self.tasks[task]
        texts = [own.target.format(label=label, input=text) for text in inputs for label in labels]
        targets = self.tokens.targets(texts, 10**9).ids
        scores = iter(self.engine.score([ids for ids in self.sources(inputs, task) for _ in labels], targets))
        return [[next(scores) for _ in labels] for _ in inputs]


def load_predictor(folder: str | Path, engine: EngineName | None = None) -> Predictor:
    """A run, a folder, a checkpoint, a hub name or an export, with the tasks that it recorded or else a label alone.

    Raises a ``UserError`` if it cannot be read, or is not for this engine.
    """
    tasks, beams = own_tasks(StudentFiles(folder).config)
    report = Path(folder) / REPORT
    data = json.loads(report.read_text(encoding="utf-8"))["data"] if report.is_file() else {}
    return Predictor(load_engine(folder, engine), tasks, beams, **data)


def record_task(task: Task, generation: Mapping[str, int]) -> dict[str, Any]:
    """What a student's configuration says of a task, in plain types: its input and target, and how it is generated."""
    preset = PRESETS.get(task.name, Task())
    own = {key: value for key in _RECORDED if (value := getattr(task, key)) != getattr(preset, key)}
    return {**own, "prefix": task.prefix, **generation}


def own_tasks(config: Mapping[str, Any]) -> tuple[dict[str, Task], dict[str, int]]:
    """As `recorded_tasks`; without any, a label alone."""
    tasks, beams = recorded_tasks(config)
    return tasks or tasks_from(["label"]), beams


def recorded_tasks(config: Mapping[str, Any]) -> tuple[dict[str, Task], dict[str, int]]:
    """The tasks that `record_task` left in a student's configuration, and their beams.

    Others' ``task_specific_params`` are no tasks. Raises a ``UserError`` if one is invalid.
    """
    found = config.get("task_specific_params") or {}
    known = {"num_beams", *(field.name for field in fields(Task))}
    if not found or any(not isinstance(one, dict) or {*one} - known for one in found.values()):
        return {}, {}
    beams = {name: one.get("num_beams", 1) for name, one in found.items()}
    plain = {name: {key: one[key] for key in one if key != "num_beams"} for name, one in found.items()}
    return tasks_from(plain), beams
