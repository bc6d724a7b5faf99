"""Bad inputs, hundreds at a time: each ends in one line that tells what is wrong, or in a success.

``FUZZ_SEED=7 FUZZ_ARGUMENTS=500 FUZZ_FILES=500 pytest -m slow tests/commands/test_fuzz.py`` draws others; with
``FUZZ_LOG=FILE`` the faults are written as they are found, and the files of each are kept beside.
"""

import os
import random
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.commands.forked import Forked, forking
from tests.commands.hostile import Assets, Case, argument_cases, file_cases, make_assets
from tests.runs import at_work_in

SECONDS = int(os.environ.get("FUZZ_SECONDS", "20"))
"""Of the processor, after which a command is taken to hang."""


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Assets]:
    with pytest.MonkeyPatch.context() as patch, at_work_in(tmp_path_factory.mktemp("assets"), patch) as root:
        yield make_assets(root)


@pytest.fixture(scope="module")
def forked(assets: Assets) -> Iterator[Forked]:
    with forking() as process:
        yield process


def fault_of(case: Case, forked: Forked, folder: Path) -> str | None:
    """What is wrong with how a command took an input; ``None`` where nothing is."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "blocked").write_text("a file")
    (folder / "loop").symlink_to("loop")
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    log = folder.with_name("log")
    forked.start(case.arguments, str(log), folder=str(folder), seconds=SECONDS, file_size=case.file_size)
    code = forked.wait()
    said = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in said.splitlines() if line.startswith("lit_distill: error: ")]
    if "Traceback" in said or code not in (0, 1, 2):
        return f"exit code {code}\n{said[-3000:]}"
    if code == 2 and len(lines) != 1:
        return f"exit code 2 with {len(lines)} lines\n{said[-3000:]}"
    if code == 2 and len(lines[0]) > 3000:
        return f"a line of {len(lines[0])} characters"
    # the argument, its group, or the file that holds it
    names = [
        "cannot be read or written",
        # a number that is allowed, and that no training survives
        "the last good checkpoint",
        *case.names.rsplit(".", 1)[-1:],
        case.names.split(".")[0],
        *case.files,
        *case.others,
    ]
    if code == 2 and not any(name in lines[0] for name in names):
        return f"not named: {lines[0][:500]}"
    if code == 1 and lines:
        return f"exit code 1 with an error\n{said[-3000:]}"
    return None


def faults(cases: Iterator[Case], forked: Forked, folder: Path) -> list[str]:
    found = []
    for number, case in enumerate(cases):
        fault = fault_of(case, forked, folder / "case")
        if fault is not None:
            found.append(f"[{number}] {case.name}: lit_distill {' '.join(case.arguments)[:600]}\n{fault}\n")
            if path := os.environ.get("FUZZ_LOG"):
                with open(path, "a") as file:
                    file.write(found[-1] + "\n")
                if case.files:
                    shutil.rmtree(f"{path}.{number}", ignore_errors=True)
                    shutil.copytree(folder / "case", f"{path}.{number}", symlinks=True)
    return found


def sample(assets: Assets, seed: int, arguments: int, files: int) -> Iterator[Case]:
    draw = random.Random(seed)  # noqa: S311 - no secret
    every = list(argument_cases(assets, draw))
    yield from draw.sample(every, min(arguments, len(every)))
    yield from islice(file_cases(assets, draw), files)


def test_a_few_bad_inputs(assets: Assets, forked: Forked, tmp_path: Path) -> None:
    found = faults(sample(assets, 0, 7, 8), forked, tmp_path)
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_bad_inputs(assets: Assets, forked: Forked, tmp_path: Path) -> None:
    seed = int(os.environ.get("FUZZ_SEED", "1"))
    arguments, files = (int(os.environ.get(f"FUZZ_{kind}", "900")) for kind in ("ARGUMENTS", "FILES"))
    found = faults(sample(assets, seed, arguments, files), forked, tmp_path)
    assert not found, "\n".join([f"{len(found)} of {arguments + files}", *found])
