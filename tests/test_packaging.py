"""The wheel: what is in it, and that it runs in an environment and a folder of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from lit_distill.messages import COMMANDS
from tests.runs import CONFIGS, REPOSITORY

BUILD = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"


def called(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    done = subprocess.run(  # noqa: S603 - our own programs
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as ``pip`` builds it, from a copy: a build leaves files beside its sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("lit_distill", "configs", "tests", "notebooks", "benchmarks", "docs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    called(sys.executable, "-W", "ignore", "-c", BUILD, target, cwd=source)
    [built] = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and beside it the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # read after the environment's own packages; an editable install of this repository, a `.pth` itself, is not
    (packages / "libraries.pth").write_text("\n".join(libraries) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    called(*pip, "install", "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=folder)
    return folder / "bin"


def test_the_wheel_holds_the_package_and_the_configs_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = [path for path in (REPOSITORY / "lit_distill").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {name for name in names if "/configs/" not in name} == {
        path.relative_to(REPOSITORY).as_posix() for path in files
    }
    configs = {f"lit_distill/configs/{path.relative_to(CONFIGS).as_posix()}" for path in CONFIGS.rglob("*.*")}
    assert {name for name in configs if not name.endswith((".py", ".pyc"))} <= names
    assert {name for name in names if name.startswith("lit_distill/configs/")} <= configs
    assert {name.partition("/")[0] for name in names} == {"lit_distill"}


def test_in_an_empty_folder_configs_are_listed_copied_and_found(environment: Path, tmp_path: Path) -> None:
    program = environment / "lit-distill"
    listed = called(program, "configs", cwd=tmp_path).stdout
    assert "quickstart " in listed
    assert "cqa/step_by_step " in listed
    called(program, "configs", "--copy", "mine", cwd=tmp_path)
    copied = {path.relative_to(tmp_path / "mine") for path in (tmp_path / "mine").rglob("*.yaml")}
    assert copied == {path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")}
    assert (tmp_path / "mine" / "students" / "toy-t5" / "config.json").is_file()


# what is in the wheel and that its configs are found is tested above, the quickstart in `test_configs.py`
@pytest.mark.slow
def test_in_an_empty_folder_the_quickstart_trains(environment: Path, tmp_path: Path) -> None:
    program = environment / "lit-distill"
    called(program, "fit", "--config", "quickstart", "--trainer.max_steps", 2, cwd=tmp_path)
    [student] = (tmp_path / "runs").glob("*/version_0/student")
    assert (student / "model.safetensors").is_file()
    command = json.loads((student.parent / "run.json").read_text())["command"]
    assert command == ["lit-distill", "fit", "--config", "quickstart", "--trainer.max_steps", "2"]


def test_the_dockerfile_names_what_there_is() -> None:
    text = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {word for word, _ in steps} <= {
        "FROM",
        "ARG",
        "COPY",
        "RUN",
        "WORKDIR",
        "USER",
        "ENV",
        "EXPOSE",
        "ENTRYPOINT",
    }
    copied = {source for word, rest in steps if word == "COPY" for source in rest.split()[:-1]}
    assert all((REPOSITORY / source).exists() for source in copied)
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    assert (ignored[0], {line.removeprefix("!") for line in ignored[1:]}) == ("*", copied)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    # what a build reads
    assert {"pyproject.toml", "setup.py", "constraints.txt", project["readme"], *project["license-files"]} <= copied
    [install] = [rest for word, rest in steps if rest.startswith("pip install")]
    [extras] = re.findall(r'"\.\[(.+)\]"', install)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    [given] = [rest for word, rest in steps if word == "ENTRYPOINT"]
    program, command, *_, option, _ = json.loads(given)
    assert program in project["scripts"]
    assert command in COMMANDS
    assert f"  {option} " in (REPOSITORY / "lit_distill" / "help.txt").read_text()
