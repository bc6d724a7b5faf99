"""Read JSON and YAML with bounds on depth and size; errors are a one-line ``ValueError``."""

import json
from pathlib import Path
from typing import Any

import yaml

from lit_distill.errors import UserError

_DEPTH = 100
"""Maximum nesting of YAML; a config has ten levels."""

_VALUES = 1_000_000
"""Maximum number of YAML values, with aliases expanded."""

_BYTES = 2**26
"""Maximum size of a hand-written file."""

_EventLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_json(text: str | bytes, *, surrogates: bool = False) -> Any:
    """Parse JSON; ``surrogates`` allows lone surrogates.

    Raises:
        ValueError: it is not UTF-8 or JSON, is nested too deep, repeats a key, or has a lone surrogate or a number of
            thousands of digits.
    """
    try:
        found = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON ({error.msg} at {line}column {error.colno})") from error
    except UserError:
        raise
    except (RecursionError, ValueError) as error:
        raise ValueError("JSON too deep or with too large a number") from error
    if not surrogates and (b"\\ud" if isinstance(text, bytes) else "\\ud") in text.lower():  # type: ignore[operator]
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a lone surrogate (\\ud800 to \\udfff), which is no character") from error
    return found


def read_small(path: str | Path) -> bytes:
    """The content of a hand-written file. Raises a ``ValueError`` if it is too large or endless."""
    with Path(path).open("rb") as file:
        content = file.read(_BYTES + 1)
    if len(content) > _BYTES:
        raise ValueError(f"larger than {_BYTES >> 20} MiB")
    return content


def parse_yaml(text: str | bytes, loader: Any = yaml.SafeLoader) -> Any:
    """Parse YAML with PyYAML's safe loader, or an equally safe ``loader``.

    Raises:
        ValueError: it is not UTF-8 or YAML, is nested too deep, or expands to too many values.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        check_yaml(text)
        return yaml.load(text, loader)  # noqa: S506 - a safe one
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from error
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise UserError(f"the key {twice!r} is there twice in one object")
    return found


def _not_utf8(error: UnicodeDecodeError) -> str:
    line = error.object.count(b"\n", 0, error.start) + 1
    return f"not UTF-8 ({error.reason} at byte {error.start}{f', in line {line}' if line > 1 else ''})"


def check_yaml(text: str) -> None:
    """Check the size of YAML before it is built: ten lines of aliases can expand to 10^10 values.

    Raises:
        YAMLError: it is not YAML, is nested too deep, expands to too many values, or repeats a key.
    """
    sizes: dict[str, int] = {}
    # of each of them that is a mapping: its keys, and whether the value of the last one comes next
    mappings: list[tuple[set[str], bool] | None] = [None]
    # of the document and of each collection that is open: its anchor, and the number of values in it so far
    stack: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=_EventLoader):
        anchor, size = getattr(event, "anchor", None), 1
        mark: Any = event.start_mark
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append((anchor, 1))
            mappings.append((set(), False) if isinstance(event, yaml.MappingStartEvent) else None)
            if len(stack) > _DEPTH:
                raise yaml.YAMLError(f"nested more than {_DEPTH} levels deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = stack.pop()
            mappings.pop()
        elif isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise yaml.YAMLError(f"the alias *{anchor} stands for nothing, or for what it is in")
            anchor, size = None, sizes[str(anchor)]
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        elif "\0" in event.value:
            raise yaml.YAMLError(f"holds a NUL character in line {mark.line + 1}")
        if (mapping := mappings[-1]) is not None:
            keys, is_value = mapping
            if isinstance(event, yaml.ScalarEvent) and not is_value:
                if event.value in keys:
                    raise yaml.YAMLError(f"the key {event.value!r} is given twice, in line {mark.line + 1}")
                keys.add(event.value)
            mappings[-1] = keys, not is_value
        if anchor is not None:
            sizes[anchor] = size
        outer, before = stack[-1]
        stack[-1] = outer, before + size
        if before + size > _VALUES:
            raise yaml.YAMLError(f"stands for more than {_VALUES:,} values")
