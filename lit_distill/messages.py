"""One line for what a parser says in many: the key, what was given, and what is allowed."""

import difflib
import importlib
import re
from collections.abc import Iterator, Sequence


COMMANDS = ("fit", "validate", "test", "predict", "inspect")
"""What the command line can be asked to do."""


def one_line(message: str, options: Sequence[str] = ()) -> str:
    """An error of jsonargparse as one line.

    Args:
        message: its text, of one or many lines.
        options: the options that the parser knows, for a likely spelling.
    """
    key_match = re.match(r'Parser key "([^"]+)":', message)
    key = key_match.group(1) if key_match else ""
    for explain in (_nested, _unknown_class, _unknown_option, _missing_file, _wrong_type, _required, _command):
        line = explain(key, message, options)
        if line is not None:
            return line
    return " ".join(message.split())


def _nested(key: str, message: str, options: Sequence[str]) -> str | None:
    """A class's arguments are parsed by a parser of their own, which has put its error in one line already."""
    found = re.search(r"(?:^|- )(\w[\w.]*: (?:no such argument|got |unknown class |cannot use ).*)$", message, re.MULTILINE)
    return f"{key}.{found.group(1)}" if found and key else None


def _unknown_class(key: str, message: str, options: Sequence[str]) -> str | None:
    found = re.search(r"Expected a dot import path string: (\S+)", message)
    base = _base_class(message)
    if found and base:
        name = found.group(1)
        allowed = sorted(known_subclasses(base))
        return (
            f"{key}: unknown class {name!r}{likely(name, allowed)}; allowed are {', '.join(allowed)},"
            " or the import path of a class of your own"
        )
    found = re.search(r"Problem with given class_path '([^']+)':\s*(.+)", message)
    if found:
        return f"{key}: cannot use the class {found.group(1)!r}: {' '.join(found.group(2).split())}"
    return None


def _unknown_option(key: str, message: str, options: Sequence[str]) -> str | None:
    for pattern in (
        r"unrecognized arguments: --?(\S+?)(?:[= ]|$)",
        r"does not accept option '([^']+)'",
        r"Key '([^']+)' is not expected",
    ):
        if found := re.search(pattern, message):
            name = found.group(1)
            return f"{name}: no such key{likely(name, options)}; allowed are the keys that --help lists"
    if found := re.search(r"Option '([^']+)' is not accepted", message):
        name = found.group(1)
        allowed = [option for option in options if option not in ("help", "config") and not option.endswith(".help")]
        return f"{name}: no such argument{likely(name, allowed)}; allowed are {', '.join(allowed)}"
    return None


def _missing_file(key: str, message: str, options: Sequence[str]) -> str | None:
    found = re.search(r"(?:File does not exist|No such file or directory|does not exist): '?([^'\n]+)'?", message)
    return f"{key or 'config'}: no file {found.group(1)!r}" if found else None


def _wrong_type(key: str, message: str, options: Sequence[str]) -> str | None:
    given = re.search(r"Given value: (.+)", message, flags=re.DOTALL)
    expected = re.findall(r"Expected (?:a |an |)(.+?)(?:\. Got value: (.+))?(?:\n|$)", message)
    if not key or not expected:
        return None
    value = given.group(1) if given else next((got for _, got in expected if got), "")
    allowed = dict.fromkeys(_plain_type(kind) for kind, _ in expected)
    return f"{key}: got {' '.join(value.split())}; allowed is {', or '.join(allowed)}"


def _plain_type(text: str) -> str:
    literal = re.search(r"typing\.Literal\[(.+)\]", text)
    if literal:
        return f"one of {literal.group(1)}"
    text = re.sub(r"<class '([\w.]+)'>", lambda match: match.group(1).rpartition(".")[2], text)
    return text.replace("NoneType", "null").replace("typing.", "").strip()


def _required(key: str, message: str, options: Sequence[str]) -> str | None:
    found = re.search(r"the following arguments are required: (.+)", message)
    if not found:
        return None
    keys = [name.strip().partition(".")[2] or name.strip() for name in found.group(1).split(",")]
    return f"{', '.join(keys)}: must be given, in a config file or as {', '.join(f'--{name}' for name in keys)}"


def _command(key: str, message: str, options: Sequence[str]) -> str | None:
    found = re.search(r"invalid choice: '(\w+)'|(expected \"subcommand\" to be one of)", message)
    if not found:
        return None
    given = found.group(1)
    start = f"{given}: no such command{likely(given, COMMANDS)}" if given else "a command must be given"
    return f"{start}; allowed are {', '.join(COMMANDS)}"


def likely(name: str, allowed: Sequence[str]) -> str:
    """`` (did you mean ...?)`` where an allowed name is close."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.7)
    return f" (did you mean {close[0]}?)" if close else ""


def known_subclasses(base: str) -> dict[str, type]:
    """The imported classes below one, by their bare names.

    Args:
        base: the class's import path.
    """
    module, _, name = base.rpartition(".")
    root: type = getattr(importlib.import_module(module), name)
    return {klass.__name__: klass for klass in _below(root)}


def _below(root: type) -> Iterator[type]:
    for klass in root.__subclasses__():
        yield klass
        yield from _below(klass)


def _base_class(message: str) -> str | None:
    found = re.search(r"Subtypes: \[<class '([\w.]+)'>", message)
    return found.group(1) if found else None
