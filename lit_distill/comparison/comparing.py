"""Group runs by setting, and compare each setting with its baseline and with published results."""

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lit_distill.comparison.published import TEACHER, Published, published
from lit_distill.comparison.runs import Run
from lit_distill.comparison.settings import FIELDS, Setting, as_text, settings_of, short_names, variant_names
from lit_distill.comparison.statistics import Difference, Mean, paired_bootstrap
from lit_distill.errors import UserError
from lit_distill.files import flatten

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

ACCURACY = "test/accuracy"
"""The metric that predictions give per row, and that was published."""

_DATA_DIR = "data.init_args.data_dir"

Groups = dict[Setting, list[Run]]


@dataclass(frozen=True)
class Result:
    """A setting and the results of its runs."""

    setting: Setting
    name: str  # the setting in words, without dataset, student, labels and fraction
    runs: tuple[Run, ...]
    metric: Mean
    baseline: Setting | None
    by_row: Difference | None  # difference to the baseline, over test rows
    by_seed: Mean | None  # differences to the baseline's runs with the same seeds
    left_out: bool  # the differences leave out runs whose seeds only one side has
    remark: str  # why a difference is missing
    published: Published | None
    is_baseline: bool  # whether others are compared with it


@dataclass(frozen=True)
class Section:
    """The results of one dataset."""

    dataset: str
    results: tuple[Result, ...]
    keys: tuple[str, ...]  # config keys in which its runs differ
    teachers: tuple[float, ...]  # accuracies of the teacher labels on test
    remarks: tuple[str, ...]
    chance: float | None  # accuracy without reading the input, if known


@dataclass(frozen=True)
class Comparison:
    """The content of a report."""

    metric: str
    sections: tuple[Section, ...]
    runs: tuple[Run, ...]  # all runs that have the metric, with duplicates
    repeated: Mapping[str, str]  # source of a duplicate run -> source of the one that is compared instead
    skipped: Mapping[str, str]  # source -> why it is not compared
    resamples: int
    seed: int

    @property
    def compared(self) -> list[Run]:
        """The runs without duplicates."""
        return [run for run in self.runs if run.source not in self.repeated]


