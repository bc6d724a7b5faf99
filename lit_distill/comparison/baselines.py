"""Which setting another is compared with."""

from collections.abc import Mapping, Sequence

from lit_distill.comparison.names import short_keys
from lit_distill.comparison.settings import FIELDS, Setting, as_text
from lit_distill.errors import UserError

_SAME = ("dataset", "student", "parameters", "label_source", "train_fraction")
"""What a baseline shares with the setting that is compared with it, unless it is asked otherwise."""

DEFAULT = {"method": "Standard"}
"""Standard finetuning."""


def read_baseline(text: str | None, settings: Sequence[Setting]) -> dict[str, str]:
    """The keys and values of ``key=value,key=value``; `DEFAULT` if not given.

    Raises:
        UserError: it is not of that form, a key is unknown, or nothing has those values.
    """
    if text is None:
        return DEFAULT
    keys = {key for setting in settings for key, _ in setting.extra}
    names = {name: name for name in FIELDS} | {name: key for key, name in short_keys(keys).items()}
    names |= {key: key for key in keys}
    wanted: dict[str, str] = {}
    for pair in text.replace(",", " ").split():
        name, equals, value = pair.partition("=")
        if not equals or not value:
            raise UserError(f"baseline: {pair!r} is not of the form key=value")
        if name not in names:
            raise UserError(f"baseline: no key {name!r}; allowed are {', '.join(sorted(names))}")
        wanted[names[name]] = _number(value)
    if not wanted:
        raise UserError("baseline: must be key=value, or several separated by commas")
    for key, value in wanted.items():
        found = {found for setting in settings if (found := setting.value(key)) is not None}
        if value not in found:
            raise UserError(f"baseline: no run has {key}={value}; allowed are {', '.join(sorted(found)) or 'none'}")
    if not any(_has(setting, wanted) for setting in settings):
        raise UserError(f"baseline: no runs have all of {text}")
    return wanted


def _number(value: str) -> str:
    """0.50 as 0.5."""
    try:
        return as_text(float(value))
    except ValueError:
        return value


def _has(setting: Setting, wanted: Mapping[str, str]) -> bool:
    return all(setting.value(key) == value for key, value in wanted.items())


def find_baseline(
    setting: Setting, settings: Sequence[Setting], wanted: Mapping[str, str]
) -> tuple[Setting | None, str]:
    """A setting's baseline: of those asked for, the one that is otherwise most like it.

    Args:
        setting: what is compared.
        settings: among which it is looked for.
        wanted: of `read_baseline`.

    Returns:
        It, or ``None`` and why there is none (nothing for the baseline itself).
    """
    if _has(setting, wanted) and setting.dataset == wanted.get("dataset", setting.dataset):
        return None, ""
    fixed = [key for key in _SAME if key not in wanted and not (key == "parameters" and "student" in wanted)]
    candidates = [
        other
        for other in settings
        if _has(other, wanted) and all(getattr(other, key) == getattr(setting, key) for key in fixed)
    ]
    if not candidates:
        return None, "no baseline with its student, labels and fraction"
    likeness = [len(set(other.extra) & set(setting.extra)) for other in candidates]
    best = [other for other, alike in zip(candidates, likeness, strict=True) if alike == max(likeness)]
    if len(best) > 1:
        return None, f"{len(best)} settings could be its baseline; name one with --baseline"
    return best[0], ""
