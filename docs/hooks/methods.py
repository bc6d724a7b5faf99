"""A page for each overlay of ``configs/method``: its comment, its loss, a drawing and its objectives' docstrings."""

import ast
import inspect
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from drawing import Box, draw

from lit_distill.tasks import Task, tasks_from

OBJECTIVES = "lit_distill/objectives"

READS = {
    "answer_consistency": "the label's distributions under two rationales",
    "attention": "attention scores of mapped layers",
    "contrastive": "encoder states under two dropout masks",
    "distributions": "distributions at the data's target tokens",
    "exits": "answers from lower decoder layers",
    "hidden": "hidden states of mapped layers",
    "mutual_information": "mean states of mapped layers",
    "mutual_information_cot": "predictions of a row's label and rationale",
    "own_text": "distributions at texts that the student samples",
    "progressive": "distributions, one teacher after the other",
    "teacher_dropping": "distributions of several teachers",
}
"""What the objectives of each module compare, in a drawing."""


class ObjectiveClass(NamedTuple):
    """What an objective's source says of it."""

    module: str
    term: str
    texts: dict[str, str]  # of the class and of the functions that it names


class Method:
    """An overlay, read from its file.

    Args:
        path: the overlay.
        root: the repository.
    """

    def __init__(self, path: Path, root: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self.name = path.stem
        head = re.match(r"(?:#.*\n)+", text)
        if head is None:
            raise ValueError(f"{path} has no comment with its command and its source")
        self.command, *comment = (line[1:].removeprefix(" ") for line in head[0].splitlines())
        self.comment, self.settings = "\n".join(comment), text[head.end() :]
        arguments = yaml.safe_load(self.settings)["model"]["init_args"]
        self.tasks = _with_defaults(arguments.get("tasks") or {})
        self.teachers: dict[str, dict[str, Any]] = arguments.get("teachers") or {}
        self.objectives = [
            (_find(root, given["class_path"]), given["class_path"], given.get("init_args") or {})
            for given in arguments.get("objectives+") or []
        ]

    @property
    def in_rounds(self) -> bool:
        """Whether it is a method of the command ``rounds``."""
        return " rounds " in self.command

    def loss(self) -> str:
        """The whole loss, in LaTeX: each task's and each objective's, with its weight."""
        terms = [(task.weight, task.name) for task in self.tasks.values()]
        terms += [(given.get("weight", 1.0), _term(found, given)) for found, _, given in self.objectives]
        return "L = " + " + ".join(f"{_factor(weight)}L_\\text{{{_plain(name)}}}" for weight, name in terms if weight)

    def page(self) -> str:
        """The page, in Markdown."""
        listed = "\n".join(f"    {line}" for line in self.settings.rstrip().splitlines())
        # what begins a line with blanks is an example of a command
        comment = re.sub(r"\n  +(\S.*)", r"\n\n```text\n\1\n```\n\n", self.comment)
        parts = [
            f"# {self.name}",
            _with_links(comment),
            f"```bash\n{self.command}\n```",
            f".. math:: {self.loss()}",
            "Each term is a mean over the optimizer step: of a task over its target tokens. `label` and `rationale` are"
            " those of step-by-step.",
            f"![What {self.name} reads, what the student writes, and the terms of its loss]({self.name}.svg)",
        ]
        for name, found in {name: found for found, name, _ in self.objectives}.items():
            own, *functions = found.texts.items()
            texts = [own[1], *(f"`{function}`: {text}" for function, text in functions)]
            parts += [f"## `{name}`", *map(_with_links, texts)]
            parts.append(f"Its arguments are in [the reference][lit_distill.objectives.{name}].")
        parts += [f'??? note "The overlay, configs/method/{self.name}.yaml"\n\n    ```yaml\n{listed}\n    ```']
        return "\n\n".join(parts) + "\n"

    def drawing(self) -> str:
        """What is read, by whom, and what it is compared with, as SVG."""
        tasks = [task for task in self.tasks.values() if task.weight]
        rows = [
            (Box("reads", _reads(task)), Box("writes", [f"{_factor_text(task.weight)}{task.name}", _target(task)]))
            for task in tasks
        ]
        terms = [
            Box("objective", [f"{_factor_text(given.get('weight', 1.0))}{_term(found, given)}", READS[found.module]])
            for found, _, given in self.objectives
        ]
        teachers = [_teacher(name, given) for name, given in self.teachers.items()]
        again = "the next round learns from what this student answers" if self.in_rounds else ""
        return draw(rows, terms, teachers, again)


@cache
def methods(root: Path) -> list[Method]:
    """All overlays, by name."""
    return [Method(path, root) for path in sorted((root / "configs" / "method").glob("*.yaml"))]


def _with_defaults(given: dict[str, Any]) -> dict[str, Task]:
    """The overlay's tasks laid over those of step-by-step."""
    base = tasks_from(["label", "rationale"])
    return {
        name: replace(base.get(name, Task(name)), **given.get(name) or {}) for name in dict.fromkeys((*base, *given))
    }


def _find(root: Path, name: str) -> ObjectiveClass:
    """Read an objective without importing torch."""
    for path in sorted((root / OBJECTIVES).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        if isinstance(node := known.get(name), ast.ClassDef):
            texts = {name: _prose(node)}
            for other in re.findall(r"`(\w+)`", texts[name]):
                if other in known and other != name:
                    texts[other] = _prose(known[other])
            terms = [
                line.value.value
                for line in node.body
                if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)
                for target in line.targets
                if isinstance(target, ast.Name) and target.id == "term"
            ]
            return ObjectiveClass(path.stem, str(terms[0]) if terms else name.lower(), texts)
    raise ValueError(f"no objective {name!r} in {OBJECTIVES}")


def _prose(node: ast.ClassDef | ast.FunctionDef) -> str:
    """A docstring without its arguments."""
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    return re.split(r"^(?:Args|Returns|Raises):\n", text, flags=re.MULTILINE)[0].strip()


def _with_links(text: str) -> str:
    return re.sub(r"arXiv\s+(\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _term(found: ObjectiveClass, given: dict[str, Any]) -> str:
    return str(given.get("name") or found.term)


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _factor(weight: float) -> str:
    return "" if weight == 1 else f"{weight:g} \\, "


def _factor_text(weight: float) -> str:
    return "" if weight == 1 else f"{weight:g} \u00d7 "


def _reads(task: Task) -> list[str]:
    """The template of a task's input, in a line or two."""
    first, *rest = f"{task.prefix}{task.input}".split("\n")
    return [first, *[" ".join(rest) + (", at test the student's own" if task.after else "")][: len(rest)]]


def _target(task: Task) -> str:
    """The template of a task's target, and which outputs of whom it takes."""
    chosen = [
        f"kind {task.kind}" if task.kind != "rationale" and task.kind != task.name else "",
        f"by {task.teacher}" if task.teacher else "",
        {"first": "", "all": "all samples", "sample": "a random sample", "vote": "the majority's"}[task.select],
    ]
    return ", ".join([task.target, *filter(None, chosen)])


def _teacher(name: str, given: dict[str, Any]) -> str:
    models = given["model"]
    return f"{name} ({len(models)})" if isinstance(models, list) else name
