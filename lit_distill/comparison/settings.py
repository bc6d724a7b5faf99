"""What a run was a run of: everything but its seeds."""

import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lit_distill.comparison.runs import Run
from lit_distill.files import flatten

STUDENT = "model.init_args.student"
"""The student's whole path."""
WEIGHT = "model.init_args.rationale_weight"
LABELS = "data.init_args.label_source"
FRACTION = "data.init_args.train_fraction"
PAIRING = "data.init_args.rationale_pairing"

_KNOWN = {"model.class_path", STUDENT, WEIGHT, "data.class_path", LABELS, FRACTION, PAIRING}
"""Keys that a column of their own stands for."""

_NO_DIFFERENCE = re.compile(
    r"trainer\.(logger|enable_\w+|log_every_n_steps|profiler|num_nodes|devices|strategy|accelerator)\b"
    # which checkpoint is tested is a difference
    r"|checkpoint$|checkpoint\.(?!(monitor|mode)$)|(ckpt_path|predictions|weights_only|cpu_threads)\b"
    r"|(test_after_fit|baseline_after_fit|push_to_hub|resume)$"
    r"|data\.init_args\.(num_workers|eval_batch_size|predict_split)$"
    r"|model\.init_args\.(num_samples|score_choices|evaluate_\w+)$"
    # seeds, and where files lie
    r"|(seed_everything|data\.init_args\.seed)$"
    r"|(trainer\.default_root_dir|data\.init_args\.(data_dir|cache_dir)|run_dir|out)$"
)
"""Keys that say on what and into what a run was run, and its seeds; what they do to the data, the hashes tell."""


@dataclass(frozen=True)
class Setting:
    """A group of runs that differ in their seeds alone."""

    dataset: str
    method: str
    student: str
    parameters: int
    label_source: str
    train_fraction: float
    rationales: str | None
    rationale_weight: float | None
    extra: tuple[tuple[str, str], ...] = ()
    """The other keys of the config that tell the settings of its dataset apart, with their values as text."""

    def having(self, key: str, value: str) -> "Setting":
        """It, with something more that tells it from others."""
        return replace(self, extra=tuple(sorted((*self.extra, (key, value)))))

    def value(self, key: str) -> str | None:
        """The value of a field, or of a key of the config, as text; ``None`` where it has none."""
        if key in FIELDS:
            found = getattr(self, key)
            return None if found is None else as_text(found)
        return dict(self.extra).get(key)


FIELDS = ("dataset", "method", "student", "label_source", "train_fraction", "rationales", "rationale_weight")
"""Of a setting, those that a user may name."""


def as_text(value: Any) -> str:  # noqa: ANN401 - whatever YAML holds
    """A value as it is compared and shown."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


WORLD = "devices"
"""A key of `aligned`: on how many devices a batch was taken, where the config leaves the whole batch to them."""


def aligned(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Source -> key -> value as text, with what a run's record does not have filled in.

    A key that some runs of a method lack came later: for them it is as it is where it is not set or switched off.
    A method has its own arguments, and all else of a config is everyone's.
    """
    configs = {run.source: whole_config(run.record.config) for run in runs}
    methods: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        methods[run.record.method].append(run.source)
    everywhere = {key for config in configs.values() for key in config}
    filled: dict[str, dict[str, str]] = {source: {} for source in configs}
    for key in everywhere:
        found = {as_text(config[key]) for config in configs.values() if key in config}
        absent = "false" if "false" in found and "null" not in found else "null"
        for sources in methods.values():
            if key.startswith("model.init_args.") and not any(key in configs[source] for source in sources):
                continue
            for source in sources:
                filled[source][key] = as_text(configs[source][key]) if key in configs[source] else absent
    return filled


