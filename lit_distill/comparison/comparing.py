"""Compare each setting with its baseline and with published results."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from lit_distill.comparison import names
from lit_distill.comparison.published import ROWS, TEACHER, published_row
from lit_distill.comparison.runs import ACCURACY, VOTE, Run
from lit_distill.comparison.settings import as_text
from lit_distill.comparison.statistics import Difference, paired_bootstrap, standard_error
from lit_distill.comparison.table import IDENTITY, runs_table
from lit_distill.errors import UserError
from lit_distill.records import below_floor

TRAIN_TOKENS, TOKENS, VOTE_TOKENS = "train_tokens", "test/tokens", "test/vote_tokens"
FURTHER = (TRAIN_TOKENS, TOKENS, VOTE_TOKENS, VOTE, "test/worst_group_accuracy", "test/group_macro_f1")
"""What is shown of a setting beside the metric: a field of the record, and further metrics."""

ACCURACIES = (ACCURACY, VOTE, "test/scored_accuracy", "val/accuracy")
"""The metrics that chance and floors may be of."""

_DIFFERENCES = [*Difference._fields, "seed_differences", "seed_difference", "seed_error", "seed_n"]


@dataclass(frozen=True)
class Comparison:
    """The content of a report."""

    metric: str
    settings: pd.DataFrame
    """A row a setting, ordered for a table. Its columns; a value that is not known is ``None`` or NaN:

    - ``name``, ``given``, ``usual``, those of `IDENTITY`, and those of ``keys``: as in `runs_table`.
    - ``runs``, ``values``: its runs, one a seed, and their metric; ``n``, ``mean``, ``error``: the number of seeds, the
      mean and its standard error.
    - ``baseline``: the row of the setting that it is compared with; ``compared_with``: that one in words;
      ``is_baseline``: others are compared with it.
    - ``difference``, ``low``, ``high``, ``p_value``, ``differing``: to the baseline, over test rows; ``remark``: why
      there is none.
    - ``seed_differences``: to the baseline's runs with the same seeds, one each; ``seed_difference``, ``seed_error``,
      ``seed_n``: their mean, its standard error and their number; ``left_out``: both differences leave out runs whose
      seeds only one side has.
    - ``floor``: the mean of its runs' highest floor, see `lit_distill.data.floor`.
    - ``further``: each of `FURTHER` that all of its runs have -> its mean and standard error.
    - ``lost``: of a setting with all training rows, what it loses with a tenth of them (or the smallest fraction): that
      fraction, the mean difference of runs with the same seeds, its standard error, and the number of seeds.
    - ``published_row``, ``published``: of the paper.
    - ``chance``, ``teachers``: of the dataset: accuracy without reading the input, and those of the teachers' labels.
    """
    keys: list[str]  # config keys in which runs of a dataset differ
    remarks: Mapping[str, list[str]]  # of each dataset
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
    with_metric = [run for run in runs if metric in run.metrics]
    if not with_metric:
        allowed = sorted({name for run in runs for name in run.metrics})
        raise UserError(f"metric: no run has {metric!r}; allowed are {', '.join(allowed) or 'none: no run was tested'}")
    skipped |= {run.source: f"no {metric} among its metrics" for run in runs if metric not in run.metrics}
    table, keys, remarks = runs_table(with_metric)
    facts = {}
    for dataset, own in table.groupby("dataset"):
        if not allow_different_tests:
            _check_rows(dataset, list(own.run), metric)
        facts[dataset] = _facts(dataset, list(own.run), metric)
    rows, repeated = [], dict[str, str]()
    for _, own in table.groupby([*IDENTITY, *keys], dropna=False, sort=False):
        row = own.drop(columns="run").iloc[0].to_dict()
        if _trained_on_different_rows(own.run):
            remarks[row["dataset"]].append(f"{row['name']}: trained on different rows with the same data seed")
        rows.append(row | facts[row["dataset"]] | _results(_without_repeated(own.run, repeated), metric))
    for row in rows:
        same = (other for other in rows if all(other[name] == row[name] for name in ("dataset", "train_fraction")))
        # numbers and fractions of rows stand in one order, where records tell the rows
        row["train_rows"] = max(run.record.train_rows for other in same for run in other["runs"])
        row["train_rows"] = row["train_rows"] or row["train_fraction"]
    rows.sort(key=_order)
    for row in rows:
        if row["floor"] is not None and row["mean"] < row["floor"]:
            trained = f" ({names.training_rows(row['train_fraction'])})" if row["train_fraction"] != 1 else ""
            who = f"{row['name']}, {row['student']}{trained}"
            remarks[row["dataset"]].append(f"{who}: {below_floor(row['mean'], row['floor'])}")
    for row in rows:
        row["lost"] = _lost(row, rows, metric)
    wanted = read_baseline(baseline, rows, keys)
    for row in rows:
        other, remark = find_baseline(row, rows, wanted)
        row |= dict.fromkeys([*_DIFFERENCES, "compared_with"]) | {
            "baseline": other,
            "left_out": False,
            "remark": remark,
        }
        if other is not None:
            row["compared_with"] = _in_full(rows[other], row)
            row |= _difference(row["runs"], rows[other]["runs"], metric, resamples, seed)
    baselines = {row["baseline"] for row in rows}
    settings = pd.DataFrame([row | {"is_baseline": i in baselines} for i, row in enumerate(rows)], dtype=object)
    return Comparison(metric, settings, keys, remarks, tuple(with_metric), repeated, skipped, resamples, seed)


def _check_rows(dataset: str, runs: Sequence[Run], metric: str) -> None:
    """Refuse runs whose rows of the metric differ in hash or number, where these are known.

    Those of test are the same for all runs; those of val for one data seed, as it may have split them off.
    """
    of_test = metric.startswith("test/")
    places: dict[str, list[str]] = {}
    hashes: dict[int, set[str]] = {}
    for run in runs:
        rows = run.test if of_test else run.record.fingerprints.get("val", "")
        hashes.setdefault(0 if of_test else run.record.data_seed, set()).update({rows} - {""})
        places.setdefault(rows or f"{run.record.test_rows:,} rows", []).append(run.source)
    counts = {run.record.test_rows for run in runs} - {0} if of_test else set()
    if len(counts) > 1 or any(len(found) > 1 for found in hashes.values()):
        shown = ", ".join(
            f"{sources[0]} ({place})" + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")
            for place, sources in places.items()
        )
        done = "tested" if of_test else "validated"
        raise UserError(
            f"runs: those of {dataset} were {done} on different rows: {shown}; their metrics cannot be compared, "
            "or give --allow_different_tests true"
        )


def _facts(dataset: str, runs: Sequence[Run], metric: str) -> dict[str, Any]:
    """What is known of a dataset: the levels of chance and of the teachers' labels."""
    chances = [run.record.chance for run in runs if run.record.chance is not None and _has_floors_of(run, metric)]
    teachers = {run.record.teacher_accuracy for run in runs} - {None} or {TEACHER.get(dataset)}
    return {
        "chance": max(chances, default=None),
        "teachers": sorted(level for level in teachers if level is not None),
    }


