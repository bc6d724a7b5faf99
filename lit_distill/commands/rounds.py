"""``rounds``: each round's student writes labels and rationales that the next one learns from."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import Namespace
from rich.console import Console

from lit_distill.annotation.conditions import is_condition
from lit_distill.annotation.record import Agree, Annotation, to_line, vote, with_votes
from lit_distill.annotation.store import FILE
from lit_distill.checks import check_int, check_range
from lit_distill.commands.annotate import show
from lit_distill.commands.compare import compare
from lit_distill.commands.experiment import accepted_arguments, with_location
from lit_distill.commands.inspect import build_data
from lit_distill.commands.parser import Option
from lit_distill.commands.settings import parse_settings, settle
from lit_distill.commands.train import train_parser
from lit_distill.data import RationaleDataModule
from lit_distill.data.outputs import RELEASED
from lit_distill.data.selection import check_columns, subset
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.experiments.cells import Cell, State
from lit_distill.experiments.grid import as_list, merge
from lit_distill.experiments.launch import Board, Local, run_cells
from lit_distill.experiments.report import show_event, summary_table
from lit_distill.files import atomic_write, write_text
from lit_distill.reading import json_lines
from lit_distill.tasks import Row, answer_task, rationale_task

_OPTIONS: Sequence[Option] = (
    ("rounds", int, 3, "Number of runs; the first has no student before it."),
    ("by", Literal["self_training", "complementary"], "self_training", "What a student gives to the next one."),
    ("out", str, "runs/rounds", "Folder of the rounds, finished and new."),
    ("samples", int, 5, "Sampled answers of a student to each row, which vote on its label."),
    ("temperature", float, 0.7, "Of these samples."),
    ("keep", str, "in_majority and vote_share >= 0.6", "Condition on which samples the next student learns from."),
)

INTERRUPTED = 130  # exit code after Ctrl-C

LABELS = "labels"
"""Folder of what a round's student wrote, in that of the round."""

WEIGHTS = "weights.jsonl"
LEAST_WEIGHT = 0.1
"""The weight of a row that a student is sure of; 1.1 has one on which no two of many samples agree."""

Rows = tuple[RationaleDataModule, Sequence[Row]]


def rounds(args: list[str]) -> None:
    """Run ``rounds``: a plain run of ``fit`` a round, between them the students' answers, and a report at the end.

    Round 0 is the config as it is. Its student answers the rows that have no gold label in it: those that
    ``train_fraction`` leaves out, rows without one, or with ``label_source: teacher`` all. Each later round starts from
    the config's own student, and learns from what the last round's said where ``keep`` holds (self-training: LiST,
    arXiv 2110.06274; from a weak teacher: Impossible Distillation, arXiv 2305.16635). ``keep`` sees no gold label.

    With ``by: complementary`` each student answers the rows that it trained on, and those that it is less sure of occur
    more often in the next round. At the end the first answers what it is sure of, the next ones the rest.

    Finished rounds are skipped, a stopped one resumes.
    """
    parser = train_parser("rounds")
    parser.add_options(_OPTIONS)
    config = parse_settings(parser, args)
    settle(config, "fit")
    _check(config)
    base = yaml.safe_load(parser.dump(config, skip_unset=False))
    own = {name: base.pop(name) for name, *_ in _OPTIONS}
    data = build_data(config)
    for task in filter(None, (answer_task(data.tasks), rationale_task(data.tasks))):
        if task.reads_output and task.after is None:
            raise UserError(f"tasks: {task.name}: rounds asks rows that no teacher answered, got input {task.input!r}")
    asked = rows_to_ask(data, own["by"]) if own["rounds"] > 1 else []
    cells = [cell_of(base, own, number) for number in range(own["rounds"])]
    for cell in cells:
        cell.check_folder()
    board: Board = {cell: cell.state for cell in cells}
    for number, cell in enumerate(cells):
        if board[cell] is not State.DONE:
            run_all([cell], Local(), board)
        if number + 1 < len(cells):
            path = answer_rows(cell, base, own, (data, asked))
            write, name = (write_labels, FILE) if own["by"] == "self_training" else (write_weights, WEIGHTS)
            if not (cell.folder / LABELS / name).exists():
                write(cell, path, data)
    Console().print(summary_table(board))
    if own["by"] == "complementary" and len(cells) > 1:
        together(cells, base, own, data)
    changed = "row_weights" if own["by"] == "complementary" else "pseudo_labels"
    # where each round has the labels of another teacher, there is no first one to compare with
    plain = len(cells) == 1 or (own["by"] == "self_training" and data.label_source == "teacher")
    compare([own["out"]], str(Path(own["out"]) / "report"), None if plain else f"{changed}=null")