def telling(config: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a config that tell its runs from others, with their values as text; not what is off or not set."""
    return {
        key: as_text(value)
        for key, value in sorted(whole_config(config).items())
        if not _NO_DIFFERENCE.match(key) and value is not None and value is not False
    }


def whole_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config, flat, with `WORLD`."""
    config = flatten(config)
    if config.get("model.init_args.effective_batch_size") is not None:
        return config
    devices, nodes = config.get("trainer.devices", "auto"), config.get("trainer.num_nodes", 1)
    if devices in ("auto", None) and config.get("trainer.accelerator") == "cpu":
        devices = 1
    if isinstance(devices, str) and re.fullmatch(r"\d+(,\d+)+,?", devices):
        devices = devices.strip(",").split(",")
    if isinstance(devices, list):
        devices = len(devices)
    try:
        world: Any = int(devices) * int(nodes or 1)
    except (TypeError, ValueError):
        world = "auto" if devices is None else devices
    return {**config, WORLD: world}


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The keys of the config in which runs of one dataset differ, but for those that make no difference.

    A key that a method does not have is no difference to methods that do; what methods share is compared.
    """
    values: dict[str, set[str]] = defaultdict(set)
    for config in aligned(runs).values():
        for key, value in config.items():
            values[key].add(value)
    return sorted(
        key for key, found in values.items() if len(found) > 1 and key not in _KNOWN and not _NO_DIFFERENCE.match(key)
    )


def following_keys(runs: Sequence[Run], keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Of differing keys, those that only follow the method and tell no settings apart: key -> method -> value.

    They are worth a word all the same: methods with different learning rates differ in more than the method.
    """
    configs = aligned(runs)
    values: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for run in runs:
        for key, value in configs[run.source].items():
            values[run.record.method][key].add(value)
    following: dict[str, dict[str, str]] = {}
    for key in keys:
        by_method = {method: by_key[key] for method, by_key in sorted(values.items()) if key in by_key}
        if all(len(found) == 1 for found in by_method.values()):
            following[key] = {method: next(iter(found)) for method, found in by_method.items()}
    return following


def setting_of(
    run: Run,
    keys: Iterable[str],
    parameters: int,
    *,
    config: Mapping[str, str] | None = None,
    student: str | None = None,
) -> Setting:
    """The setting of a run.

    Args:
        run: the run.
        keys: the keys of the config that tell settings of its dataset apart.
        parameters: its student's.
        config: its own of `aligned`.
        student: what its student is called; as in its record if not given.
    """
    record = run.record
    config = aligned([run])[run.source] if config is None else config
    weight = flatten(record.config).get(WEIGHT)
    extra = {key: config.get(key, "null") for key in keys if key in config or not key.startswith("model.init_args.")}
    return Setting(
        dataset=record.dataset,
        method=record.method,
        student=record.student if student is None else student,
        parameters=parameters,
        label_source=record.label_source,
        train_fraction=float(record.train_fraction),
        rationales=record.rationales,
        rationale_weight=float(weight) if isinstance(weight, int | float) else None,
        extra=tuple(sorted(extra.items())),
    )


def student_path(run: Run) -> str:
    """The student as the config names it; by its own name where the config does not."""
    given = flatten(run.record.config).get(STUDENT)
    return posixpath.normpath(given) if isinstance(given, str) and given else run.record.student


def student_names(runs: Iterable[Run]) -> dict[str, str]:
    """Source -> what its student is called: students of one name are told apart by as much of their paths as needed."""
    runs = list(runs)
    paths: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        paths[run.record.student].add(student_path(run))
    names: dict[str, str] = {}
    for run in runs:
        own, others = student_path(run), paths[run.record.student] - {student_path(run)}
        names[run.source] = _end(own, others) if others else run.record.student
    return names


def _end(path: str, others: Iterable[str]) -> str:
    parts = path.split("/")
    for length in range(1, len(parts)):
        end = "/".join(parts[-length:])
        if not any(f"/{other}".endswith(f"/{end}") for other in others):
            return end
    return path


def student_sizes(runs: Iterable[Run]) -> dict[str, int]:
    """The parameters of each student by its path, for the runs that do not say."""
    sizes: dict[str, int] = {}
    for run in runs:
        if run.record.parameters:
            sizes.setdefault(student_path(run), run.record.parameters)
    return sizes