def _has_floors_of(run: Run, metric: str) -> bool:
    """Whether a run's chance and floors are of the metric's rows: those of test, or of val in a run without a test."""
    return metric in ACCURACIES and metric.startswith("test/" if run.record.metrics else "val/")


def _trained_on_different_rows(runs: Iterable[Run]) -> bool:
    """Whether the data changed between runs of one setting and data seed."""
    hashes = {(run.record.data_seed, run.record.fingerprints.get("train")) for run in runs}
    known = [data_seed for data_seed, train in hashes if train]
    return len(set(known)) < len(known)


def _without_repeated(runs: Iterable[Run], repeated: dict[str, str]) -> list[Run]:
    """One run per seed, preferably with predictions, and the latest; adds the others to ``repeated``."""
    by_seeds: dict[tuple[int, int], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.seeds, run.correct is not None, run.record.started, run.source)):
        by_seeds.setdefault(run.seeds, []).append(run)
    for *others, best in by_seeds.values():
        repeated |= {other.source: best.source for other in others}
    return [same[-1] for same in by_seeds.values()]


def _results(runs: Sequence[Run], metric: str) -> dict[str, Any]:
    """The mean over a setting's runs, and what was published for it."""
    values = [run.metrics[metric] for run in runs]
    floors = [max(run.record.floors.values()) for run in runs if run.record.floors and _has_floors_of(run, metric)]
    papers = {published_row(run) for run in runs} if metric == ACCURACY else set()
    row = papers.pop() if len(papers) == 1 else None
    return {
        "runs": runs,
        "values": values,
        "n": len(values),
        "mean": float(np.mean(values)),
        "error": standard_error(values),
        "floor": float(np.mean(floors)) if len(floors) == len(runs) else None,
        "further": {name: found for name in FURTHER if (found := _mean_of(runs, name)) is not None},
        "published_row": row,
        "published": ROWS[row][runs[0].record.dataset] if row else None,
    }


