"""Rewrite the parser's multi-line errors as one line: the key, what was given, and what is allowed."""

import difflib
import importlib
import re
from collections.abc import Callable, Iterator, Sequence

DESCRIPTION = "Distilling step-by-step: train and compare small students."

COMMANDS = {
    "fit": "Train a student, test its best checkpoint and save it.",
    "validate": "Evaluate a student on val.",
    "test": "Evaluate a student on test.",
    "predict": "Write a student's predictions as JSON lines.",
    "annotate": "Ask a teacher for a rationale and a label of every row.",
    "experiment": "Run a grid of fits, each a plain config of its own.",
    "compare": "Compare finished runs: tables, figures and a report.",
    "inspect": "Report on a dataset as a config uses it: rows, labels, lengths.",
    "configs": "List the configs that come with this, or copy them.",
}
"""The commands with their help."""

_MANY = 30
"""Maximum keys to list in a message."""


def one_line(message: str, options: Sequence[str] = ()) -> str:
    """A jsonargparse error as one line.

    Args:
        message: the error's text.
        options: the options that the parser knows, to suggest a spelling.
    """
    found = re.match(r'Parser key "([^"]+)":', message)
    key = found.group(1) if found else ""
    for pattern, answer in _RULES:
        found = re.search(pattern, message)
        if found is None or (isinstance(answer, str) and "{key}" in answer and not key):
            continue
        if isinstance(answer, str):
            line: str | None = answer.format(*found.groups(), key=key, place=key or "config", given=_given(message))
        else:
            line = answer(found, key, message, options)
        if line is not None:
            return " ".join(line.split())
    return " ".join(message.split())


def _nested(found: re.Match[str], key: str, message: str, options: Sequence[str]) -> str | None:
    return f"{key}.{found.group(1)}".replace(" as --", f" as --{key}.") if key else None


def _unknown_class(found: re.Match[str], key: str, message: str, options: Sequence[str]) -> str | None:
    name, subtypes = found.group(1), re.search(r"(?m)^\s*Subtypes: (.+)$", message)
    # a class in a module, not `str` or `NoneType`
    bases = re.findall(r"[\w.]+\.[A-Z]\w*", subtypes.group(1)) if subtypes else []
    if not bases:
        return None
    allowed = sorted(known_subclasses(bases[0]))
    if not allowed:
        return f"{key}: got {name!r}; allowed is a mapping, {_OWN}"
    return f"{key}: unknown class {name!r}{likely(name, allowed)}; allowed are {', '.join([*allowed, _OWN])}"


def _unknown_option(found: re.Match[str], key: str, message: str, options: Sequence[str]) -> str:
    name = ".".join(filter(None, found.groups()))
    group = name.rpartition(".")[0]
    while group and not any(option.startswith(f"{group}.") for option in options):
        group = group.rpartition(".")[0]
    start = f"{group}." if group else ""
    own = (option.removeprefix(start) for option in options if option.startswith(start))
    keys = {start + option.partition(".")[0].rstrip("+") for option in own}
    keys -= {"help", "config", "print_config", "print_shtab", "print_completion"}
    listed = (
        ", ".join(sorted(keys)) if 0 < len(keys) <= _MANY else f"the keys{group and f' of {group}'} that --help lists"
    )
    return f"{name}: no such argument{likely(name, options)}; allowed are {listed}"


def _wrong_type(found: re.Match[str], key: str, message: str, options: Sequence[str]) -> str | None:
    expected = re.findall(r"Expected (?:a |an |)(.+?)(?:\. Got value: (.+))?(?:\n|$)", message)
    if not key or not expected:
        return None
    value = _given(message) or next((got for _, got in expected if got), "")
    allowed = dict.fromkeys(plain_type(kind) for kind, _ in expected if not kind.startswith("path but"))
    return f"{key}: got {value}; allowed is {', or '.join(allowed)}"


def _required(found: re.Match[str], key: str, message: str, options: Sequence[str]) -> str:
    keys = [name.strip().partition(".")[2] or name.strip() for name in found.group(1).split(",")]
    return f"{', '.join(keys)}: must be given, in a config file or as {', '.join(f'--{name}' for name in keys)}"


def _given(message: str) -> str:
    found = re.search(r"Given value: (.+)", message, flags=re.DOTALL)
    return found.group(1) if found else ""


