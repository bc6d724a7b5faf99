"""What tells settings apart in the configs of runs, and what things are called in a report."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lit_distill.files import flatten

STUDENT = "model.init_args.student"
WEIGHT = "model.init_args.rationale_weight"
LABELS = "data.init_args.label_source"
FRACTION = "data.init_args.train_fraction"
PAIRING = "data.init_args.rationale_pairing"

NOT_THE_RESULT = re.compile(
    r"trainer\.(logger|enable_\w+|log_every_n_steps|profiler|strategy|accelerator)\b"
    # how the tested checkpoint is chosen does make a difference
    r"|checkpoint$|checkpoint\.(?!(monitor|mode)$)|(ckpt_path|predictions|weights_only|cpu_threads)\b"
    r"|(test_after_fit|baseline_after_fit|push_to_hub|resume)$"
    r"|data\.init_args\.(num_workers|eval_batch_size|predict_split)$"
    r"|model\.init_args\.(num_samples|score_choices|evaluate_\w+)$"
    # seeds, and where files are
    r"|(seed_everything|data\.init_args\.seed)$"
    r"|(trainer\.default_root_dir|data\.init_args\.(data_dir|cache_dir)|run_dir|out)$"
)
"""Config keys without influence on results, or only through data whose hashes are compared."""


def as_text(value: object) -> str:
    """A config value as text, for comparing and showing."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def identifying(config: Mapping[str, Any]) -> dict[str, str]:
    """The config keys that distinguish settings, with their values as text."""
    flat = sorted(config_text(config).items())
    return {key: value for key, value in flat if value not in ("null", "false")}


def config_text(config: Mapping[str, Any]) -> dict[str, str]:
    """The keys that may influence results, dotted, with values as text; devices count only through the batch size."""
    flat = flatten(config)
    of_batch = flat.get("model.init_args.effective_batch_size") is None
    hidden = () if of_batch else ("trainer.devices", "trainer.num_nodes")
    return {key: as_text(value) for key, value in flat.items() if key not in hidden and not NOT_THE_RESULT.match(key)}


_METHODS = {
    "Standard": "standard finetuning",
    "SingleTask": "single task: rationale and label",
    "StepByStep": "step-by-step",
}
_DATASETS = {"esnli": "e-SNLI", "cqa": "CQA", "svamp": "SVAMP"} | {f"anli{i}": f"ANLI R{i}" for i in (1, 2, 3)}
_LABELS = {"gold": "gold labels", "teacher": "teacher's labels"}
_MAX_LENGTH = 40


def dataset_name(dataset: str) -> str:
    """A dataset in words."""
    return _DATASETS.get(dataset, dataset)


def labels_name(label_source: str) -> str:
    """The label source in words."""
    return _LABELS.get(label_source, f"{label_source} labels")


def method_name(method: str, label_source: str = "gold") -> str:
    """A method in words; standard finetuning on teacher labels is standard distillation."""
    if method == "Standard" and label_source == "teacher":
        return "standard distillation"
    return _METHODS.get(method, re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", method))


def metric_name(metric: str) -> str:
    """A logged metric in words."""
    return metric.replace("/", " ").replace("_", " ")


def is_share(metric: str) -> bool:
    """Whether a metric is a fraction, shown in %."""
    return not metric.endswith("loss")


def size_name(parameters: int) -> str:
    """A number of parameters, such as 248M or 2.85B."""
    unit, sign = next((pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if parameters >= pair[0]), (1, ""))
    number = parameters / unit
    return f"{round(number, 2 if number < 10 else 0):g}{sign}"


def fraction_name(fraction: float) -> str:
    """A fraction of the training rows, such as 12.5 %."""
    return f"{100 * fraction:.4g} %"


def family_name(student: str) -> str:
    """A student's name without its size."""
    return re.sub(r"[-_]?(?<![a-z])(tiny|mini|small|base|large|xx?l|\d+(\.\d+)?[bm])(?![a-z])", "", student, flags=re.I)


def short_names(names: Iterable[str], separator: str = ".") -> dict[str, str]:
    """Each key by its shortest unique ending, without ``init_args``."""
    whole = {name: name.replace(".init_args.", ".") for name in names}
    short = {}
    for name, text in whole.items():
        others = [f"{separator}{other}" for other in whole.values() if other != text]
        # what a user named is not left out
        own = re.match(r"model\.(?:tasks|teachers)\.(.+)|data\.(outputs\..+)", text)
        parts = [own[1] or own[2]] if own else text.split(separator)
        ends = (separator.join(parts[i:]) for i in reversed(range(len(parts))))
        short[name] = next((end for end in ends if not any(one.endswith(separator + end) for one in others)), text)
    return short


def value_names(values: Iterable[str]) -> dict[str, str]:
    """Config values as short as they stay different: empty if unset, classes by name, paths by their last part."""
    short = {value: _value_name(value) for value in values}
    return short if len(set(short.values())) == len(short) else {value: value for value in short}


def _value_name(value: str) -> str:
    if value in ("null", "none", "false"):
        return ""
    if classes := re.findall(r'"class_path": "(?:\w+\.)*(\w+)"', value):
        value = ", ".join(classes)
    elif not value.startswith(("[", "{")):
        value = value.rstrip("/").rpartition("/")[2] or value
    return value if len(value) <= _MAX_LENGTH else f"{value[: _MAX_LENGTH - 3]}..."