def compare_runs(
    runs: Sequence[Run],
    skipped: Mapping[str, str] | None = None,
    *,
    metric: str = ACCURACY,
    baseline: str | None = None,
    allow_different_tests: bool = False,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare runs; ``skipped`` are folders without a finished run, the other arguments as in the command.

    Raises:
        UserError: there are no runs, their test rows differ, or an argument is wrong.
    """
    skipped = dict(skipped or {})
    if not runs:
        reasons = "".join(f"; {source}: {reason}" for source, reason in list(skipped.items())[:3])
        raise UserError(f"runs: found no finished run ({len(skipped)} skipped{reasons})")
    with_metric = [run for run in runs if metric in run.record.metrics]
    if not with_metric:
        allowed = sorted({name for run in runs for name in run.record.metrics})
        raise UserError(f"metric: no run has {metric!r}; allowed are {', '.join(allowed) or 'none: no run was tested'}")
    skipped |= {run.source: f"no {metric} among its metrics" for run in runs if metric not in run.record.metrics}
    sizes = {run.student_path: run.record.parameters for run in reversed(with_metric) if run.record.parameters}
    datasets = sorted(grouped(with_metric, lambda run: run.record.dataset).items())
    if not allow_different_tests:
        for dataset, own in datasets:
            _check_test_rows(dataset, own)
    groups: dict[str, Groups] = {}
    keys: dict[str, list[str]] = {}
    remarks: dict[str, list[str]] = {}
    repeated: dict[str, str] = {}
    for dataset, own in datasets:
        settings, keys[dataset], remarks[dataset] = settings_of(own, sizes)
        groups[dataset] = {}
        for setting, same in grouped(own, lambda run: settings[run.source]).items():  # noqa: B023 - used at once
            for part, of_part in _split_by_training_rows(setting, same).items():
                groups[dataset][part] = _without_repeated(of_part, repeated)
    wanted = read_baseline(baseline, [setting for group in groups.values() for setting in group])
    sections = []
    for dataset, group in groups.items():
        results = sorted(_results(group, wanted, metric, resamples, seed), key=_order)
        records = [run.record for result in results for run in result.runs]
        known = {round(one.teacher_accuracy, 6) for one in records if one.teacher_accuracy is not None}
        chances = [
            one.chance for one in records if one.chance is not None and metric in (ACCURACY, "test/scored_accuracy")
        ]
        sections.append(
            Section(
                dataset=dataset,
                results=tuple(results),
                keys=tuple(keys[dataset]),
                teachers=tuple(sorted(known or {TEACHER.get(dataset, 0.0)} - {0.0})),
                remarks=tuple(remarks[dataset]),
                chance=max(chances, default=None),
            )
        )
    return Comparison(metric, tuple(sections), tuple(with_metric), repeated, skipped, resamples, seed)


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Group items by a key, in their order."""
    groups: dict[K, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def _check_test_rows(dataset: str, runs: Sequence[Run]) -> None:
    """Refuse runs whose test rows differ in hash, number or ids, where these are known."""
    tests = {run.test for run in runs} - {""}
    counts = {run.record.test_rows for run in runs} - {0}
    ids = {run.ids for run in runs} - {""}
    if max(len(tests), len(counts), len(ids)) > 1:

        def place(run: Run) -> str:
            return (run.test or f"{run.record.test_rows:,} rows") + (f", ids {run.ids[:8]}" if len(ids) > 1 else "")

        places = ", ".join(
            f"{own[0].source} ({where})" + (f" and {len(own) - 1} more" if len(own) > 1 else "")
            for where, own in grouped(runs, place).items()
        )
        raise UserError(
            f"runs: those of {dataset} were tested on different rows: {places}; their accuracies cannot be compared, "
            "or give --allow_different_tests true"
        )


def _split_by_training_rows(setting: Setting, runs: Sequence[Run]) -> Groups:
    """Split a setting's runs by data folder, or else by the hash of their data, if their training data differ.

    They differ if one data seed has several hashes, or if unlabelled rows cannot explain the numbers of rows.
    """
    records = [run.record for run in runs]
    hashes = {(one.data_seed, one.fingerprints["train"]) for one in records if "train" in one.fingerprints}
    counts = [one.train_rows for one in records if one.train_rows] or [0]
    if len(hashes) == len({seed for seed, _ in hashes}) and max(counts) <= 1.1 * min(counts) + 5:
        return {setting: list(runs)}
    key, parts = _DATA_DIR, grouped(runs, lambda run: as_text(flatten(run.record.config).get(_DATA_DIR)))
    # a separate folder for each run says nothing
    if not 1 < len(parts) < len(runs):
        key = "training_rows"
        parts = grouped(runs, lambda run: f"{run.record.train_rows:,} {run.record.fingerprints.get('train', '')}")
    return {setting.having(key, part.strip()): own for part, own in sorted(parts.items())}


def _without_repeated(runs: Iterable[Run], repeated: dict[str, str]) -> list[Run]:
    """One run per seed, preferably with predictions, and the latest; adds the others to ``repeated``."""
    kept = []
    for _, same in sorted(grouped(runs, lambda run: run.seeds).items()):
        *others, best = sorted(same, key=lambda run: (run.correct is not None, run.record.started, run.source))
        kept.append(best)
        repeated |= {other.source: best.source for other in others}
    return kept


def read_baseline(text: str | None, settings: Sequence[Setting]) -> dict[str, str]:
    """Parse ``key=value,key=value``; standard finetuning by default. Raises a ``UserError`` for unknown keys."""
    if text is None:
        return {"method": "Standard"}
    keys = {key for setting in settings for key, _ in setting.extra}
    allowed = {name: name for name in (*FIELDS, *keys)} | {short: key for key, short in short_names(keys).items()}
    wanted: dict[str, str] = {}
    for pair in text.replace(",", " ").split() or [text]:
        name, _, value = pair.partition("=")
        if not value:
            raise UserError(f"baseline: {pair!r} is not of the form key=value")
        if name not in allowed:
            raise UserError(f"baseline: no key {name!r}; allowed are {', '.join(sorted(allowed))}")
        # 0.50 is 0.5
        wanted[allowed[name]] = f"{float(value):g}" if re.fullmatch(r"\d+(\.\d+)?", value) else value
        if not any(_matches(setting, wanted) for setting in settings):
            found = {str(setting.value(allowed[name])) for setting in settings} - {"None"}
            said = ", ".join(f"{key}={value}" for key, value in wanted.items())
            raise UserError(f"baseline: no run has {said}; {name} is one of {', '.join(sorted(found))}")
    return wanted


def _matches(setting: Setting, wanted: Mapping[str, str]) -> bool:
    return all(setting.value(key) == value for key, value in wanted.items())


def find_baseline(
    setting: Setting, settings: Iterable[Setting], wanted: Mapping[str, str]
) -> tuple[Setting | None, str]:
    """The setting with the wanted values that is most similar to ``setting``; else ``None`` and why."""
    if _matches(setting, wanted):
        return None, ""
    same = {"dataset", "student", "label_source", "train_fraction"} - set(wanted)
    candidates = [
        other
        for other in settings
        if _matches(other, wanted) and all(getattr(other, field) == getattr(setting, field) for field in same)
    ]
    shared = [len(set(other.extra) & set(setting.extra)) for other in candidates]
    best = [other for other, count in zip(candidates, shared, strict=True) if count == max(shared)]
    if not best:
        return None, "no baseline with its student, labels and fraction"
    if len(best) > 1:
        return None, f"{len(best)} settings could be its baseline; name one with --baseline"
    return best[0], ""


def _results(groups: Groups, wanted: Mapping[str, str], metric: str, resamples: int, seed: int) -> Iterator[Result]:
    """The results of one dataset."""
    baselines = {setting: find_baseline(setting, groups, wanted) for setting in groups}
    names = variant_names(groups)
    for setting, runs in groups.items():
        baseline, remark = baselines[setting]
        others = groups[baseline] if baseline else []
        both = {run.seeds for run in runs} & {run.seeds for run in others}
        # both differences use the same runs; without a shared seed, that over rows uses all
        own, other = ([run for run in some if not both or run.seeds in both] for some in (runs, others))
        by_row = by_seed = None
        if both and len({run.test for run in (*own, *other)} - {""}) < 2:
            pairs = zip(own, other, strict=True)
            by_seed = Mean(tuple(a.record.metrics[metric] - b.record.metrics[metric] for a, b in pairs))
        if baseline:
            remark = _why_unpaired([*own, *other], metric)
            if not remark:
                by_row = paired_bootstrap(_answers(own), _answers(other), resamples=resamples, seed=seed)
        paper = {published(run) for run in runs} if metric == ACCURACY else set()
        yield Result(
            setting=setting,
            name=names[setting],
            runs=tuple(runs),
            metric=Mean(tuple(run.record.metrics[metric] for run in runs)),
            baseline=baseline,
            by_row=by_row,
            by_seed=by_seed,
            left_out=len(own) < len(runs) or len(other) < len(others),
            remark=remark,
            published=paper.pop() if len(paper) == 1 else None,
            is_baseline=any(setting == other for other, _ in baselines.values()),
        )


def _why_unpaired(runs: Sequence[Run], metric: str) -> str:
    """Why there is no difference over test rows; empty if there is one."""
    if metric != ACCURACY:
        return f"predictions say nothing about {metric}"
    if any(run.correct is None for run in runs):
        return "without predictions"
    labelled = {(run.ids, np.isnan(run.correct).tobytes()) for run in runs if run.correct is not None}
    return "tested on different rows" if len(labelled) > 1 or len({run.test for run in runs} - {""}) > 1 else ""


def _answers(runs: Sequence[Run]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """``(runs, labelled test rows)``: 1 where right."""
    return np.stack([run.correct[~np.isnan(run.correct)] for run in runs if run.correct is not None])


def _order(result: Result) -> tuple[object, ...]:
    """Sort key: labels, student size, fraction, then standard finetuning first."""
    one = result.setting
    method = (one.method != "Standard", one.method, one.rationale_weight or 0.0, result.name)
    return one.label_source, one.parameters, one.student, one.train_fraction, *method
