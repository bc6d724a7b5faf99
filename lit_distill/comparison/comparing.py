"""From runs to what is said of them: grouped by setting, each beside its baseline and what was published."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lit_distill.comparison.baselines import find_baseline, read_baseline
from lit_distill.comparison.names import method_name, short_keys, value_name, variant_names
from lit_distill.comparison.published import SOURCE, TEACHER, Published, published
from lit_distill.comparison.rows import SPLITTING, name_tests, split_by_training
from lit_distill.comparison.runs import Found, Run, Skipped
from lit_distill.comparison.settings import (
    STUDENT,
    Setting,
    aligned,
    differing_keys,
    following_keys,
    setting_of,
    student_names,
    student_path,
    student_sizes,
)
from lit_distill.comparison.statistics import (
    ExampleDifference,
    SeedDifference,
    Summary,
    paired_bootstrap,
    paired_by_seed,
    summarize,
)
from lit_distill.errors import UserError
from lit_distill.files import flatten

ACCURACY = "test/accuracy"
"""The metric that predictions are judged by, and that was published."""

SCORED = "test/scored_accuracy"
"""The accuracy of the likeliest choice."""


@dataclass(frozen=True)
class Row:
    """A setting, and what was found of it."""

    setting: Setting
    name: str
    """Without dataset, student, labels and fraction."""
    runs: tuple[Run, ...]
    summary: Summary
    baseline: Setting | None
    examples: ExampleDifference | None
    """To the baseline, over test rows."""
    seeds: SeedDifference | None
    """To the baseline, over seeds."""
    left_out: tuple[int, int]
    """Runs of it and of the baseline that the differences leave out, as the other has none of the same seeds."""
    remark: str
    """Why a difference is missing."""
    published: Published | None
    is_baseline: bool
    """Others are compared with it."""


@dataclass(frozen=True)
class Section:
    """A dataset."""

    dataset: str
    rows: tuple[Row, ...]
    keys: tuple[str, ...]
    """Of the config, those in which its runs differ."""
    tests: Mapping[str, int]
    """Hash of the test rows -> how many; an empty hash where it is not known."""
    teachers: Mapping[float, str]
    """Accuracy of a teacher's labels -> where it is from."""
    remarks: tuple[str, ...]
    chance: float | None
    """Of the metric, where it is an accuracy and a run knows it."""

    def row(self, setting: Setting) -> Row:
        """The row of a setting."""
        return next(row for row in self.rows if row.setting == setting)


@dataclass(frozen=True)
class Comparison:
    """All that a report says."""

    metric: str
    sections: tuple[Section, ...]
    runs: tuple[Run, ...]
    """Those that are compared."""
    duplicates: Mapping[str, str]
    """Source of a run that was done again -> source of the one that is compared in its place."""
    repeated: tuple[Run, ...]
    """The runs of `duplicates`."""
    skipped: tuple[Skipped, ...]
    resamples: int
    seed: int


