"""What settings, keys and values are called in a report."""

import json
import re
from collections import Counter
from collections.abc import Iterable

from lit_distill.comparison.settings import as_text

_METHODS = {"Standard": "standard finetuning", "SingleTask": "single task: rationale and label"}
_METHODS |= {"StepByStep": "step-by-step"}
_DATASETS = {"esnli": "e-SNLI", "cqa": "CQA", "svamp": "SVAMP"} | {f"anli{i}": f"ANLI R{i}" for i in (1, 2, 3)}
_LABELS = {"gold": "gold labels", "teacher": "teacher's labels"}


def dataset(name: str) -> str:
    """A dataset in words."""
    return _DATASETS.get(name, name)


def labels(label_source: str) -> str:
    """The label source in words."""
    return _LABELS.get(label_source, f"{label_source} labels")


def method(name: str, label_source: str = "gold") -> str:
    """A method in words; standard finetuning on teacher labels is standard distillation."""
    if name == "Standard" and label_source == "teacher":
        return "standard distillation"
    return _METHODS.get(name, name if "." in name else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name))


def metric(name: str) -> str:
    """A logged metric in words."""
    return name.replace("/", " ").replace("_", " ")


def is_share(metric: str) -> bool:
    """Whether a metric is a fraction, shown in %."""
    return not metric.endswith(("loss", "tokens"))


def size(count: float) -> str:
    """A number of parameters or tokens, such as 248M or 2.85B."""
    unit, sign = next((pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if count >= pair[0]), (1, ""))
    number = count / unit
    return f"{round(number, 2 if number < 10 else 0):g}{sign}"


def fraction(share: float) -> str:
    """A fraction of the training rows, such as 12.5 %, or above 1 their number."""
    return f"{share:,.0f}" if share > 1 else f"{100 * share:.4g} %"


def training_rows(share: float) -> str:
    """A fraction or number of training rows, as a phrase."""
    if share == 1:
        return "all training rows"
    return f"{fraction(share)} {'' if share > 1 else 'of the '}training rows"


def family(student: str) -> str:
    """A student's name without its size."""
    return re.sub(r"[-_]?(?<![a-z])(tiny|mini|small|base|large|xx?l|\d+(\.\d+)?[bm])(?![a-z])", "", student, flags=re.I)


def short_keys(names: Iterable[str], separator: str = ".") -> dict[str, str]:
    """Each key by its shortest unique ending, without ``init_args``."""
    whole = {name: name.replace(".init_args.", ".") for name in names}
    short = {}
    for name, text in whole.items():
        others = [f"{separator}{other}" for other in whole.values() if other != text]
        # what a user named is not left out
        own = re.match(r"model\.(?:tasks|teachers)\.(.+)|(?:data|model)\.((?:outputs|vote)\..+)", text)
        parts = [own[1] or own[2]] if own else text.split(separator)
        ends = (separator.join(parts[i:]) for i in reversed(range(len(parts))))
        short[name] = next((end for end in ends if not any(one.endswith(separator + end) for one in others)), text)
    return short


def short_values(values: Iterable[str]) -> dict[str, str]:
    """Config values as short as they stay different: empty if unset, classes by name, paths by their last part.

    Whole numbers from 10,000 have separators of thousands.
    """
    found = {value: value for value in values}
    classes = _class_names(found)
    for shorten in (_without_syntax, _value_name):
        short = {value: classes.get(value) or shorten(value) for value in found}
        count = Counter(short.values())
        found |= {value: name for value, name in short.items() if count[name] == 1}
    return found


def _class_names(values: Iterable[str]) -> dict[str, str]:
    """Lists of classes by name, with the arguments in which they differ from other lists of the same classes."""
    lists = {
        value: [(one["class_path"], one.get("init_args") or {}) for one in json.loads(value)]
        for value in values
        if value.startswith('[{"class_path": ')
    }
    found = {}
    for value, items in lists.items():
        kinds = [kind for kind, _ in items]
        alike = [other for other in lists.values() if [kind for kind, _ in other] == kinds]
        parts = []
        for number, (kind, arguments) in enumerate(items):
            others = [other[number][1] for other in alike]
            own = [
                f"{name} {as_text(given)}"
                for name, given in arguments.items()
                if any(other.get(name) != given for other in others)
            ]
            parts.append(" ".join([kind.rpartition(".")[2], *own]))
        found[value] = ", ".join(dict.fromkeys(parts))
    return found


def _without_syntax(value: str) -> str:
    return re.sub(r'"(?:class_path|init_args)": |(?:\w+\.)+(?=[A-Z])|[][{}"]', "", value)


def _value_name(value: str) -> str:
    if value in ("null", "none", "false"):
        return ""
    if re.fullmatch(r"[1-9]\d{4,}", value):
        return f"{int(value):,}"
    if classes := re.findall(r'"class_path": "(?:\w+\.)*(\w+)"', value):
        value = ", ".join(classes)
    elif not value.startswith(("[", "{")):
        value = value.rstrip("/").rpartition("/")[2] or value
    return value if len(value) <= 40 else f"{value[:37]}..."
