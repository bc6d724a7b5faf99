"""Rewrite the parser's multi-line errors as one line: the key, what was given, and what is allowed."""

import difflib
import importlib
import re
from collections.abc import Iterator, Sequence
from pkgutil import resolve_name

DESCRIPTION = "Distilling step-by-step: train and compare small students."

COMMANDS = {
    "fit": "Train a student, test its best checkpoint and save it.",
    "validate": "Evaluate a student on val.",
    "test": "Evaluate a student on test.",
    "predict": "Write a student's predictions as JSON lines.",
    "annotate": "Ask a teacher for a rationale and a label of every row.",
    "capture": "Store a teacher's distributions, to train without it.",
    "experiment": "Run a grid of fits, each a plain config of its own.",
    "rounds": "Fit again and again, each on what the last student wrote.",
    "compare": "Compare finished runs: tables, figures and a report.",
    "inspect": "Report on a dataset as a config uses it: rows, labels, lengths.",
    "check": "Check that the losses of a config are computed right.",
    "plan": "Tell memory, largest batch and hours of a config before it runs.",
    "export": "Write a student for use, and prove that it answers the same.",
    "shrink": "Cut a smaller student out of a larger one.",
    "search": "Rank students of a budget, and train the best few.",
    "tradeoff": "Measure a student with fewer layers and tokens: accuracy, speed.",
    "serve": "Answer HTTP requests by a student.",
    "configs": "List the configs that come with this, or copy them.",
}
"""The commands with their help."""

_ABSTRACT = {"Dataset", "RationaleDataModule"}
"""Classes that have no rows of their own."""

_MANY = 30
"""Maximum keys to list in a message."""


def one_line(message: str, options: Sequence[str] = ()) -> str:
    """A jsonargparse error as one line.

    Args:
        message: the error's text.
        options: the options that the parser knows, to suggest a spelling.
    """
    # an argument for a key of a value
    message = re.sub(r"NestedArg\(key=('[^']*'), val=(.+)\)", r"{\1: \2}", message)
    found = re.match(r'Parser key "([^"]+)":', message)
    key, text = (found[1], message[found.end() :]) if found else ("", message)
    plain = f"{key}: {text}".removeprefix(": ").replace("Problems parsing config", "config: not YAML")
    return " ".join((_line(key, text, options) or plain).split())


def _line(key: str, text: str, options: Sequence[str]) -> str | None:
    """The line for a known kind of error; ``None`` for another one."""
    # the parser of a class's arguments has already made one line
    inner = r"(?m)(?:^|- )\s*(\w[\w.+]*: (?:no such argument|got |unknown class |cannot use |must be given).*)$"
    if key and (found := re.search(inner, text)):
        return f"{key}.{found[1]}".replace(" as --", f" as --{key}.")
    given = re.search(r"Given value: (.+)", text, flags=re.DOTALL)
    # the tasks of a vote are a list
    if given and key in ("tasks", "teachers", "vote") and "[list[" not in text:
        form = "settings, as {KEY: VALUE}" if key == "vote" else "settings by name, as {NAME: {KEY: VALUE}}"
        return f"{key}: got {given[1]}; allowed are {form}"
    classes = r"Expected a dot import path string: (\S+)|Import path (\S+) does not correspond to a subclass"
    if (found := re.search(classes, text)) and (allowed := _classes(text)):
        base, name = _bases(text)[0], (found[1] or found[2]).rpartition(".")[2]
        if base.endswith(".RationaleDataModule") and name in _others(base):
            return f"{key}: {name} has no labels, and is for fit and validate alone; allowed are {', '.join(allowed)}"
        if found[2]:
            return f"{key}: {name} is no {base.rpartition('.')[2]}; allowed are {', '.join(allowed)}"
        return f"{key}: unknown class {found[1]!r}{likely(found[1], allowed)}; allowed are {', '.join(allowed)}"
    if found := re.search(r"Problem with given class_path '([^']+)':\s*(.+)", text):
        return f"{key}: cannot use the class {found[1]!r}: {found[2]}"
    if found := re.search(r"unrecognized arguments: ([^-\s]\S*)", text):
        return f"unexpected argument {found[1]!r}; allowed are --key value and --config FILE"
    option = r"(?:Group '([^']+)' )?does not accept option '([^']+)'|(?:Option|Key) '([^']+)' is not "
    if found := re.search(rf"unrecognized arguments: --?(\S+?)(?:[= ]|$)|{option}", text):
        return _unknown_option(".".join(filter(None, found.groups())), options)
    if given and (found := re.search(r"subclass of (\w+)", text)):
        return (
            f"{key}: got {given[1]}; allowed is a {found[1]} by name or import path, or with class_path and init_args"
        )
    if key and (expected := re.findall(r"Expected (?:a |an |)(.+?)(?:\. Got value: (.+))?(?:\n|$)", text)):
        value = given[1] if given else next((got for _, got in expected if got), "")
        types = dict.fromkeys(plain_type(kind) for kind, _ in expected if not kind.startswith("path but"))
        return f"{key}: got {value}; allowed is {', or '.join(types)}"
    if found := re.search(r"the following arguments are required: (.+)", text):
        keys = [name.strip().partition(".")[2] or name.strip() for name in found[1].split(",")]
        return f"{', '.join(keys)}: must be given, in a config file or as {', '.join(f'--{name}' for name in keys)}"
    if found := re.search(r"argument (?:-\w/)?--([\w.]+): expected one argument", text):
        return f"{found[1]}: a value must be given, as --{found[1]} VALUE or --{found[1]}.KEY VALUE"
    return None