def _check(config: Namespace) -> None:
    """Raise a ``UserError`` for what rounds cannot do, before any of them begins."""
    check_int("rounds", config["rounds"], 1, 100)
    check_int("samples", config["samples"], 2, 10_000)
    check_range("temperature", config["temperature"], above=0)
    arguments = config["data"]["init_args"]
    for name, condition, others in (
        ("keep", config["keep"], ("none",)),
        ("data.rationale_filter", arguments["rationale_filter"], ("none", "label_agrees")),
    ):
        if condition not in others and (not is_condition(condition) or condition in ("none", "label_agrees")):
            raise UserError(
                f"{name}: got {condition!r}; allowed in rounds is {', '.join(others)}, or a condition on columns"
            )
    check_columns(config["keep"], (), "keep")
    for name in ("pseudo_labels", "row_weights"):
        if arguments[name] is not None:
            raise UserError(f"data.{name}: rounds sets it itself, got {arguments[name]!r}")
    if arguments.get("streaming"):
        raise UserError("data.streaming: rounds needs all rows at once")
    if (config["model"]["init_args"].get("adapter") or {}).get("export") == "adapter":
        raise UserError("rounds: needs whole students: model.adapter.export: merged")


def run_all(cells: Sequence[Cell], launcher: Local, board: Board) -> None:
    """Run cells of a board. Ends with code 130 after Ctrl-C; raises a ``UserError`` if one failed."""
    for cell in cells:
        if board[cell] is not State.DONE:
            cell.lay_out(retry_failed=True)
    own: Board = {cell: cell.state for cell in cells}
    ended = run_cells(own, launcher, lambda changed, one: show_event(board | changed, one))
    board |= own
    for cell, state in own.items():
        if state is State.FAILED:
            raise UserError(f"{cell.name}: {cell.failure}")
    if not ended or any(state is not State.DONE for state in own.values()):
        print("To go on, run the same command.", file=sys.stderr)
        raise SystemExit(INTERRUPTED)


def rows_to_ask(data: RationaleDataModule, by: str) -> list[Row]:
    """The rows of train that students answer: those without a gold label in the first round, or that it trains on.

    Raises a ``UserError`` if there is none.
    """
    data.prepare_data()
    rows = data.split_rows("train")
    if rows is None:
        raise UserError(data.absence("train"))
    if by == "complementary":
        return list(data.used_rows("train").rows)
    if data.label_source == "teacher":
        return list(rows)
    drawn = set(subset(len(rows), data.train_fraction, data.seed).tolist())
    found = [row for place, row in enumerate(rows) if place not in drawn or row.label is None]
    if not found:
        raise UserError(
            "rounds: all rows of train have a gold label, so that a student has none to label: give a smaller"
            " data.train_fraction, rows without a label, or data.label_source teacher"
        )
    return found


def name_of(number: int) -> str:
    """The name of a round, and of its student as a teacher."""
    return f"round-{number}"


def cell_of(base: Mapping[str, Any], own: Mapping[str, Any], number: int) -> Cell:
    """A round's run: from the second on with what the student before it wrote."""
    folder, data = Path(own["out"]) / name_of(number), base["data"]["init_args"]
    teacher = name_of(number - 1)
    written, more = folder.parent / teacher / LABELS, dict[str, Any]()
    if number and own["by"] == "complementary":
        more = {"row_weights": str(written / WEIGHTS)}
    elif number and data["label_source"] == "teacher":
        # the student takes the teacher's place
        more = {"rationales": str(written), "rationale_filter": own["keep"], "pseudo_labels": teacher}
    elif number:
        rule = {"none": "", "label_agrees": " and agrees"}.get(data["rationale_filter"])
        rule = f" and ({data['rationale_filter']})" if rule is None else rule
        keep = "" if own["keep"] == "none" else f" and ({own['keep']})"
        kept = f"(teacher == '{teacher}'{keep}) or (teacher != '{teacher}'{rule})"
        rationales = [*as_list(data["rationales"] or RELEASED), str(written)]
        more = {"rationales": rationales, "rationale_filter": kept, "pseudo_labels": teacher}
    config = merge(base, {"data": {"init_args": more}}, accepted_arguments)
    return Cell(folder.name, folder, with_location(config, folder))


