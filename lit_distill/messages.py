"""One line for what a parser says in many: the key, what was given, and what is allowed."""

import difflib
import importlib
import re
from collections.abc import Iterator, Sequence

DESCRIPTION = "Distilling step-by-step: train and compare small students."
"""What the program is for."""

COMMANDS = {
    "fit": "Train a student, test its best checkpoint and save it.",
    "validate": "Evaluate a student on val.",
    "test": "Evaluate a student on test.",
    "predict": "Write what a student says of each row, as JSON lines.",
    "annotate": "Ask a teacher for a rationale and a label of every row; keep all it says.",
    "experiment": "Run a grid of fits, each a plain config of its own.",
    "compare": "Compare finished runs: tables, figures and a report.",
    "inspect": "Report on a dataset as a config uses it: rows, teacher's labels, lengths, examples.",
    "configs": "List the configs that come with this, or copy them.",
}
"""What the command line can be asked to do."""

_MANY = 30
"""Keys that are too many for a line."""


def one_line(message: str, options: Sequence[str] = ()) -> str:
    """An error of jsonargparse as one line.

    Args:
        message: its text, of one or many lines.
        options: the options that the parser knows, for a likely spelling.
    """
    key_match = re.match(r'Parser key "([^"]+)":', message)
    key = key_match.group(1) if key_match else ""
    explanations = (_nested, _unknown_class, _unknown_option, _file, _wrong_class, _wrong_type, _required, _command)
    for explain in explanations:
        line = explain(key, message, options)
        if line is not None:
            return " ".join(line.split())
    return " ".join(message.split())


def import_given(message: str) -> None:
    """Import the class that an error is about once more, so that a fault in a user's own file keeps its traceback.

    Args:
        message: jsonargparse's, which holds no more of such a fault than its text.

    Raises:
        Exception: whatever the file raises when it is imported, except that it is not there.
    """
    found = re.search(r"Given value: (?:.*'class_path': ')?([A-Za-z_][\w.]*)\.\w+(?:$|')", message)
    if not found:
        return
    module = found.group(1)
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise


def _nested(key: str, message: str, options: Sequence[str]) -> str | None:
    """A class's arguments are parsed by a parser of their own, which has put its error in one line already."""
    found = re.search(
        r"(?:^|- )(\w[\w.]*: (?:no such argument|got |unknown class |cannot use |must be given).*)$",
        message,
        re.MULTILINE,
    )
    if not found or not key:
        return None
    return f"{key}.{found.group(1)}".replace(" as --", f" as --{key}.")


def _unknown_class(key: str, message: str, options: Sequence[str]) -> str | None:
    own = "or the import path of a class of your own"
    if found := re.search(r"^--([\w.]+)\.help: Expected a dot import path string: (\S+)", message):
        return f"{found.group(1)}: unknown class {found.group(2)!r}; allowed are the classes that --help lists, {own}"
    found = re.search(r"Expected a dot import path string: (\S+)", message)
    base = _base_class(message)
    if found and base:
        name = found.group(1)
        allowed = sorted(known_subclasses(base))
        return f"{key}: unknown class {name!r}{likely(name, allowed)}; allowed are {', '.join(allowed)}, {own}"
    if found := re.search(r"Problem with given class_path '[^']+':\s*'(\w+)' object has no attribute 'keys'", message):
        return f"{key}.init_args: got a {found.group(1)}; allowed is a mapping of the class's arguments"
    found = re.search(r"Problem with given class_path '([^']+)':\s*(.+)", message)
    if found:
        return f"{key}: cannot use the class {found.group(1)!r}: {found.group(2)}"
    return None


def _unknown_option(key: str, message: str, options: Sequence[str]) -> str | None:
    if found := re.search(r"unrecognized arguments: ([^-\s]\S*)", message):
        return f"unexpected argument {found.group(1)!r}; allowed are --key value and --config FILE"
    for pattern in (
        r"unrecognized arguments: --?(\S+?)(?:[= ]|$)",
        r"Group '(?P<group>[^']+)' does not accept option '([^']+)'",
        r"does not accept option '([^']+)'",
        r"Option '([^']+)' is not accepted",
        r"Key '([^']+)' is not expected",
    ):
        if found := re.search(pattern, message):
            name = ".".join(found.groups())
            return f"{name}: no such argument{likely(name, options)}; allowed are {_beside(name, options)}"
    return None


