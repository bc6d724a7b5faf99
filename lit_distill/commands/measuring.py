"""A student with its tasks and the test rows of a config, for the commands that measure one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace

from lit_distill.checks import check_new_folder, check_range
from lit_distill.commands.inspect import build_data
from lit_distill.commands.parser import Option
from lit_distill.commands.settings import parse_settings
from lit_distill.commands.train import train_parser
from lit_distill.data import RationaleDataModule
from lit_distill.errors import UserError
from lit_distill.evaluation.metrics import judge
from lit_distill.exporting.engine import Engine
from lit_distill.exporting.parity import Rows
from lit_distill.exporting.predictor import Predictor, recorded_tasks
from lit_distill.modules.base import LIMITS_KEY
from lit_distill.students import StudentFiles
from lit_distill.tasks import Task, answer_task

ROWS = 200


@dataclass(frozen=True)
class Subject:
    """What a student is measured on."""

    rows: Rows
    tasks: dict[str, Task]
    beams: dict[str, int]
    settings: dict[str, Any]  # further arguments of a `Predictor`

    def predictor(self, engine: Engine) -> Predictor:
        """The student as an engine runs it."""
        return Predictor(engine, self.tasks, self.beams, **self.settings)


def student_first(args: list[str], example: str) -> tuple[str, list[str]]:
    """The student, which is given first, and the other arguments; those of a run begin with its config."""
    if not args or (args[0].startswith("-") and args[0] not in ("--help", "-h", "--print_config")):
        raise UserError(f"student: must be given first, as in `lit-distill {example}`")
    if args[0].startswith("-"):
        return "", args
    student, *given = args
    trained = Path(student) / "config.yaml"
    named = any(word.partition("=")[0] in ("-c", "--config", "--data") for word in given)
    if trained.is_file() and not named:
        given = [f"--config={trained}", *given]
    return student, given


def parse_arguments(command: str, args: list[str], options: Sequence[Option]) -> tuple[str, Namespace]:
    """The student, which is given first, and the config; checks ``out`` and ``rows``, and sets the threads."""
    student, given = student_first(args, f"{command} RUN --out FOLDER")
    parser = train_parser(command, model=False)
    parser.add_options(options)
    config = parse_settings(parser, given)
    check_new_folder("out", config["out"])
    check_range("rows", config["rows"], at_least=1, whole=True)
    if config["cpu_threads"] is not None:
        torch.set_num_threads(config["cpu_threads"])
    return student, config


def read_subject(files: StudentFiles, config: Namespace) -> Subject:
    """The student's tasks, and test rows of the config. Raises a ``UserError`` if there are fewer than asked for."""
    recorded, beams = recorded_tasks(files.config)
    tokens = files.tokens()
    data = _data(config, recorded)
    data.tokenizer = tokens
    answer_task(data.tasks)
    rows = _rows(data, config["rows"])
    method = (config.get("model") or Namespace()).get("init_args") or Namespace()
    tasks = _with_lengths(data.tasks, files, recorded, method)
    return Subject(
        rows=rows,
        tasks=tasks,
        beams=dict.fromkeys(tasks, method.get("num_beams", 1)) | beams,
        settings={"max_source_length": data.max_source_length, "labels": data.label_set},
    )


def _data(config: Namespace, recorded: dict[str, Task]) -> RationaleDataModule:
    """The data module of the config; without a method its tasks are those that the student recorded."""
    arguments = config["data"]["init_args"]
    if not config.get("model") and recorded and arguments["tasks"] in (["label"], ("label",)):
        arguments["tasks"] = recorded
    return build_data(config)


def _with_lengths(
    tasks: dict[str, Task], files: StudentFiles, recorded: dict[str, Task], method: Namespace
) -> dict[str, Task]:
    """The tasks with their maximum lengths: as configured, or else as the student knows them."""
    known = dict((files.checkpoint or {}).get(LIMITS_KEY, {}))
    known |= {name: task.max_new_tokens for name, task in recorded.items()}
    given = method.get("max_label_length"), method.get("max_rationale_length")
    return {
        name: replace(task, max_new_tokens=task.max_length(*given, known.get(name))) for name, task in tasks.items()
    }


def _rows(data: RationaleDataModule, number: int | None) -> Rows:
    """Rows from all over the test split. Raises a ``UserError`` if there are fewer than are asked for."""
    data.prepare_data()
    data.setup("test")
    key, tokens = data.answer_key("test"), data.token_rows("test")
    wanted = ROWS if number is None else number
    if len(key) < wanted:
        hint = f"; --rows {len(key)} takes all of them" if number is None else ""
        raise UserError(f"rows: test has {len(key)} rows, {wanted} are needed{hint}")
    places = np.linspace(0, len(key) - 1, wanted).round().astype(int).tolist()
    pairs: dict[str, list[tuple[list[int], list[int]]]] = {task: [] for task in data.tasks}
    for row in (tokens[place] for place in places):
        for task, own in pairs.items():
            own += zip(row[f"{task}.input_ids"], row[f"{task}.labels"], strict=False)
    return Rows(
        inputs=[key.inputs[place] for place in places],
        labels=[str(key.labels[place]) for place in places],
        judge=judge(key.metric),
        targets={task: ([source for source, _ in own], [target for _, target in own]) for task, own in pairs.items()},
    )
