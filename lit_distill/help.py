"""``fit --help`` and its like on one screen: our own arguments, read from the sources without importing them."""

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lit_distill.messages import COMMANDS

COMMANDS_IN_SHORT = ("fit", "validate", "test", "predict", "inspect")
"""The commands whose whole help has hundreds of lines, most of them the trainer's."""

Arguments = Mapping[str, tuple[str, str]]
"""Option -> its default, as YAML has it, and what it is."""

_METHOD = (
    "student", "from_scratch", "learning_rate", "optimizer", "lr_schedule", "warmup_steps", "dropout",
    "max_label_length", "max_rationale_length", "num_beams", "evaluate_rationales", "fast",
)  # fmt: skip
_DATA = (
    "data_dir", "batch_size", "eval_batch_size", "label_source", "train_fraction", "seed", "rationales",
    "rationale_filter", "max_source_length", "max_target_length", "batching", "num_workers",
)  # fmt: skip
_CONFIG: Arguments = {
    "--config FILE": ("", "a path, or a name that `lit-distill configs` lists; later ones win"),
    "--print_config": ("", "print the whole config that this makes, and stop"),
}
_TRAINER: Arguments = {
    "--seed_everything": ("0", "draws the initialisation and dropout"),
    "--trainer.max_steps": ("10000", "optimizer steps"),
    "--trainer.accumulate_grad_batches": ("1", "batches an optimizer step"),
    "--trainer.gradient_clip_val": ("null", "the gradient's largest norm"),
    "--trainer.precision": ("null", "32-true, bf16-mixed; T5 overflows in fp16"),
    "--trainer.accelerator": ("auto", "cpu, gpu, tpu"),
    "--trainer.devices": ("auto", "how many, or which"),
    "--trainer.strategy": ("auto", "ddp, fsdp; see the shipped configs of that name"),
    "--ckpt_path": ("null", "checkpoint that fit goes on from, and that the others evaluate"),
}
"""What of Lightning's own nearly every run sets."""


def short_help(command: str) -> str:
    """The help of a command, at most as wide as the terminal and as 100 columns."""
    width = max(60, min(100, shutil.get_terminal_size((80, 24)).columns))
    data = _documented("data/base.py", "RationaleDataModule", "--data.", _DATA)
    groups: list[tuple[str, Arguments]] = [("config", _CONFIG)]
    if command == "inspect":
        own = _added("commands/inspect_cli.py")
    else:
        method = _documented("modules/base.py", "DistillModule", "--model.", _METHOD)
        names = ("rationale_weight", "label_prefix", "rationale_prefix")
        steps = _documented("modules/step_by_step.py", "StepByStepModule", "--model.", names)
        groups += [(f"method: --model {_classes('modules')}", method), ("of StepByStepModule", steps)]
        every = _documented("callbacks.py", "ValidateEverySteps", "--validation.", ("every_n_steps",))
        own = {**every, **_TRAINER, **_added("commands/train.py")}
    groups += [(f"data: --data {_classes('data')}", data), ("run", own)]
    lines = [
        f"usage: lit-distill {command} --config FILE [--KEY VALUE ...]",
        "",
        *textwrap.wrap(COMMANDS[command], width),
    ]
    for title, arguments in groups:
        lines += ["", *textwrap.wrap(title, width, subsequent_indent="  ")]
        for name, (default, text) in arguments.items():
            end = f" [{default}]" if default else ""
            lines.append(
                f"  {name:<33} {textwrap.shorten(text, max(10, width - 36 - len(end)), placeholder=' ...')}{end}"
            )
    lines += [
        "",
        f"All arguments: lit-distill {command} --help_all",
        f"All of a class: lit-distill {command} --data.help CQADataModule, or --model.help",
    ]
    return "\n".join(lines)


def _documented(source: str, owner: str, prefix: str, names: Sequence[str]) -> Arguments:
    """Arguments of a class's constructor, with their defaults and what its docstring begins to say of each."""
    [node] = [node for node in _parsed(source).body if isinstance(node, ast.ClassDef) and node.name == owner]
    [init] = [each.args for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    section = (ast.get_docstring(node) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    texts = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, flags=re.MULTILINE))
    # of plain arguments the last ones have defaults
    pairs = [*zip(reversed([*init.posonlyargs, *init.args]), reversed(init.defaults), strict=False)]
    defaults = {
        argument.arg: default for argument, default in (*pairs, *zip(init.kwonlyargs, init.kw_defaults, strict=True))
    }
    return {f"{prefix}{name}": (_as_yaml(defaults.get(name)), _first_clause(texts.get(name, ""))) for name in names}


def _added(source: str) -> Arguments:
    """What a file adds to its parser by ``add_argument``."""

    def found() -> Iterator[tuple[str, tuple[str, str]]]:
        for node in ast.walk(_parsed(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                words = {word.arg: word.value for word in node.keywords}
                text = _first_clause(ast.literal_eval(words["help"]))
                yield ast.literal_eval(node.args[0]), (_as_yaml(words.get("default")), text)

    return dict(found())


def _classes(package: str) -> str:
    """The classes to choose from, which a part of the package exports."""
    imported = (node.names for node in _parsed(f"{package}/__init__.py").body if isinstance(node, ast.ImportFrom))
    names = {alias.name for names in imported for alias in names if alias.name.endswith("Module")}
    return " | ".join([*sorted(names - {"DistillModule", "RationaleDataModule"}), "one of your own"])


@cache
def _parsed(source: str) -> ast.Module:
    return ast.parse((Path(__file__).parent / source).read_text(encoding="utf-8"))


def _as_yaml(default: ast.expr | None) -> str:
    if default is None:
        return ""
    value: Any = ast.literal_eval(default)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value) or "''"


def _first_clause(text: str) -> str:
    return re.split(r"[.;:](?:\s|$)", " ".join(text.split()).replace("``", ""), maxsplit=1)[0]
