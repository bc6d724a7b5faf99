"""``fit --help`` and its like on one screen: our own arguments, read from the sources without importing them."""

import ast
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lit_distill.messages import COMMANDS

COMMANDS_IN_SHORT = ("fit", "validate", "test", "predict", "inspect")
"""The commands whose whole help has hundreds of lines, most of them the trainer's."""


class Argument(NamedTuple):
    """One line of help."""

    default: str
    """As YAML has it; empty where there is none."""
    text: str


class _Group(NamedTuple):
    """Arguments of one class: its file, its name, what they are called on the command line, and which are shown."""

    title: str
    source: str
    owner: str
    prefix: str
    names: tuple[str, ...]


_METHOD = _Group(
    "method", "modules/base.py", "DistillModule", "--model.",
    ("student", "from_scratch", "learning_rate", "optimizer", "lr_schedule", "warmup_steps", "dropout",
     "max_label_length", "max_rationale_length", "num_beams", "evaluate_rationales", "fast"),
)  # fmt: skip
_STEP_BY_STEP = _Group(
    "of StepByStepModule", "modules/step_by_step.py", "StepByStepModule", "--model.",
    ("rationale_weight", "label_prefix", "rationale_prefix"),
)  # fmt: skip
_DATA = _Group(
    "data", "data/base.py", "RationaleDataModule", "--data.",
    ("data_dir", "batch_size", "eval_batch_size", "label_source", "train_fraction", "seed", "rationales",
     "rationale_filter", "max_source_length", "max_target_length", "batching", "num_workers"),
)  # fmt: skip
_VALIDATION = _Group("run", "callbacks.py", "ValidateEverySteps", "--validation.", ("every_n_steps",))

TRAINER = {
    "--seed_everything": Argument("0", "draws the initialisation and dropout"),
    "--trainer.max_steps": Argument("10000", "optimizer steps"),
    "--trainer.accumulate_grad_batches": Argument("1", "batches an optimizer step"),
    "--trainer.gradient_clip_val": Argument("null", "the gradient's largest norm"),
    "--trainer.precision": Argument("null", "32-true, bf16-mixed; T5 overflows in fp16"),
    "--trainer.accelerator": Argument("auto", "cpu, gpu, tpu"),
    "--trainer.devices": Argument("auto", "how many, or which"),
    "--trainer.strategy": Argument("auto", "ddp, fsdp; see the shipped configs of that name"),
    "--ckpt_path": Argument("null", "checkpoint that fit goes on from, and that the others evaluate"),
}
"""What of Lightning's own nearly every run sets."""


def short_help(command: str) -> str:
    """The help of a command, at most as wide as the terminal and as 100 columns."""
    width = max(60, min(100, shutil.get_terminal_size((80, 24)).columns))
    trained = command != "inspect"
    first = {
        "--config FILE": Argument("", "a path, or a name that `lit-distill configs` lists; later ones win"),
        "--print_config": Argument("", "print the whole config that this makes, and stop"),
    }
    groups: list[tuple[str, Mapping[str, Argument]]] = [("config", first)]
    if trained:
        groups += [(f"method: --model {_classes('modules')}", _arguments(_METHOD))]
        groups += [(_STEP_BY_STEP.title, _arguments(_STEP_BY_STEP))]
    groups += [(f"data: --data {_classes('data')}", _arguments(_DATA))]
    own = _parser_arguments("commands/train.py" if trained else "commands/inspect_cli.py")
    groups += [("run", _arguments(_VALIDATION) | TRAINER | own if trained else own)]
    lines = [
        f"usage: lit-distill {command} --config FILE [--KEY VALUE ...]",
        "",
        *textwrap.wrap(COMMANDS[command], width),
    ]
    for title, arguments in groups:
        lines += [
            "",
            *textwrap.wrap(title, width, subsequent_indent="  "),
            *(_line(name, argument, width) for name, argument in arguments.items()),
        ]
    lines += [
        "",
        f"All arguments: lit-distill {command} --help_all",
        f"All of a class: lit-distill {command} --data.help CQADataModule, or --model.help",
    ]
    return "\n".join(lines)


def _line(name: str, argument: Argument, width: int) -> str:
    default = f" [{argument.default}]" if argument.default else ""
    text = textwrap.shorten(argument.text, max(10, width - 36 - len(default)), placeholder=" ...")
    return f"  {name:<33} {text}{default}"


def _arguments(group: _Group) -> dict[str, Argument]:
    found = documented(group.source, group.owner)
    return {f"{group.prefix}{name}": found[name] for name in group.names}


def documented(source: str, owner: str) -> dict[str, Argument]:
    """The arguments of a class's constructor, with their defaults and what its docstring begins to say of each.

    Args:
        source: a file of the package.
        owner: the class.
    """
    [node] = [node for node in _parsed(source).body if isinstance(node, ast.ClassDef) and node.name == owner]
    [init] = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    section = (ast.get_docstring(node) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    texts = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, flags=re.MULTILINE))
    plain = [*init.args.posonlyargs, *init.args.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(init.args.defaults))
    pairs = [*zip(plain, [*defaults, *init.args.defaults], strict=True)]
    pairs += zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    return {
        argument.arg: Argument(_as_yaml(default), _first_clause(texts.get(argument.arg, "")))
        for argument, default in pairs
        if argument.arg != "self"
    }


def _parser_arguments(source: str) -> dict[str, Argument]:
    """What a file adds to its parser by hand."""
    found = {}
    for node in ast.walk(_parsed(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        settings = {word.arg: word.value for word in node.keywords}
        if node.func.attr == "add_argument" and "help" in settings:
            text = str(ast.literal_eval(settings["help"]))
            found[str(ast.literal_eval(node.args[0]))] = Argument(
                _as_yaml(settings.get("default")), _first_clause(text)
            )
    return found


def _classes(package: str) -> str:
    """The classes that a part of the package exports, but for the abstract one, to choose from."""
    names = [
        alias.name
        for node in _parsed(f"{package}/__init__.py").body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.endswith("Module") and alias.name not in ("DistillModule", "RationaleDataModule")
    ]
    return " | ".join([*sorted(names), "one of your own"])


@cache
def _parsed(source: str) -> ast.Module:
    return ast.parse((Path(__file__).parent / source).read_text(encoding="utf-8"))


def _as_yaml(default: ast.expr | None) -> str:
    if default is None:
        return ""
    value: Any = ast.literal_eval(default)
    written: Sequence[tuple[Any, str]] = ((None, "null"), (True, "true"), (False, "false"))
    return next((text for constant, text in written if value is constant), repr(value) if value == "" else f"{value}")


def _first_clause(text: str) -> str:
    return re.split(r"[.;:](?:\s|$)", " ".join(text.split()).replace("``", ""), maxsplit=1)[0]
