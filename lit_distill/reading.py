"""Read JSON and YAML with bounds on depth and size; errors are one line."""

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_distill.errors import UserError
from lit_distill.remote import AnyPath, read_lines

_DEPTH = 100  # of YAML; a config has ten levels
_VALUES = 1_000_000  # of YAML, with aliases expanded
_BYTES = 2**26  # of a hand-written file

_EventLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_json(text: str | bytes, *, surrogates: bool = False) -> Any:
    """Parse JSON in UTF-8.

    Raises a ``ValueError`` if it is none, is nested too deep, repeats a key, has a number of thousands of digits, or,
    without ``surrogates``, a lone surrogate, which is no character.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        found = json.loads(text, object_pairs_hook=_without_repeats)
        if not surrogates and "\\ud" in text.lower():
            json.dumps(found, ensure_ascii=False).encode()
    except UserError:
        raise
    except RecursionError as error:
        raise ValueError("not JSON: nested too deep") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"the key {twice!r} is there twice in one object")
    return found


def json_object(text: str | bytes, place: str, *, surrogates: bool = False) -> dict[str, Any]:
    """Parse a JSON object. Raises a ``UserError`` that names the ``place`` it is from."""
    try:
        found = parse_json(text, surrogates=surrogates)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{place}: not a JSON object but {type(found).__name__}")
    return found


def json_lines(
    path: AnyPath, *, surrogates: bool = False, on_torn: Callable[[str], None] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place (``path:line``) and object of each line of a file that is not blank.

    Args:
        path: the file, possibly compressed.
        surrogates: as in `parse_json`.
        on_torn: called with the place of an incomplete last line, which a process leaves that was killed or still
            writes; without it, that is an error as in any other line.

    Raises:
        UserError: a line is no JSON object.
    """
    for number, line in numbered_lines(path):
        place = f"{path}:{number}"
        try:
            found = json_object(line, place, surrogates=surrogates)
        except UserError:
            if on_torn is None or line.endswith(b"\n"):
                raise
            on_torn(place)
        else:
            yield place, found


def numbered_lines(path: AnyPath) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers."""
    for number, line in enumerate(read_lines(path), start=1):
        if number == 1:
            # some programs write a byte order mark
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.isspace():
            yield number, line


def read_small(path: str | Path) -> bytes:
    """The content of a hand-written file. Raises a ``ValueError`` if it is too large or endless."""
    with Path(path).open("rb") as file:
        content = file.read(_BYTES + 1)
    if len(content) > _BYTES:
        raise ValueError(f"larger than {_BYTES >> 20} MiB")
    return content


def parse_yaml(text: str | bytes) -> Any:
    """Parse YAML by PyYAML's safe loader. Raises a ``ValueError`` if it is none, or if `check_yaml` refuses it."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        check_yaml(text)
        return yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error


@dataclass
class _Collection:
    """A YAML mapping or sequence that is being read."""

    anchor: str | None = None
    keys: set[str] | None = None  # of a mapping
    nodes: int = 0  # keys and values, or items, read so far
    size: int = 1  # values in it so far, with aliases expanded


def check_yaml(text: str) -> None:
    """Check the size of YAML before it is built: ten lines of aliases can expand to 10^10 values.

    Raises:
        YAMLError: it is not YAML, is nested too deep, expands to too many values, or repeats a key.
    """
    sizes: dict[str | None, int] = {}  # of what has an anchor
    open_ones = [_Collection()]
    for event in yaml.parse(text, Loader=_EventLoader):
        anchor, size, parent = getattr(event, "anchor", None), 1, open_ones[-1]
        mark: Any = event.start_mark
        if isinstance(event, yaml.CollectionStartEvent):
            open_ones.append(_Collection(anchor, set() if isinstance(event, yaml.MappingStartEvent) else None))
            if len(open_ones) > _DEPTH:
                raise yaml.YAMLError(f"nested more than {_DEPTH} levels deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_ones.pop().anchor, parent.size
            parent = open_ones[-1]
        elif isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise yaml.YAMLError(f"the alias *{anchor} stands for nothing, or for what it is in")
            anchor, size = None, sizes[anchor]
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        elif "\0" in event.value:
            raise yaml.YAMLError(f"holds a NUL character in line {mark.line + 1}")
        elif parent.keys is not None and parent.nodes % 2 == 0:
            if event.value in parent.keys:
                raise yaml.YAMLError(f"the key {event.value!r} is given twice, in line {mark.line + 1}")
            parent.keys.add(event.value)
        parent.nodes += 1
        parent.size += size
        if parent.size > _VALUES:
            raise yaml.YAMLError(f"stands for more than {_VALUES:,} values")
        if anchor is not None:
            sizes[anchor] = size
