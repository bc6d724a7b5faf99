"""Imports run one way, and importing the package costs nothing."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lit_distill

PACKAGE = Path(lit_distill.__file__).parent
# from the bottom up; a part may import parts of lower layers, and of its own except between the rooms of `ROOMS`
LAYERS = (
    (
        "__init__", "errors", "files", "interrupts", "batch", "questions", "reading", "records", "remote", "messages",
        "progress", "secrets", "sheet", "shipped", "tables",
    ),
    ("equations",),
    ("checks",),
    ("tasks",),
    ("evaluation", "students"),
    ("annotation", "comparison", "experiments", "shrinking"),
    ("data", "teachers"),
    ("objectives",),
    ("modules", "callbacks", "checkpoints", "pruning"),
    ("exporting", "searching"),
    ("serving",),
    ("checking",),
    ("planning",),
    ("commands",),
    ("cli",),
    ("__main__",),
)  # fmt: skip
ROOMS = {"data", "teachers"}
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """The parts of the package that a file imports, wherever in it the import stands."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "lit_distill":
                yield parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"


def test_imports_go_down() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert {"modules", "data", "commands", "cli", "batch"} <= {part_of(path) for path in files}
    wrong, seen = [], 0
    for path in files:
        own = part_of(path)
        assert own in LEVEL, f"{own} has no layer here"
        for other in imports(ast.parse(path.read_text())):
            seen += 1
            rooms = own != other and {own, other} <= ROOMS and LEVEL[own] == LEVEL[other]
            if LEVEL[other] > LEVEL[own] or rooms:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert seen > 50
    assert wrong == []


def test_the_check_sees_each_form_of_an_import() -> None:
    source = (
        "import lit_distill.data.base\nfrom lit_distill import files\ndef f():\n    from lit_distill.modules import a"
    )
    assert list(imports(ast.parse(source))) == ["data", "files", "modules"]
    assert list(imports(ast.parse("from lit_distill import __version__\nimport torch"))) == ["__init__"]


def run_python(*lines: str) -> dict[str, Any]:
    """What a fresh process holds after some lines, by which it has to leave a dictionary ``found``."""
    code = "\n".join(["import gc, json, sys", "from lit_distill.cli import main, run", *lines])
    code += "\nprint('FOUND', json.dumps(found | {'modules': sorted(sys.modules)}), sep='')"
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    found: dict[str, Any] = json.loads(done.stdout.partition("FOUND")[2])
    return found


def packages(found: dict[str, Any]) -> set[str]:
    return {name.partition(".")[0] for name in found["modules"]}


HEAVY = {"torch", "lightning", "transformers", "jsonargparse", "datasets", "pandas", "numpy", "torchmetrics", "rich"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import lit_distill, sys; print(sorted({HEAVY} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["-h"], 0),
        (["--version"], 0),
        ([], 2),
        (["ft"], 2),
        (["ft", "--help"], 2),
        (["fit", "--config", "nowhere.yaml"], 2),
        (["annotate", "--config=nowhere"], 2),
        (["configs", "--help"], 0),
        (["fit", "--config", "quickstart", "--help"], 0),
    ],
)
def test_what_is_no_command_imports_nothing_heavy(arguments: list[str], code: int) -> None:
    found = run_python(
        f"try:\n    main({arguments})\nexcept SystemExit as stopped:\n    found = {{'code': stopped.code}}"
    )
    assert found["code"] == code
    assert packages(found) & HEAVY == set()


def test_a_command_imports_no_more_than_it_needs(student_folder: Path) -> None:
    arguments = ["inspect", "--data=ToyDataModule", "--data.train_size=4", f"--data.tokenizer={student_folder}"]
    found = run_python(
        f"sys.argv[1:] = {arguments}",
        "run()",
        "found = {'collects': gc.isenabled(), 'left_alone': gc.get_freeze_count()}",
    )
    # loggers that are not asked for, scorers that nothing is scored by
    # (matplotlib comes with torchmetrics, which lightning imports, in a tenth of a second)
    unneeded = {"wandb", "tensorboard", "tensorflow", "nltk", "rouge_score", "sklearn", "torchvision"}
    unneeded |= {"datasets", "pandas", "openai"}
    assert packages(found) & unneeded == set()
    # what was imported is not looked through for garbage, what comes after it is
    assert found["collects"]
    assert found["left_alone"] > 100_000
