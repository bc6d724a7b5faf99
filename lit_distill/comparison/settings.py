"""Settings: what runs share that differ only in their seeds, and their names."""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lit_distill.comparison.runs import Run
from lit_distill.files import flatten

if TYPE_CHECKING:
    # imported where it is used, as it takes a second
    import pandas as pd  # type: ignore[import-untyped]

STUDENT = "model.init_args.student"
WEIGHT = "model.init_args.rationale_weight"
LABELS = "data.init_args.label_source"
FRACTION = "data.init_args.train_fraction"
PAIRING = "data.init_args.rationale_pairing"

_FIELDS_OF_SETTING = {"model.class_path", STUDENT, WEIGHT, "data.class_path", LABELS, FRACTION, PAIRING}

_IGNORED = re.compile(
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


@dataclass(frozen=True)
class Setting:
    """What runs that differ only in their seeds share."""

    dataset: str
    method: str
    student: str
    parameters: int
    label_source: str
    train_fraction: float
    rationales: str | None
    rationale_weight: float | None
    extra: tuple[tuple[str, str], ...] = ()
    """Other config keys in which the dataset's settings differ, with their values as text."""

    def having(self, key: str, value: str) -> "Setting":
        """A copy with one more key."""
        return replace(self, extra=tuple(sorted((*self.extra, (key, value)))))

    def value(self, key: str) -> str | None:
        """The value of a field or config key as text; ``None`` without one."""
        found = getattr(self, key) if key in FIELDS else dict(self.extra).get(key)
        return None if found is None else as_text(found)


FIELDS = ("dataset", "method", "student", "label_source", "train_fraction", "rationales", "rationale_weight")
"""Fields that may name a baseline."""


def as_text(value: object) -> str:
    """A config value as text, for comparing and showing."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def identifying(config: Mapping[str, Any]) -> dict[str, str]:
    """The config keys that distinguish settings, with their values as text."""
    flat = sorted(_config_text(config).items())
    return {key: value for key, value in flat if not _IGNORED.match(key) and value not in ("null", "false")}


def _config_text(config: Mapping[str, Any]) -> dict[str, str]:
    """A config with dotted keys and values as text; devices count only through the batch size."""
    flat = flatten(config)
    of_batch = flat.get("model.init_args.effective_batch_size") is None
    hidden = () if of_batch else ("trainer.devices", "trainer.num_nodes")
    return {key: as_text(value) for key, value in flat.items() if key not in hidden}


def config_table(runs: Sequence[Run]) -> "pd.DataFrame":
    """The configs of runs as text, indexed by source and method, with a column per key.

    A key missing from some configs was added in a later version and is treated as unset. A model argument that no run
    of a method has stays missing for that method.
    """
    import pandas as pd

    index = pd.MultiIndex.from_tuples([(run.source, run.record.method) for run in runs], names=["source", "method"])
    table = pd.DataFrame([_config_text(run.record.config) for run in runs], index=index, dtype=object)
    known = table.notna()
    applies = known.groupby(level="method").transform("any")
    applies.loc[:, [key for key in table if not key.startswith("model.init_args.")]] = True
    found = {key: set(table[key]) for key in table}
    unset = {key: "false" if "false" in found[key] and "null" not in found[key] else "null" for key in table}
    return table.where(known | ~applies, pd.Series(unset, dtype=object), axis=1)


def settings_of(runs: Sequence[Run], sizes: Mapping[str, int]) -> tuple[dict[str, Setting], list[str], list[str]]:
    """Source -> setting of one dataset's runs, the keys in which configs differ, and remarks on these.

    Args:
        runs: of one dataset.
        sizes: path of a student -> parameters, for records without them.
    """
    table = config_table(runs)
    keys = [key for key in table if not (key in _FIELDS_OF_SETTING or _IGNORED.match(key)) and table[key].nunique() > 1]
    followers, remarks = [], []
    for key in sorted(keys):
        values = {method: set(of_method.dropna()) for method, of_method in table[key].groupby(level="method")}
        if all(len(of_method) <= 1 for of_method in values.values()):
            # methods differ in more than the class; a prefix is part of a method
            followers.append(key)
            said = [f"{method_name(str(method))} {value_name(*of_one)}" for method, of_one in values.items() if of_one]
            words = short_names(keys)[key].replace("_", " ")
            remarks += [f"{words} differs between methods: {', '.join(said)}"] * (not key.endswith("_prefix"))
    extra = table[sorted(set(keys) - set(followers))].droplevel("method")
    paths: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        paths[run.record.student].add(run.student_path)
    tests = {run.test for run in runs} - {""}
    settings = {}
    for run in runs:
        record, same_name = run.record, paths[run.record.student]
        weight = flatten(record.config).get(WEIGHT)
        setting = Setting(
            dataset=record.dataset,
            method=record.method,
            student=record.student if len(same_name) == 1 else short_names(same_name, "/")[run.student_path],
            parameters=record.parameters or sizes.get(run.student_path, 0),
            label_source=record.label_source,
            train_fraction=float(record.train_fraction),
            rationales=record.rationales,
            rationale_weight=float(weight) if isinstance(weight, int | float) else None,
            extra=tuple(extra.loc[run.source].dropna().items()),
        )
        settings[run.source] = setting.having("test rows", run.test or "unknown") if len(tests) > 1 else setting
    if any(not run.test for run in runs):
        remarks.append("It is unknown on which rows some runs were tested")
    return settings, sorted(keys) + [STUDENT] * any(len(path) > 1 for path in paths.values()), remarks


_METHODS = {"Standard": "standard finetuning", "SingleTask": "single task: rationale and label"}
_METHODS |= {"StepByStep": "step-by-step"}
_DATASETS = {"esnli": "e-SNLI", "cqa": "CQA", "svamp": "SVAMP"} | {f"anli{i}": f"ANLI R{i}" for i in (1, 2, 3)}
_LABELS = {"gold": "gold labels", "teacher": "teacher's labels"}
_MAX_LENGTH = 40
_TASK = re.compile(r"model\.init_args\.tasks\.(.+)\.(?=\w+$)")


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


def variant_names(settings: Iterable[Setting], keys: Collection[str] | None = None) -> dict[Setting, str]:
    """Each setting in words, without dataset, student, labels and fraction; equal names are numbered.

    Args:
        settings: all that must be distinguished.
        keys: config keys that distinguish them; all by default.
    """
    settings = sorted(settings, key=lambda setting: setting.extra)
    short = short_names({key for setting in settings for key, _ in setting.extra})
    weights: dict[str, set[float | None]] = defaultdict(set)
    values: dict[str, set[str]] = defaultdict(set)
    for setting in settings:
        weights[setting.method].add(setting.rationale_weight)
        for key, value in setting.extra:
            values[key] |= {value} - {"null"}
    names: dict[Setting, str] = {}
    variants: dict[str, dict[tuple[object, ...], int]] = defaultdict(dict)
    numbers: dict[Setting, int] = {}
    for setting in settings:
        extra = tuple((key, value) for key, value in setting.extra if keys is None or key in keys)
        parts = [method_name(setting.method, setting.label_source)]
        if setting.rationales not in (None, "own"):
            parts.append(f"{setting.rationales} rationales")
        if len(weights[setting.method]) > 1 and setting.rationale_weight is not None:
            parts.append(f"rationale weight {setting.rationale_weight:g}")
        for key, value in extra:
            if value not in ("null", "none", "false"):
                words = short[key].replace("_", " ")
                part = words if value == "true" else f"{words} {value_name(value)}"
                task = _TASK.match(key)
                if task and f"{task[0]}prefix" in dict(extra) and len(values[key]) == 1:
                    # wherever this task is, it has this value
                    part = f"task {task[1]}"
                parts += [part] * (part not in parts)
        names[setting] = name = ", ".join(parts)
        variant = (setting.method, setting.rationales, setting.rationale_weight, extra)
        numbers[setting] = variants[name].setdefault(variant, len(variants[name]) + 1)
    return {
        setting: f"{name} ({numbers[setting]})" if len(variants[name]) > 1 else name for setting, name in names.items()
    }


def value_name(value: str) -> str:
    """A short config value: classes as name and arguments, paths as their last part."""
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = None
    if isinstance(parsed, list) and parsed and all(isinstance(one, dict) and "class_path" in one for one in parsed):
        value = ", ".join(map(_class_name, parsed))
    elif not value.startswith(("[", "{")):
        value = value.rstrip("/").rpartition("/")[2] or value
    return value if len(value) <= _MAX_LENGTH else f"{value[: _MAX_LENGTH - 3]}..."


def _class_name(spec: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{key}={value}" for key, value in flatten(spec).items() if key != "class_path")
    name = str(spec["class_path"]).rpartition(".")[2]
    return name + (f"({arguments})" if arguments else "").replace("init_args.", "")


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