def _classes(text: str) -> list[str]:
    """What may stand for the class that an error is about; empty if no class is wanted."""
    bases = _bases(text)
    allowed = sorted(known_subclasses(bases[0]).keys() - _ABSTRACT) if bases else []
    return [*allowed, "or the import path of a class of your own"] if bases else []


def _bases(text: str) -> list[str]:
    """The import paths of the classes that an error asks for a subclass of."""
    subtypes = re.search(r"(?m)^\s*Subtypes: (.+)$", text)
    # a class in a module, not `str` or `NoneType`
    return re.findall(r"[\w.]+\.[A-Z]\w*", subtypes[1]) if subtypes else []


def _others(base: str) -> set[str]:
    """The names of our classes that are no subclasses of the one at an import path, but of a base of it."""
    parents = [parent for parent in resolve_name(base).__mro__[1:] if parent.__module__.startswith("lit_distill.")]
    wider = {name for one in parents for name in known_subclasses(f"{one.__module__}.{one.__qualname__}")}
    return wider - known_subclasses(base).keys()


def _unknown_option(name: str, options: Sequence[str]) -> str:
    if "+" in name:
        return f"{name}: no such argument; only a list takes +"
    group = name.rpartition(".")[0]
    while group and not any(option.startswith(f"{group}.") for option in options):
        group = group.rpartition(".")[0]
    start = f"{group}." if group else ""
    own = (option.removeprefix(start) for option in options if option.startswith(start))
    keys = {start + option.partition(".")[0].rstrip("+") for option in own}
    keys -= {"help", "config", "print_config", "print_shtab", "print_completion"}
    few = 0 < len(keys) <= _MANY
    listed = ", ".join(sorted(keys)) if few else f"the keys{group and f' of {group}'} that --help lists"
    return f"{name}: no such argument{likely(name, options)}; allowed are {listed}"


def plain_type(text: str) -> str:
    """A Python type in plain words."""
    if literal := re.search(r"typing\.Literal\[(.+)\]", text):
        return f"one of {literal[1]}"
    text = re.sub(r"<class '([\w.]+)'>", lambda match: match[1].rpartition(".")[2], text)
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
    try:
        importlib.import_module(found[1])
    except ModuleNotFoundError as error:
        if error.name is None or not f"{found[1]}.".startswith(f"{error.name}."):
            raise


def known_subclasses(base: str) -> dict[str, type]:
    """The imported public subclasses of the class at an import path, by name."""

    def below(root: type[object]) -> Iterator[type[object]]:
        klass: type[object]
        for klass in root.__subclasses__():
            yield klass
            yield from below(klass)

    return {klass.__name__: klass for klass in below(resolve_name(base)) if not klass.__name__.startswith("_")}