def _mean_of(runs: Sequence[Run], name: str) -> tuple[float, float | None] | None:
    """Mean and standard error of a metric or the training tokens; ``None`` unless all runs have it."""
    values = [run.record.train_tokens or None if name == TRAIN_TOKENS else run.metrics.get(name) for run in runs]
    known = [float(value) for value in values if value is not None]
    return (float(np.mean(known)), standard_error(known)) if len(known) == len(values) else None


def _lost(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], metric: str
) -> tuple[float, float, float | None, int] | None:
    """See ``lost`` in `Comparison`; ``None`` if there is no such fraction or no seed in common, or it is of a loss."""
    same = ("dataset", "label_source", "student", "name")
    fewer = {other["train_fraction"]: other for other in rows if all(other[name] == row[name] for name in same)}
    fraction = 0.1 if 0.1 in fewer else min(fewer, key=lambda part: fewer[part]["train_rows"])
    if row["train_fraction"] != 1 or fraction == 1 or not names.is_share(metric):
        return None
    values = {run.seeds: run.metrics[metric] for run in fewer[fraction]["runs"]}
    lost = [run.metrics[metric] - values[run.seeds] for run in row["runs"] if run.seeds in values]
    return (fraction, float(np.mean(lost)), standard_error(lost), len(lost)) if lost else None


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sort key: dataset, labels, student size, training rows, then standard finetuning first; numbers by their size."""
    first = [row[name] for name in ("dataset", "label_source", "parameters", "student", "train_rows")]
    words = re.sub(r"(?<=\d),(?=\d)", "", row["name"]).split()
    numbers = [float(word) for word in words if re.fullmatch(r"\d+(\.\d+)?", word)]
    return (*first, row["method"] != "Standard", row["method"], numbers, row["name"])


def read_baseline(text: str | None, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, str]:
    """Parse ``key=value,key=value``; standard finetuning by default. Raises a ``UserError`` for unknown keys."""
    if text is None:
        return {"method": "Standard"}
    allowed = {name: name for name in (*IDENTITY, *keys) if name != "parameters"}
    allowed |= {short: key for key, short in names.short_keys(keys).items()}
    wanted: dict[str, str] = {}
    for pair in text.replace(",", " ").split() or [text]:
        name, _, value = pair.partition("=")
        if not value:
            raise UserError(f"baseline: {pair!r} is not of the form key=value")
        if name not in allowed:
            raise UserError(f"baseline: no key {name!r}; allowed are {', '.join(sorted(allowed))}")
        try:
            # 0.50 is 0.5, and 1e-5 is 0.00001
            wanted[allowed[name]] = as_text(float(value))
        except ValueError:
            wanted[allowed[name]] = value
        if not any(_matches(row, wanted) for row in rows):
            found = {as_text(row[allowed[name]]) for row in rows if not pd.isna(row[allowed[name]])}
            said = ", ".join(f"{key}={value}" for key, value in wanted.items())
            raise UserError(f"baseline: no run has {said}; {name} is one of {', '.join(sorted(found))}")
    return wanted


def _matches(row: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    return all(not pd.isna(row[key]) and as_text(row[key]) == value for key, value in wanted.items())


def find_baseline(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, str]
) -> tuple[int | None, str]:
    """The place of the row with the wanted values that is most similar to ``row``; else ``None`` and why.

    A row that has the wanted values itself is compared with one that is given only some of its values, if there is one:
    standard finetuning with a further objective is compared with that without.
    """
    same = {"dataset", "student", "label_source", "train_fraction"} - set(wanted)
    found = {
        i: other
        for i, other in enumerate(rows)
        if _matches(other, wanted) and all(other[name] == row[name] for name in same)
    }
    own = row["given"].items()
    if is_wanted := _matches(row, wanted):
        found = {i: other for i, other in found.items() if other["given"].items() < own}
    # of those that share as many values, the one that is given the fewest
    alike = {i: (len(own & other["given"].items()), -len(other["given"])) for i, other in found.items()}
    best = [i for i, rank in alike.items() if rank == max(alike.values())]
    if len(best) == 1:
        return best[0], ""
    if is_wanted:
        return None, ""
    if not best:
        return None, "no baseline with its student, labels and fraction"
    return None, f"{len(best)} settings could be its baseline; name one with --baseline"


def _in_full(baseline: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """A baseline's name, with the labels, student and training rows if they are others than those of ``row``."""
    parts = [baseline["name"]]
    if baseline["label_source"] != row["label_source"]:
        parts.append(names.labels(baseline["label_source"]))
    if baseline["student"] != row["student"]:
        parts.append(baseline["student"])
    if baseline["train_fraction"] != row["train_fraction"]:
        parts.append(names.training_rows(baseline["train_fraction"]))
    return ", ".join(parts)