def answer_rows(cell: Cell, base: Mapping[str, Any], own: Mapping[str, Any], given: Rows | Split) -> Path:
    """Let a round's student answer rows of train, or a split, unless it has; return the file of predictions.

    Raises a ``UserError`` if it has answered other rows, or with other samples.
    """
    folder = cell.folder / LABELS
    name = given if isinstance(given, str) else "train"
    path = folder / f"{name}.predictions.jsonl"
    files = {}
    data = merge(base["data"], {"init_args": {"predict_split": name}}, accepted_arguments)
    if not isinstance(given, str):
        module, rows = given
        asked = [{"id": row.id, "input": row.input, "choices": row.choices} for row in rows]
        files["rows.jsonl"] = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in asked)
        same = ("max_source_length", "max_target_length", "batch_size", "eval_batch_size", "num_workers")
        alone = {
            "predict": str(folder / "rows.jsonl"),
            "metric": module.metric,
            "label_set": module.label_set and list(module.label_set),
            **{name: data["init_args"][name] for name in same},
        }
        data = {"class_path": "lit_distill.data.jsonl.JSONLDataModule", "init_args": alone}
    student = {
        "student": str(cell.folder / "student"),
        "vote": {"samples": own["samples"], "temperature": own["temperature"]},
        # the student is whole, and only answers
        **{"from_scratch": False, "adapter": None, "teachers": None, "objectives": None},
    }
    config = merge(base, {"model": {"init_args": student}}, accepted_arguments)
    config |= {"data": data, "trainer": {**base["trainer"], "logger": False}, "predictions": str(path)}
    files[f"{name}.yaml"] = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    if path.exists():
        for file, text in files.items():
            if (folder / file).exists() and (folder / file).read_text(encoding="utf-8") != text:
                raise UserError(f"{folder / file}: would be another one; give another out, or delete {folder}")
        return path
    folder.mkdir(exist_ok=True)
    for file, text in files.items():
        write_text(folder / file, text)
    command = [sys.executable, "-m", "lit_distill", "predict", "--config", str(folder / f"{name}.yaml")]
    with (folder / "log.txt").open("ab") as log:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)  # noqa: S603 - our own program
    if ended.returncode:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        raise UserError(f"{cell.name}: its student could not answer rows: {lines[-1] if lines else 'no output'}")
    return path


def write_labels(cell: Cell, path: Path, data: RationaleDataModule) -> None:
    """Write a student's answers as samples of a teacher."""
    with atomic_write(cell.folder / LABELS / FILE, "wb") as file:
        for _, row in json_lines(path):
            samples = [
                Annotation(
                    row["id"],
                    split="train",
                    sample=number,
                    teacher=cell.name,
                    text=answer["text"],
                    rationale=answer["rationale"] or row["rationale"],
                    label=answer["label"],
                    parsed=answer["label"] is not None,
                    logprob=answer["log_probability"] / answer["tokens"],
                    output_tokens=answer["tokens"],
                )
                for number, answer in enumerate(row["paths"])
            ]
            file.writelines(map(to_line, with_votes(samples, data.teacher_agrees)))


def sureness(row: Mapping[str, Any], agree: Agree) -> float:
    """The share of a row's sampled answers that are its most frequent one."""
    return vote([answer["label"] for answer in row["paths"]], agree)[1]


def write_weights(cell: Cell, path: Path, data: RationaleDataModule) -> None:
    """Write weights of rows: the higher, the less sure a student is of its answer."""
    with atomic_write(cell.folder / LABELS / WEIGHTS) as file:
        for _, row in json_lines(path):
            weight = 1 - sureness(row, data.teacher_agrees) + LEAST_WEIGHT
            file.write(json.dumps({"id": row["id"], "weight": round(weight, 6)}) + "\n")


def together(cells: Sequence[Cell], base: Mapping[str, Any], own: Mapping[str, Any], data: RationaleDataModule) -> None:
    """Let the first student answer test rows that it is sure of, and the next ones the others; print the accuracies.

    A student is sure of a row if so many of its samples agree; the share is chosen on val. Each answer is its vote.
    """

    def answers(split: Split) -> list[list[tuple[float, bool]]]:
        """The sureness of each student about each row, and whether it is right."""
        files = [answer_rows(cell, base, own, split) for cell in cells]
        rows = zip(*(json_lines(path) for path in files), strict=True)
        return [[(sureness(row, data.teacher_agrees), bool(row["vote_correct"])) for _, row in same] for same in rows]

    def right(rows: Sequence[Sequence[tuple[float, bool]]], share: float) -> float:
        """The accuracy of all together."""
        chosen = [next((own for own in row if own[0] >= share), row[-1]) for row in rows]
        return sum(correct for _, correct in chosen) / len(rows)

    val, test = answers("val"), answers("test")
    shares = sorted({sure for row in val for sure, _ in row} | {1.1})
    # of equals the one that asks the first student most often
    share = max(shares, key=lambda one: (right(val, one), -one))
    found = {
        "share": share,
        "answered by the first": sum(row[0][0] >= share for row in test) / len(test),
        **{f"{cell.name} alone": sum(row[i][1] for row in test) / len(test) for i, cell in enumerate(cells)},
        "together": right(test, share),
    }
    write_text(Path(own["out"]) / "together.json", json.dumps(found, indent=2) + "\n")
    show(f"{data.name} test: students together, by votes of {own['samples']} samples", found)