def no_command(given: str | None = None) -> str:
    """The message for a missing or unknown command."""
    start = f"{given}: no such command{likely(given, tuple(COMMANDS))}" if given else "a command must be given"
    return f"{start}; allowed are {', '.join(COMMANDS)}"


_OWN = "or the import path of a class of your own"
_CLASS = "a class's name or import path, or a mapping of class_path and init_args"

_RULES: Sequence[tuple[str, str | Callable[[re.Match[str], str, str, Sequence[str]], str | None]]] = (
    # the parser of a class's arguments has already made one line
    (r"(?m)(?:^|- )(\w[\w.]*: (?:no such argument|got |unknown class |cannot use |must be given).*)$", _nested),
    (
        r"^--([\w.]+)\.help: Expected a dot import path string: (\S+)",
        f"{{0}}: unknown class {{1!r}}; allowed are the classes that --help lists, {_OWN}",
    ),
    (r"Expected a dot import path string: (\S+)", _unknown_class),
    (
        r"Problem with given class_path '[^']+':\s*'(\w+)' object has no attribute 'keys'",
        "{key}.init_args: got a {0}; allowed is a mapping of the class's arguments",
    ),
    (r"Problem with given class_path '([^']+)':\s*(.+)", "{key}: cannot use the class {0!r}: {1}"),
    (r"unrecognized arguments: ([^-\s]\S*)", "unexpected argument {0!r}; allowed are --key value and --config FILE"),
    (r"unrecognized arguments: --?(\S+?)(?:[= ]|$)", _unknown_option),
    (r"(?:Group '([^']+)' )?does not accept option '([^']+)'|(?:Option|Key) '([^']+)' is not ", _unknown_option),
    (r"(?:File does not exist|No such file or directory|does not exist): '?([^'\n]+)'?", "{place}: no file {0!r}"),
    (r"Path is not a file: '([^']+)'", "{place}: {0!r} is not a file"),
    (
        r"(?s)Unable to load config '(.*?)'",
        "{key}: got {0!r}; allowed is a file, or a mapping of the keys that --help lists",
    ),
    (r"(?s)\AProblems parsing config: (.+)", "config: not YAML: {0}"),
    (r"(?s)\AUnexpected config: (.*\S|)\s*\Z", "config: must hold keys with values, got {0!r}"),
    (r"NestedArg\(key='([^']+)'", "{key}: no class is given for --{key}.{0}; put --{key} CLASS before it"),
    (r"does not correspond to a subclass of (\w+)", f"{{key}}: {{given}} is no {{0}}; allowed is {_CLASS}"),
    (r"Not a valid subclass of", f"{{key}}: got {{given}}; allowed is {_CLASS}"),
    (r"Expected ", _wrong_type),
    (r"the following arguments are required: (.+)", _required),
    (r"argument (?:-\w/)?--([\w.]+): expected one argument", "{0}: a value must be given, as --{0} VALUE"),
    (r"invalid choice: '(\w+)'", lambda found, *others: no_command(found.group(1))),
    (r"expected \"subcommand\" to be one of", lambda *others: no_command()),
)
"""Pattern of a jsonargparse error -> the line to show; the first match wins."""


def plain_type(text: str) -> str:
    """A Python type in plain words."""
    if literal := re.search(r"typing\.Literal\[(.+)\]", text):
        return f"one of {literal.group(1)}"
    text = re.sub(r"<class '([\w.]+)'>", lambda match: match.group(1).rpartition(".")[2], text)
    return text.replace("NoneType", "null").replace("typing.", "").strip()


def likely(name: str, allowed: Sequence[str]) -> str:
    """`` (did you mean ...?)`` if an allowed name is close."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.7)
    return f" (did you mean {close[0]}?)" if close else ""


def import_given(message: str) -> None:
    """Import the class that an error is about, so that an exception in the user's file keeps its traceback."""
    found = re.search(r"Given value: (?:.*'class_path': ')?([A-Za-z_][\w.]*)\.\w+(?:$|')", message)
    if not found:
        return
    module = found.group(1)
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise


def known_subclasses(base: str) -> dict[str, type]:
    """The imported public subclasses of the class at an import path, by name."""

    def below(root: type[object]) -> Iterator[type[object]]:
        klass: type[object]
        for klass in root.__subclasses__():
            yield klass
            yield from below(klass)

    module, _, name = base.rpartition(".")
    root: type = getattr(importlib.import_module(module), name)
    return {klass.__name__: klass for klass in below(root) if not klass.__name__.startswith("_")}
