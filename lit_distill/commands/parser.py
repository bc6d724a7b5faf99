"""The parser of all commands: one-line errors, and unchanged exceptions of constructors."""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

import lightning.pytorch as pl
from jsonargparse import Namespace, get_loader, set_loader
from jsonargparse._actions import previous_config
from jsonargparse._parameter_resolvers import get_signature_parameters
from lightning.pytorch.cli import LightningArgumentParser
from yaml import YAMLError

from lit_distill.data.student import StudentDataModule
from lit_distill.errors import UserError
from lit_distill.messages import COMMANDS, import_given, one_line, plain_type
from lit_distill.modules.base import DistillModule
from lit_distill.objectives import Objective
from lit_distill.reading import check_yaml
from lit_distill.teachers.base import Teacher

T = TypeVar("T")

Option = tuple[str, Any, object, str]
"""Of a command itself: name, type, default, help."""

_load_yaml = get_loader("yaml")


def _load_bounded(text: str) -> Any:
    """Load YAML as jsonargparse does, with bounds on its depth and size."""
    try:
        check_yaml(text)
        return _load_yaml(text)
    except ValueError as error:
        # an invalid tag, or a number of thousands of digits
        raise YAMLError(str(error)) from error


set_loader("yaml", _load_bounded, exceptions=(YAMLError,))


def _setting(text: str) -> Any:
    """A setting of a task or teacher, none of which is a mapping, as prefixes seem to be."""
    # as jsonargparse passes null on; an empty text is not null here
    if text == "None":
        return None
    try:
        value = _load_bounded(text)
    except YAMLError:
        return text
    return text if isinstance(value, dict | None) else value