def _beside(name: str, options: Sequence[str]) -> str:
    """The keys at the place of a name; where they are very many, how to list them."""
    group = name.rpartition(".")[0]
    while group and not any(option.startswith(f"{group}.") for option in options):
        group = group.rpartition(".")[0]
    start = f"{group}." if group else ""
    keys = {
        start + option.removeprefix(start).partition(".")[0].rstrip("+")
        for option in options
        if option.startswith(start)
    }
    keys -= {"help", "config", "print_config", "print_shtab", "print_completion"}
    if 0 < len(keys) <= _MANY:
        return ", ".join(sorted(keys))
    return f"the keys{f' of {group}' if group else ''} that --help lists"


def _file(key: str, message: str, options: Sequence[str]) -> str | None:
    if found := re.search(r"(?:File does not exist|No such file or directory|does not exist): '?([^'\n]+)'?", message):
        return f"{key or 'config'}: no file {found.group(1)!r}"
    if found := re.search(r"Path is not a file: '([^']+)'", message):
        return f"{key or 'config'}: {found.group(1)!r} is not a file"
    if found := re.search(r"Unable to load config '(.*?)'", message, re.DOTALL):
        return f"{key}: got {found.group(1)!r}; allowed is a file, or a mapping of the keys that --help lists"
    if found := re.match(r"Problems parsing config: (.+)", message, re.DOTALL):
        return f"config: not YAML: {found.group(1)}"
    if found := re.match(r"Unexpected config: (.*)", message, re.DOTALL):
        return f"config: must hold keys with values, got {found.group(1).strip()!r}"
    return None


def _wrong_class(key: str, message: str, options: Sequence[str]) -> str | None:
    kinds = "a class's name or import path, or a mapping of class_path and init_args"
    value = _given(message)
    if key and (found := re.search(r"NestedArg\(key='([^']+)'", message)):
        return f"{key}: no class is given for --{key}.{found.group(1)}; put --{key} CLASS before it"
    if found := re.search(r"does not correspond to a subclass of (\w+)", message):
        return f"{key}: {value} is no {found.group(1)}; allowed is {kinds}"
    if key and "Not a valid subclass of" in message:
        return f"{key}: got {value}; allowed is {kinds}"
    return None


def _wrong_type(key: str, message: str, options: Sequence[str]) -> str | None:
    expected = re.findall(r"Expected (?:a |an |)(.+?)(?:\. Got value: (.+))?(?:\n|$)", message)
    if not key or not expected:
        return None
    value = _given(message) or next((got for _, got in expected if got), "")
    allowed = dict.fromkeys(plain_type(kind) for kind, _ in expected if not kind.startswith("path but"))
    return f"{key}: got {value}; allowed is {', or '.join(allowed)}"


def _given(message: str) -> str:
    found = re.search(r"Given value: (.+)", message, flags=re.DOTALL)
    return found.group(1) if found else ""


def plain_type(text: str) -> str:
    """A type as Python writes it, in plain words."""
    literal = re.search(r"typing\.Literal\[(.+)\]", text)
    if literal:
        return f"one of {literal.group(1)}"
    text = re.sub(r"<class '([\w.]+)'>", lambda match: match.group(1).rpartition(".")[2], text)
    return text.replace("NoneType", "null").replace("typing.", "").strip()


def _required(key: str, message: str, options: Sequence[str]) -> str | None:
    found = re.search(r"the following arguments are required: (.+)", message)
    if found:
        keys = [name.strip().partition(".")[2] or name.strip() for name in found.group(1).split(",")]
        return f"{', '.join(keys)}: must be given, in a config file or as {', '.join(f'--{name}' for name in keys)}"
    if found := re.search(r"argument (?:-\w/)?--([\w.]+): expected one argument", message):
        return f"{found.group(1)}: a value must be given, as --{found.group(1)} VALUE"
    return None


def _command(key: str, message: str, options: Sequence[str]) -> str | None:
    found = re.search(r"invalid choice: '(\w+)'|(expected \"subcommand\" to be one of)", message)
    if not found:
        return None
    return no_command(found.group(1))


def no_command(given: str | None = None) -> str:
    """The message that no command, or an unknown one, was given."""
    start = f"{given}: no such command{likely(given, tuple(COMMANDS))}" if given else "a command must be given"
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
    return {klass.__name__: klass for klass in _below(root) if not klass.__name__.startswith("_")}


def _below(root: type[object]) -> Iterator[type[object]]:
    klass: type[object]
    for klass in root.__subclasses__():
        yield klass
        yield from _below(klass)


def _base_class(message: str) -> str | None:
    found = re.search(r"^\s*Subtypes: (.+)$", message, re.MULTILINE)
    # neither `str` nor `NoneType`: a class in a module
    return next(iter(re.findall(r"[\w.]+\.[A-Z]\w*", found.group(1))), None) if found else None