def _difference(
    runs: Sequence[Run], baseline: Sequence[Run], metric: str, resamples: int, seed: int
) -> dict[str, object]:
    """The differences to a baseline, over test rows and by seed."""
    both = {run.seeds for run in runs} & {run.seeds for run in baseline}
    # both differences use the same runs; without a shared seed, that over rows uses all
    own, other = ([run for run in some if not both or run.seeds in both] for some in (runs, baseline))
    remark = _why_unpaired([*own, *other], metric)
    left_out = len(own) < len(runs) or len(other) < len(baseline)
    found: dict[str, object] = {"remark": remark, "left_out": left_out}
    if both and len({run.test for run in (*own, *other)} - {""}) < 2:
        pairs = zip(own, other, strict=True)
        values = [one.metrics[metric] - base.metrics[metric] for one, base in pairs]
        found |= {"seed_differences": values, "seed_difference": float(np.mean(values))}
        found |= {"seed_error": standard_error(values), "seed_n": len(values)}
    if not remark:
        answers = (_answers(some, metric) for some in (own, other))
        found |= paired_bootstrap(*answers, resamples=resamples, seed=seed)._asdict()
    return found


def _why_unpaired(runs: Sequence[Run], metric: str) -> str:
    """Why there is no difference over test rows; empty if there is one."""
    if metric not in (ACCURACY, VOTE):
        return f"predictions say nothing about {metric}"
    if any(run.outcomes(metric) is None for run in runs):
        return "without predictions"
    tests = {run.test for run in runs}
    return "tested on different or unknown rows" if len(tests) > 1 or "" in tests else ""


def _answers(runs: Sequence[Run], metric: str) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """``(runs, labelled test rows)``: 1 where right."""
    return np.stack([found[~np.isnan(found)] for run in runs if (found := run.outcomes(metric)) is not None])
