"""The configs that come with the package, found by name from any working folder; imports nothing heavy."""

import argparse
import os
import shutil
from pathlib import Path
from typing import NoReturn

from lit_distill.errors import UserError
from lit_distill.messages import COMMANDS, likely, one_line

_PACKAGE = Path(__file__).parent
CONFIGS = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), _PACKAGE)
"""Their folder: in the installed package, or beside it in the repository."""


def shipped(path: str) -> str:
    """A path as it is where something lies there, else the ``configs/...`` of that name that comes with the package."""
    found = CONFIGS / path.removeprefix("configs/")
    return str(found) if path.startswith("configs/") and not os.path.exists(path) and found.exists() else path


def config_names() -> list[str]:
    """The names of all shipped configs, without ``.yaml``."""
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


def find_config(given: str, key: str = "config") -> str:
    """What ``--config`` stands for: a file's path first, else a shipped config's name with or without ``.yaml``.

    Raises:
        UserError: neither exists; the line names ``key``.
    """
    if os.path.isfile(given):
        return given
    name = given.removeprefix("configs/").removesuffix(".yaml")
    names = config_names()
    if name in names:
        return str(CONFIGS / f"{name}.yaml")
    # a folder or a pipe is for the parser to judge, and so is YAML in place of a file's name
    if os.path.exists(given) or any(mark in given for mark in "{[:\n"):
        return given
    below = ", ".join(each for each in names if each.startswith(f"{name}/"))
    hint = f" (there are {below})" if below else likely(name, names)
    raise UserError(
        f"{key}: no file {given!r}, and no shipped config of that name{hint}; `lit-distill configs` lists those"
    )


def find_configs(arguments: list[str]) -> list[str]:
    """A command line with each ``--config`` replaced by the file that it stands for."""
    found = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        if word.startswith("--config="):
            word = f"--config={find_config(word.removeprefix('--config='))}"
        found.append(find_config(word) if before in ("-c", "--config") else word)
    return found


def list_or_copy(arguments: list[str]) -> None:
    """The command ``configs``: a line for each, or copies of all of them with the files that they name.

    Raises:
        UserError: an argument is unknown, a file is there already, or the folder cannot be written.
        SystemExit: with code 0, after ``--help``.
    """
    parser = _Parser(prog="lit-distill configs", description=COMMANDS["configs"])
    parser.add_argument("--copy", metavar="FOLDER", help="Copy all of them into this folder, to be edited.")
    target = parser.parse_args(arguments).copy
    if target is None:
        # in one write: a reader like `head` may not wait for the end
        print("\n".join(f"{name:<34} {_first_sentences(CONFIGS / f'{name}.yaml')}" for name in config_names()))
        return
    sources = [path for path in CONFIGS.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    copies = {Path(target, path.relative_to(CONFIGS)): path for path in sources}
    if existing := [copy for copy in copies if copy.exists()]:
        raise UserError(f"copy: {str(existing[0])!r} is there already; give another folder")
    try:
        for copy, path in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    except OSError as error:
        raise UserError(f"copy: {target!r} cannot be written ({error.strerror})") from error
    print(f"{len(copies)} files in {target}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(one_line(message, ("copy",)))


def _first_sentences(path: Path) -> str:
    """The first comment after the launch command, up to the end of its last whole sentence."""
    lines = path.read_text(encoding="utf-8").splitlines()
    line = next((line[1:].strip() for line in lines[1:] if line.startswith("#")), "")
    return line if line.endswith(".") else line[: line.rfind(". ") + 1]
