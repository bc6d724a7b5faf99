"""Whether runs were trained and tested on the same rows: those that were not are not taken together."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lit_distill.comparison.runs import Run
from lit_distill.comparison.settings import Setting, as_text
from lit_distill.files import flatten

DATA_DIR = "data.init_args.data_dir"
"""A key that tells settings apart only where the rows below it differ."""

TRAINING = "training_rows"
"""What tells settings apart where nothing else does."""

SPLITTING = (DATA_DIR, TRAINING)
"""The keys of `split_by_training`."""


def name_tests(runs: Sequence[Run]) -> list[Run]:
    """Runs of one dataset with `Run.tested`: equal where they may have been tested on the same rows.

    A hash may be of more rows than were tested, and may not be known: the number of rows counts too, and the ids where
    there are predictions. What is not known contradicts nothing.
    """
    prints: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        prints[run.record.fingerprints.get("test", "")].append(run)
    named: dict[str, str] = {}
    for fingerprint, group in prints.items():
        if fingerprint:
            named |= _told_apart(fingerprint, group)
    # only runs without a hash are left: those that fit what is known may be of it, those that do not cannot be
    known = [run for run in runs if named.get(run.source)]
    left = prints.get("", [])
    for run in left:
        fitting = {named[other.source] for other in known if _may_be_same(run, other)}
        by_ids = {named[other.source] for other in known if run.ids and run.ids == other.ids}
        if len(by_ids) == 1:
            named[run.source] = by_ids.pop()
        elif fitting:
            named[run.source] = ""
    own = [run for run in left if run.source not in named]
    if known or any(not _may_be_same(one, other) for one in own for other in own):
        named |= {source: name for source, name in _told_apart("", own).items()}
    return [replace(run, tested=named.get(run.source, "")) for run in runs]


def _may_be_same(one: Run, other: Run) -> bool:
    counts = {one.record.test_rows, other.record.test_rows} - {0}
    return len(counts) < 2 and len({one.ids, other.ids} - {""}) < 2


def _told_apart(fingerprint: str, runs: Sequence[Run]) -> dict[str, str]:
    """Source -> name, of runs with one hash: by as much more as tells them apart."""
    by_count: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        by_count[run.record.test_rows].append(run)
    counted = [count for count in by_count if count]
    names: dict[str, str] = {}
    for count, group in by_count.items():
        parts = [fingerprint] if fingerprint else []
        if len(counted) > 1 or not fingerprint:
            parts.append(f"{count:,} rows" if count else "")
        ids = {run.ids for run in group if run.ids}
        for run in group:
            more = [f"ids {run.ids[:8] or 'unknown'}"] if len(ids) > 1 else []
            names[run.source] = ", ".join(part for part in (*parts, *more) if part)
    return names


def split_by_training(setting: Setting, runs: Sequence[Run]) -> Iterator[tuple[Setting, list[Run]]]:
    """The runs of a setting, in parts of which each may have been trained on one data set.

    Runs of one data seed whose training rows differ are not of one data set, nor are those of which one has a tenth
    more rows. They are told apart by the folders of their data, and where that does not do, by the rows themselves.
    """
    if not _differ(runs):
        yield setting, list(runs)
        return
    folders: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        folders[as_text(flatten(run.record.config).get(DATA_DIR))].append(run)
    # a folder of its own for each run tells nothing
    if 1 < len(folders) < len(runs) and not any(_differ(group) for group in folders.values()):
        for folder, group in sorted(folders.items()):
            yield setting.having(DATA_DIR, folder), group
        return
    hashes, sizes = _hashes(runs), _sizes_differ(runs)
    parts: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        told = [f"{run.record.train_rows or 'unknown'}"] if sizes else []
        if len(hashes[run.record.data_seed]) > 1:
            told.append(run.record.fingerprints.get("train", "unknown"))
        parts[" ".join(told)].append(run)
    for part, group in sorted(parts.items()):
        yield (setting.having(TRAINING, part) if part else setting), group


def _differ(runs: Sequence[Run]) -> bool:
    return _sizes_differ(runs) or any(len(found) > 1 for found in _hashes(runs).values())


def _hashes(runs: Sequence[Run]) -> dict[int, set[str]]:
    """Data seed -> hashes of the rows that were trained on."""
    found: dict[int, set[str]] = defaultdict(set)
    for run in runs:
        hashed = run.record.fingerprints.get("train")
        found[run.record.data_seed] |= {hashed} if hashed else set()
    return found


def _sizes_differ(runs: Sequence[Run]) -> bool:
    """By more than rows that lack a label or a rationale could make."""
    counts = [run.record.train_rows for run in runs if run.record.train_rows]
    return bool(counts) and max(counts) > 1.1 * min(counts) + 5
