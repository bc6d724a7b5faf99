"""What a run was a run of: everything but its seeds."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_distill.comparison.runs import Run

_KNOWN = {
    "model.class_path",
    "model.init_args.student",
    "model.init_args.rationale_weight",
    "data.class_path",
    "data.init_args.label_source",
    "data.init_args.train_fraction",
    "data.init_args.rationale_pairing",
}
"""Keys that a column of their own stands for."""

_NO_DIFFERENCE = re.compile(
    r"trainer\.(logger|enable_\w+|log_every_n_steps|profiler|num_nodes|devices|strategy|accelerator)\b"
    r"|(checkpoint|ckpt_path|predictions|weights_only|cpu_threads|test_after_fit|baseline_after_fit)\b"
    r"|data\.init_args\.(num_workers|eval_batch_size|predict_split)$"
    r"|model\.init_args\.(num_samples|score_choices|evaluate_\w+)$"
    # seeds, and where files lie
    r"|(.*[._])?seed(_everything)?$"
    r"|(.*[._])?(dir|dirpath|path|folder|file|out)$"
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

    def value(self, key: str) -> str | None:
        """The value of a field, or of a key of the config, as text; ``None`` where it has none."""
        if key in FIELDS:
            found = getattr(self, key)
            return None if found is None else as_text(found)
        return dict(self.extra).get(key)


FIELDS = ("dataset", "method", "student", "label_source", "train_fraction", "rationales", "rationale_weight")
"""Of a setting, those that a user may name."""


def flatten(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A config with its keys joined by dots; lists stay as they are, and empty mappings are not there."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{before}{name}.")
        else:
            flat[f"{before}{name}"] = value
    return flat


def as_text(value: Any) -> str:  # noqa: ANN401 - whatever YAML holds
    """A value as it is compared and shown."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The keys of the config in which runs of one dataset differ, but for those that make no difference.

    A key that a method does not have is no difference to methods that do; what methods share is compared.
    """
    values: dict[str, set[str]] = defaultdict(set)
    for by_key in _values(runs).values():
        for key, found in by_key.items():
            values[key] |= found
    return sorted(
        key for key, found in values.items() if len(found) > 1 and key not in _KNOWN and not _NO_DIFFERENCE.match(key)
    )


def following_keys(runs: Sequence[Run], keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Of differing keys, those that only follow the method and tell no settings apart: key -> method -> value.

    They are worth a word all the same: methods with different learning rates differ in more than the method.
    """
    values = _values(runs)
    following: dict[str, dict[str, str]] = {}
    for key in keys:
        by_method = {method: by_key[key] for method, by_key in sorted(values.items()) if key in by_key}
        if all(len(found) == 1 for found in by_method.values()):
            following[key] = {method: next(iter(found)) for method, found in by_method.items()}
    return following


def _values(runs: Sequence[Run]) -> dict[str, dict[str, set[str]]]:
    """Method -> key -> its values as text; a method has its own arguments, and all else of a config."""
    methods: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        methods[run.record.method].append(flatten(run.record.config))
    everywhere = {key for configs in methods.values() for config in configs for key in config}
    values: dict[str, dict[str, set[str]]] = {}
    for method, configs in methods.items():
        own = {key for config in configs for key in config}
        values[method] = {
            key: {as_text(config.get(key)) for config in configs}
            for key in everywhere
            if key in own or not key.startswith("model.init_args.")
        }
    return values


def setting_of(run: Run, keys: Iterable[str], parameters: int, more: Mapping[str, str] | None = None) -> Setting:
    """The setting of a run.

    Args:
        run: the run.
        keys: the keys of the config that tell settings of its dataset apart.
        parameters: its student's.
        more: what else tells it from others.
    """
    record, config = run.record, flatten(run.record.config)
    weight = config.get("model.init_args.rationale_weight")
    extra = {key: as_text(config.get(key)) for key in keys if key in config or not key.startswith("model.init_args.")}
    return Setting(
        dataset=record.dataset,
        method=record.method,
        student=record.student,
        parameters=parameters,
        label_source=record.label_source,
        train_fraction=float(record.train_fraction),
        rationales=record.rationales,
        rationale_weight=float(weight) if isinstance(weight, int | float) else None,
        extra=tuple(sorted({**extra, **(more or {})}.items())),
    )


def student_sizes(runs: Iterable[Run]) -> dict[str, int]:
    """The parameters of each student, for the runs that do not say."""
    sizes: dict[str, int] = {}
    for run in runs:
        if run.record.parameters:
            sizes.setdefault(run.record.student, run.record.parameters)
    return sizes
