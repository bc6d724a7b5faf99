"""Keep keys and passwords out of configs and command lines, which are logged."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_distill.errors import UserError
from lit_distill.reading import parse_yaml

_NAME = re.compile(
    r"(?:\w+_)?(?:api_?key|access_?key|private_?key|auth|authorization|bearer|credentials?|secret|passwo?r?d)"
    r"|(?:(?:access|api|auth|bearer|hf|hub|id|refresh|secret|session|wandb|x)_)*token"
)
_WORD = re.compile(r"""(?<![\w-])([\w-]+)['"]?\s*[:=]\s*['"]?([^\s'"])""")
INSTEAD = (
    "a key must not stand on the command line or in a config, which logs keep: set it in the environment"
    " (OPENAI_API_KEY, HF_TOKEN) or write it to a file and name that as teacher.api_key_file"
)


def refuse_secrets(args: Sequence[str]) -> None:
    """Raise a ``UserError``, without the value, if an argument or a named config contains a key."""
    for before, arg, following in zip(["", *args], args, [*args[1:], ""], strict=False):
        option, given, value = arg.partition("=") if arg.startswith("-") else ("", "", arg)
        name = option.lstrip("-").rstrip("+")
        if _is_secret(name.rpartition(".")[2], value if given else following):
            raise UserError(f"{name}: {INSTEAD}")
        is_config = name == "config" or before in ("-c", "--config")
        if found := next(secret_names(Path(value) if is_config and Path(value).is_file() else value), None):
            raise UserError(f"{found if is_config or not name else f'{name}.{found}'}: {INSTEAD}")


def secret_names(value: Any) -> Iterator[str]:
    """The names of secrets in plain values, YAML text or a YAML file, and in files that these name."""
    pending: list[tuple[str, str, Any]] = [("", "", value)]
    # by identity, as YAML aliases repeat values; stored, so that no id is reused
    seen: dict[int, Any] = {}
    while pending:
        name, where, found = pending.pop()
        if isinstance(found, str) and found.endswith((".yaml", ".yml")) and len(found) < 1024:
            found = Path(found)
        if isinstance(found, Path):
            # no pipe, and no file twice
            if not found.is_file() or (inside := f"(in {found})") in where:
                continue
            found, where = found.read_text("utf-8", errors="replace"), f"{where} {inside}"
        elif name and isinstance(found, str):
            continue
        if isinstance(found, str) and re.search("[:=]", found):
            text = found
            with suppress(ValueError):  # its message would contain the text
                found = parse_yaml(text)
            if isinstance(found, str):
                yield from (word + where for word, inner in _WORD.findall(text) if _is_secret(word, inner))
        if id(found) in seen or not isinstance(found, Mapping | list | tuple):
            continue
        seen[id(found)] = found
        for key, inner in found.items() if isinstance(found, Mapping) else enumerate(found):
            below = f"{name}.{key}" if name else str(key)
            if isinstance(found, Mapping) and _is_secret(str(key), inner):
                yield below + where
            pending.append((below, where, inner))


def _is_secret(name: str, value: Any) -> bool:
    if isinstance(value, bool) or value in (None, "", "null", "None"):
        return False
    # accessToken is access_token
    words = re.sub("(?<=[a-z])(?=[A-Z])", "_", name)
    return _NAME.fullmatch(words.lower().replace("-", "_")) is not None