class Raised(BaseException):
    """Wraps a constructor's exception, since jsonargparse rewrites any ``Exception``."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class Parser(LightningArgumentParser):
    """Raises one line in place of printing usage; does not allow abbreviated options.

    Attributes:
        unlinked: what the last parse was given, without what arguments set for each other.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # an abbreviation is mostly a typo, and changes its meaning when options are added
        super().__init__(*args, **kwargs, allow_abbrev=False)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Turn parsing errors into a ``UserError``; exceptions from importing a user's file pass through."""
        import_given(message)
        if isinstance(ex, ValueError) and isinstance(ex.__context__, UserError):
            # from a function that links arguments
            raise ex.__context__
        known = sorted(word.lstrip("-") for word in self._option_string_actions if word.startswith("--"))
        raise UserError(one_line(message, known)) from ex

    def add_options(self, options: Sequence[Option]) -> None:
        """Add options of a command itself; one that is false by default may be given without a value."""
        for name, kind, default, text in options:
            flag: dict[str, Any] = {"nargs": "?", "const": True} if default is False else {}
            self.add_argument(f"--{name}", type=kind, default=default, help=text, **flag)

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Any:
        """Called by Lightning; `instantiate` in jsonargparse 4.49 and later."""
        ours = (DistillModule, StudentDataModule, Objective, Teacher, pl.Callback)
        return self.instantiate(cfg, instantiators=[(_instantiate, base, True) for base in ours], **kwargs)

    def _parse_common(self, cfg: Namespace, *args: Any, **kwargs: Any) -> Namespace:
        given = cfg.clone()
        parsed: Namespace = super()._parse_common(cfg, *args, **kwargs)
        # nested parses end before the whole one
        self.unlinked = given
        return parsed

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]  # overloads
        """As jsonargparse's; an argument for one setting of a task or teacher leaves its others as they are."""
        # jsonargparse parses a class's arguments one by one
        pattern = r"--(tasks|teachers)\.([^.=]+)\.([^.=]+)=(.*)"
        if args and len(args) == 1 and (found := re.fullmatch(pattern, args[0], re.DOTALL)):
            group, name, key, text = found.groups()
            earlier = ((kwargs.get("namespace") or {}).get(group) or {}).get(name)
            own = {**(earlier if isinstance(earlier, dict) else {}), key: _setting(text)}
            args = [f"--{group}.{name}={json.dumps(own, ensure_ascii=False)}"]
        parsed: Namespace = super().parse_args(args, *rest, **kwargs)
        return parsed

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """As jsonargparse's; errors name the file, and tasks and teachers of earlier files stay."""
        try:
            parsed: Namespace = super().parse_path(cfg_path, *args, **kwargs)
        except UserError as error:
            raise UserError(f"{error} (in {cfg_path})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"config: {str(cfg_path)!r} is not UTF-8 ({error.reason} at byte {error.start})") from error
        if parsed.get("config") is not None:
            raise UserError(f"config: a file cannot name another, give --config several times (in {cfg_path})")
        for key in ("model.init_args.tasks", "model.init_args.teachers"):
            earlier, own = (found.get(key) if found else None for found in (previous_config.get(), parsed))
            if isinstance(earlier, dict) and isinstance(own, dict):
                both = {
                    name: {**earlier[name], **own[name]}
                    for name in earlier.keys() & own.keys()
                    if isinstance(earlier[name], dict) and isinstance(own[name], dict)
                }
                parsed[key] = {**earlier, **own, **both}
        return parsed


def call(
    name: str,
    function: Callable[..., T],
    args: list[str],
    *,
    classes: Mapping[str, type] | None = None,
    positional: tuple[str, str] | None = None,
) -> T:
    """Call a function with arguments from the command line and configuration files.

    Its parameters are the options; one that is false by default may be given without a value. ``classes`` has the base
    classes of its first parameters, ``positional`` the parameter that takes words without an option, and its help.
    """
    parser = Parser(prog=f"lit-distill {name}", description=COMMANDS[name])
    parameters, classes = inspect.signature(function).parameters, classes or {}
    if "config" not in parameters:
        parser.add_argument("-c", "--config", action="config", help="Path to a configuration file in YAML.")
    for option, base in classes.items():
        parser.add_subclass_arguments(base, option, required=True)
    skipped: set[str | int] = set(list(parameters)[: len(classes)])
    if positional is not None:
        option, text = positional
        parser.add_argument("words", nargs="*", type=str, metavar=option.upper(), help=text)
        # jsonargparse reads no positional arguments from files
        parser.add_argument(f"--{option}", type=list[str] | None, help="The same, for a configuration file.")
        skipped.add(option)
    parser.add_function_arguments(function, skip=skipped)
    for action in parser._actions:
        if action.dest in parameters and parameters[action.dest].default is False:
            action.nargs, action.const = "?", True
    try:
        given = parser.instantiate_classes(parser.parse_args(args)).as_dict()
    except Raised as raised:
        raise raised.error from None
    if positional is not None:
        given[positional[0]] = given.pop("words") or given[positional[0]] or []
    if "config" not in parameters:
        given.pop("config", None)
    built = [given.pop(option) for option in classes]
    return function(*built, **given)


def constructor_arguments(class_type: type[Any]) -> dict[str, Any]:
    """The names and types of a class's constructor arguments, with those that it passes to its base classes."""
    return {one.name: one.annotation for one in get_signature_parameters(class_type)}


def check_nulls(class_type: type[Any], arguments: Mapping[str, Any]) -> None:
    """Raise a ``UserError`` for null where an argument does not allow it; jsonargparse misses those of classes."""
    for name, kind in constructor_arguments(class_type).items():
        free = kind in (Any, inspect.Parameter.empty) or type(None) in (kind, *get_args(kind))
        if arguments.get(name, 0) is None and not free:
            allowed = plain_type(str(kind) if get_args(kind) else repr(kind))
            raise UserError(f"{name}: got null; allowed is {allowed}")


def _instantiate(class_type: type[Any], *args: Any, **kwargs: Any) -> Any:
    try:
        check_nulls(class_type, kwargs)
        return class_type(*args, **kwargs)
    except Exception as error:
        raise Raised(error) from error
