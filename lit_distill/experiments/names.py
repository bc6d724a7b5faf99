"""A cell's name: what varies, readable, the same whatever else is in the grid."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

_ORDER = ("method", "student", "dataset", "train_fraction", "label_source", "rationales", "rationale_weight")
"""What comes first; then all other keys by their names, then the seed."""

_TAGS = {"train_fraction": "fraction", "rationale_weight": "weight", "seed": "seed"}
_BARE = {"label_source": ("gold", "teacher"), "rationales": ("own", "shuffled")}
"""Values that say by themselves what they are of."""

_LONGEST = 120
"""Characters of a name: file systems take 255 bytes, and a command line is read."""


def cell_name(point: Mapping[str, Any]) -> str:
    """The name of a folder, from canonical keys and values; two different points with the same keys differ in it.

    In a value ``/`` is written ``+``, and ``-``, which stands between the parts, is written ``~``: but in a student's,
    which is the one part that may hold it and still be told from those around it.
    """
    known = [key for key in _ORDER if key in point]
    others = sorted(key for key in point if key not in (*_ORDER, "seed"))
    last = ["seed"] if "seed" in point else []
    name = "-".join(_part(key, point[key]) for key in (*known, *others, *last))
    if len(name) > _LONGEST:
        mark = hashlib.sha256(name.encode()).hexdigest()[:10]
        name = f"{name[: _LONGEST - len(mark) - 1]}~{mark}"
    return name


def value_text(value: Any) -> str:  # noqa: ANN401 - whatever YAML holds
    """A value as it is named and told from others: ``1`` and ``1.0`` are the same."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return json.dumps(value, sort_keys=True, default=str)


def _part(key: str, value: Any) -> str:  # noqa: ANN401
    if key == "student" and isinstance(value, str):
        return _student(value)
    text = _safe(value_text(value))
    if key in ("method", "dataset") or text in _BARE.get(key, ()):
        # no folder is hidden, and none is the one above
        return f"%{text}" if text.startswith(".") else text
    if key in _TAGS:
        return f"{_TAGS[key]}{text}"
    return f"{_safe(key.replace('.init_args.', '.').removeprefix('model.').removeprefix('data.'))}_{text}"


def _student(value: str) -> str:
    """Google's without their ``google/``; a name without a folder is marked, so that it is none of them."""
    text = _safe(value, keep="-")
    if text.startswith("google+") and "+" not in text[7:] and re.match(r"[A-Za-z0-9]", text[7:]):
        return text[7:]
    if "+" not in text:
        return f"_{text}"
    # no folder is hidden, and none reads as an option
    return f"%{ord(text[0]):02x}{text[1:]}" if text[0] in ".-" else text


def _safe(text: str, keep: str = "") -> str:
    """Reversible: each character that is not harmless becomes another one, or its code."""

    def code(match: re.Match[str]) -> str:
        return {"-": "~", "/": "+"}.get(match.group(), "".join(f"%{byte:02x}" for byte in match.group().encode()))

    return re.sub(rf"[^A-Za-z0-9_.{keep}]", code, text)