def compare_runs(
    found: Found,
    *,
    metric: str = ACCURACY,
    baseline: str | None = None,
    allow_different_tests: bool = False,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare runs.

    Args:
        found: the runs.
        metric: what is compared, by its logged name.
        baseline: ``key=value,key=value``; standard finetuning if not given.
        allow_different_tests: runs of a dataset may have been tested on different rows.
        resamples: of the bootstrap.
        seed: of its draws.

    Raises:
        UserError: there are no runs, the test rows differ, or an argument is wrong.
    """
    if not found.runs:
        skipped = "".join(f"; {one.source}: {one.reason}" for one in found.skipped[:3])
        raise UserError(f"runs: no run that ended was found ({len(found.skipped)} skipped{skipped})")
    found = found.with_metric(metric)
    by_dataset: dict[str, list[Run]] = defaultdict(list)
    for run in found.runs:
        by_dataset[run.record.dataset].append(run)
    for dataset in by_dataset:
        by_dataset[dataset] = name_tests(by_dataset[dataset])
    compared = [run for runs in by_dataset.values() for run in runs]
    for dataset, runs in by_dataset.items():
        _check_tests(dataset, runs, allowed=allow_different_tests)
    sizes = student_sizes(found.runs)
    grouped: dict[str, dict[Setting, list[Run]]] = {}
    keys: dict[str, list[str]] = {}
    following: dict[str, dict[str, dict[str, str]]] = {}
    duplicates: dict[str, str] = {}
    for dataset, runs in sorted(by_dataset.items()):
        keys[dataset] = differing_keys(runs)
        following[dataset] = following_keys(runs, keys[dataset])
        telling = [key for key in keys[dataset] if key not in following[dataset]]
        grouped[dataset], repeated = _group(runs, telling, sizes)
        if any(len({student_path(run) for run in one}) > 1 for one in _by_student(runs).values()):
            keys[dataset].append(STUDENT)
        duplicates |= repeated
    settings = [setting for groups in grouped.values() for setting in groups]
    wanted = read_baseline(baseline, settings)
    sections = tuple(
        _section(dataset, groups, keys[dataset], following[dataset], metric, wanted, resamples, seed)
        for dataset, groups in grouped.items()
    )
    return Comparison(
        metric=metric,
        sections=sections,
        runs=tuple(run for run in compared if run.source not in duplicates),
        duplicates=duplicates,
        repeated=tuple(run for run in compared if run.source in duplicates),
        skipped=found.skipped,
        resamples=resamples,
        seed=seed,
    )


def _by_student(runs: Sequence[Run]) -> dict[str, list[Run]]:
    students: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        students[run.record.student].append(run)
    return students


def _tests(runs: Sequence[Run]) -> dict[str, list[Run]]:
    tests: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        tests[run.test].append(run)
    return tests


def _check_tests(dataset: str, runs: Sequence[Run], *, allowed: bool) -> None:
    known = {test: group for test, group in _tests(runs).items() if test}
    if len(known) > 1 and not allowed:
        places = ", ".join(
            f"{group[0].source} ({test})" + (f" and {len(group) - 1} more like it" if len(group) > 1 else "")
            for test, group in known.items()
        )
        raise UserError(
            f"runs: those of {dataset} were tested on different rows: {places}; their accuracies cannot be compared, "
            "or give --allow_different_tests true"
        )


def _group(
    runs: Sequence[Run], keys: Sequence[str], sizes: Mapping[str, int]
) -> tuple[dict[Setting, list[Run]], dict[str, str]]:
    """Runs by setting, each pair of seeds once; of runs that were done again, the one that was started last."""
    several = sum(bool(test) for test in _tests(runs)) > 1
    configs, students = aligned(runs), student_names(runs)
    groups: dict[Setting, list[Run]] = defaultdict(list)
    for run in runs:
        parameters = run.record.parameters or sizes.get(student_path(run), 0)
        setting = setting_of(run, keys, parameters, config=configs[run.source], student=students[run.source])
        if several:
            setting = setting.having("test rows", run.test or "unknown")
        groups[setting].append(run)
    kept: dict[Setting, list[Run]] = {}
    duplicates: dict[str, str] = {}
    parts = [part for setting, group in groups.items() for part in split_by_training(setting, group)]
    for setting, group in parts:
        by_seeds: dict[tuple[int, int], list[Run]] = defaultdict(list)
        for run in group:
            by_seeds[run.seeds].append(run)
        kept[setting] = []
        for _, same in sorted(by_seeds.items()):
            # predictions first: an online copy of a run knows less
            *others, best = sorted(same, key=lambda run: (run.predictions is not None, run.record.started, run.source))
            kept[setting].append(best)
            duplicates |= {other.source: best.source for other in others}
    return kept, duplicates


def _section(
    dataset: str,
    groups: Mapping[Setting, list[Run]],
    keys: Sequence[str],
    following: Mapping[str, Mapping[str, str]],
    metric: str,
    wanted: Mapping[str, str],
    resamples: int,
    seed: int,
) -> Section:
    runs = [run for group in groups.values() for run in group]
    values = {setting: {run.seeds: run.record.metrics[metric] for run in group} for setting, group in groups.items()}
    rows = []
    found = {setting: find_baseline(setting, list(groups), wanted) for setting in groups}
    bases = {base for base, _ in found.values()}
    names = variant_names(list(groups))
    for setting, group in groups.items():
        base, remark = found[setting]
        examples = seeds = None
        left_out = 0, 0
        if base is not None:
            own, other = _shared(group, groups[base])
            left_out = len(group) - len(own), len(groups[base]) - len(other)
            seeds = _by_seed(values[setting], values[base], group, groups[base])
            examples, remark = _by_example(own, other, metric, resamples, seed)
        rows.append(
            Row(
                setting=setting,
                name=names[setting],
                runs=tuple(group),
                summary=summarize(list(values[setting].values()), [run.predictions for run in group]),
                baseline=base,
                examples=examples,
                seeds=seeds,
                left_out=left_out,
                remark=remark,
                published=_published(group) if metric == ACCURACY else None,
                is_baseline=setting in bases,
            )
        )
    rows.sort(key=_order)
    tests = {test: max(run.record.test_rows for run in group) for test, group in sorted(_tests(runs).items())}
    return Section(
        dataset=dataset,
        rows=tuple(rows),
        keys=tuple(keys),
        tests=tests,
        teachers=_teachers(dataset, runs),
        remarks=tuple([*_confounded(following), *_remarks(rows)]),
        chance=max((run.chance for run in runs if run.chance is not None), default=None)
        if metric in (ACCURACY, SCORED)
        else None,
    )


def _order(row: Row) -> tuple[object, ...]:
    """Labels, students by size, fractions, then methods with standard finetuning first."""
    setting = row.setting
    known = ("Standard", "SingleTask", "StepByStep")
    place = known.index(setting.method) if setting.method in known else len(known)
    variant = (setting.rationales not in (None, "own"), setting.rationale_weight or 0.0)
    size = (setting.parameters, setting.student)
    return setting.label_source, *size, setting.train_fraction, place, setting.method, variant, setting.extra


def _shared(own: Sequence[Run], base: Sequence[Run]) -> tuple[Sequence[Run], Sequence[Run]]:
    """The runs whose seeds both have, so that both differences are of the same runs; all where there are none."""
    both = {run.seeds for run in own} & {run.seeds for run in base}
    if not both:
        return own, base
    return [run for run in own if run.seeds in both], [run for run in base if run.seeds in both]


def _by_seed(
    own: Mapping[tuple[int, int], float],
    base: Mapping[tuple[int, int], float],
    own_runs: Sequence[Run],
    base_runs: Sequence[Run],
) -> SeedDifference | None:
    tests = {run.test for run in (*own_runs, *base_runs) if run.test}
    return paired_by_seed(own, base) if len(tests) <= 1 else None


def _by_example(
    own: Sequence[Run], base: Sequence[Run], metric: str, resamples: int, seed: int
) -> tuple[ExampleDifference | None, str]:
    """The paired bootstrap, or why there is none."""
    if metric != ACCURACY:
        return None, f"predictions say nothing of {metric}"
    predictions = [[run.predictions for run in group if run.predictions is not None] for group in (own, base)]
    if any(len(known) < len(group) for known, group in zip(predictions, (own, base), strict=True)):
        return None, "without predictions"
    if len({run.test for run in (*own, *base)}) > 1:
        return None, "tested on different rows"
    if len({one.ids for group in predictions for one in group}) > 1:
        return None, "the ids of the test rows differ"
    left, right = (np.stack([one.correct for one in group]) for group in predictions)
    return paired_bootstrap(left, right, resamples=resamples, seed=seed), ""


def _published(group: Sequence[Run]) -> Published | None:
    found = {
        published(
            dataset=run.record.dataset,
            method=run.record.method,
            student=student_path(run),
            parameters=run.record.parameters,
            train_rows=run.record.train_rows,
            label_source=run.record.label_source,
            train_fraction=run.record.train_fraction,
            rationales=run.record.rationales,
            test_rows=run.record.test_rows,
            config=flatten(run.record.config),
        )
        for run in group
    }
    return found.pop() if len(found) == 1 else None


def _teachers(dataset: str, runs: Sequence[Run]) -> dict[float, str]:
    own = {
        round(run.record.teacher_accuracy, 6) for run in runs if isinstance(run.record.teacher_accuracy, int | float)
    }
    if own:
        return dict.fromkeys(sorted(own), "the runs")
    return {TEACHER[dataset]: f"the outputs that {SOURCE} released"} if dataset in TEACHER else {}


def _confounded(following: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The keys in which methods differ beside being other methods; prefixes are part of a method."""
    short = short_keys(following)
    return [
        f"{short[key].replace('_', ' ')} differs between methods: "
        + ", ".join(f"{method_name(method)} {value_name(value)}" for method, value in by_method.items())
        for key, by_method in following.items()
        if not key.endswith("_prefix")
    ]


def _remarks(rows: Sequence[Row]) -> list[str]:
    """What a reader should know before reading a section's numbers."""
    remarks = []
    apart = [row for row in rows if any(key in SPLITTING for key, _ in row.setting.extra)]
    if apart:
        names = ", ".join(f"{row.name} ({row.setting.student})" for row in apart)
        remarks.append(
            "Runs with the same config and data seed, or the same part of the data, were trained on different rows or "
            f"rationales, and are not taken together: {names}"
        )
    for row in rows:
        tested = {run.test for run in row.runs}
        if "" in tested:
            remarks.append(f"{row.name} ({row.setting.student}): which rows some runs were tested on is not known")
    return remarks
