"""Names as people say them."""

import json
import re
from collections.abc import Collection, Iterable, Sequence

from lit_distill.comparison.settings import Setting

_METHODS = {"StepByStep": "step-by-step", "SingleTask": "single task: rationale and label"}
_DATASETS = {
    "esnli": "e-SNLI",
    "anli1": "ANLI R1",
    "anli2": "ANLI R2",
    "anli3": "ANLI R3",
    "cqa": "CQA",
    "svamp": "SVAMP",
}
_LABELS = {"gold": "gold labels", "teacher": "teacher's labels"}
_LONGEST = 40


def dataset_name(dataset: str) -> str:
    """Of a dataset."""
    return _DATASETS.get(dataset, dataset)


def labels_name(label_source: str) -> str:
    """Of the labels that students were trained on."""
    return _LABELS.get(label_source, f"{label_source} labels")


def method_name(method: str, label_source: str = "gold") -> str:
    """Of a method; standard finetuning on a teacher's labels is standard distillation."""
    if method == "Standard":
        return "standard distillation" if label_source == "teacher" else "standard finetuning"
    return _METHODS.get(method, re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", method))


def metric_name(metric: str) -> str:
    """Of a metric's logged name."""
    return metric.replace("/", " ").replace("_", " ")


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Each key of a config by as much of its end as tells it from the others."""
    keys = list(keys)
    short: dict[str, str] = {}
    for key in keys:
        parts = [part for part in key.split(".") if part != "init_args"]
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[-length:])
            clashes = [other for other in keys if other != key and f".{other}".endswith(f".{name}")]
            if not clashes:
                break
        short[key] = name
    return short


def variant_name(setting: Setting, among: Sequence[Setting], keys: Collection[str] | None = None) -> str:
    """A setting without its dataset, student, labels and fraction.

    Args:
        setting: what is named.
        among: what it has to be told from.
        keys: the keys of the config that tell settings apart; all of the setting's if not given.
    """
    parts = [method_name(setting.method, setting.label_source)]
    if setting.rationales not in (None, "own"):
        parts.append(f"{setting.rationales} rationales")
    weights = {other.rationale_weight for other in among if other.method == setting.method}
    if len(weights) > 1 and setting.rationale_weight is not None:
        parts.append(f"rationale weight {setting.rationale_weight:g}")
    short = short_keys({key for other in among for key, _ in other.extra})
    for key, value in setting.extra:
        # what is not set, or switched off, is best said by saying nothing
        if (keys is None or key in keys) and value not in ("null", "none", "false"):
            said = short[key].replace("_", " ")
            parts.append(said if value == "true" else f"{said} {value_name(value)}")
    return ", ".join(parts)


def variant_names(settings: Sequence[Setting], keys: Collection[str] | None = None) -> dict[Setting, str]:
    """`variant_name` of each, with a number where different things would be called the same."""
    names = {setting: variant_name(setting, settings, keys) for setting in settings}
    called: dict[str, list[tuple[object, ...]]] = {}
    for setting, name in sorted(names.items(), key=lambda item: item[0].extra):
        what = _what(setting, keys)
        if what not in called.setdefault(name, []):
            called[name].append(what)
    numbers = {setting: called[name].index(_what(setting, keys)) + 1 for setting, name in names.items()}
    return {
        setting: name + (f" ({numbers[setting]})" if len(called[name]) > 1 else "") for setting, name in names.items()
    }


def _what(setting: Setting, keys: Collection[str] | None) -> tuple[object, ...]:
    told = tuple((key, value) for key, value in setting.extra if keys is None or key in keys)
    return setting.method, setting.rationales, setting.rationale_weight, told


def value_name(value: str) -> str:
    """A value of a config: classes by their names, paths by their ends."""
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    if isinstance(parsed, list) and parsed and all(isinstance(one, dict) and "class_path" in one for one in parsed):
        text = ", ".join(_class(one) for one in parsed)
    elif isinstance(parsed, str) and "/" in parsed:
        text = parsed.rstrip("/").rpartition("/")[2]
    else:
        text = value
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _class(spec: dict[str, object]) -> str:
    name = str(spec["class_path"]).rpartition(".")[2]
    arguments = spec.get("init_args")
    given = arguments if isinstance(arguments, dict) else {}
    return name + (f"({', '.join(f'{key}={value}' for key, value in sorted(given.items()))})" if given else "")


def size_name(parameters: int) -> str:
    """A number of parameters, as in 248M."""
    for unit, sign in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            number = parameters / unit
            return f"{number:.1f}".removesuffix(".0") + sign if number < 10 else f"{number:.0f}{sign}"
    return str(parameters)


def fraction_name(fraction: float) -> str:
    """A part of the training rows, as in 12.5 %."""
    return f"{100 * fraction:.4g} %"


def family(student: str) -> str:
    """A student's name without its size."""
    return re.sub(r"[-_]?(?<![a-z])(tiny|mini|small|base|large|xx?l|\d+(\.\d+)?[bm])(?![a-z])", "", student, flags=re.I)
