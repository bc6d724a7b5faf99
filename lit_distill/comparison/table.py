"""The table of runs: one row a run, with all that tells their settings apart."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import pandas as pd  # type: ignore[import-untyped]

from lit_distill.comparison import names
from lit_distill.comparison.runs import NOT_TESTED, OURS, Run
from lit_distill.comparison.settings import FRACTION, LABELS, PAIRING, STUDENT, VARIANT, as_text, config_text

IDENTITY = ["dataset", "label_source", "student", "parameters", "train_fraction", "method", "rationales"]
"""Columns that tell settings apart, besides the config keys in which a dataset's runs differ."""

_UNDER_ANOTHER_NAME = {"model.class_path", "data.class_path", STUDENT, LABELS, FRACTION, PAIRING}
"""Config keys that `IDENTITY` has under a shorter name."""


def runs_table(runs: Sequence[Run]) -> tuple[pd.DataFrame, list[str], dict[str, list[str]]]:
    """The runs as a table, one dataset after another.

    Returns:
        The table: the columns of `IDENTITY`; those of the next item, missing where they do not apply; ``name``, the
        setting in words without dataset, labels, student and fraction; ``given``, the keys behind the name that have
        a value, with it; ``usual``, what holds for all settings of a dataset whose name says nothing else; and
        ``run``. Then the other config keys in which the runs of a dataset differ; and dataset -> remarks on differences
        that no name shows.
    """
    table = pd.DataFrame([{name: getattr(run.record, name) for name in IDENTITY} for run in runs], dtype=object)
    table["run"] = runs
    table["path"] = [run.student_path for run in runs]
    table["module"] = [run.module_path for run in runs]
    table["test"] = [run.test for run in runs]
    # W&B does not know the size of a student
    sizes = table.groupby("path").parameters.transform("max")
    table["parameters"] = table.parameters.where(table.parameters > 0, sizes)
    for _, same_name in table.groupby("student"):
        if same_name.path.nunique() > 1:
            table.loc[same_name.index, "student"] = same_name.path.map(names.short_keys(set(same_name.path), "/"))
    for method, same_name in table.groupby("method"):
        if same_name.module.nunique() > 1:
            own = same_name[same_name.module != OURS]
            # with the bare name among them, none is shortened to it
            table.loc[own.index, "method"] = own.module.map(names.short_keys({method, *own.module}))
    parts, keys, remarks = [], set(), {}
    for dataset, own in table.groupby("dataset"):
        differing = _differing(own)
        words = {key: text.replace("_", " ") for key, text in names.short_keys(differing).items()}
        known, remarks[dataset] = _distinguishing(own[IDENTITY], differing, words)
        in_words, usual = _in_words(known, words)
        if (own.test == "").any():
            remarks[dataset].append("It is unknown on which rows some runs were tested")
        given = [
            {key: value for key, value in row.items() if not pd.isna(value) and value not in ("null", "false")}
            for row in known.drop(columns=[*{*IDENTITY} - {"method", "rationales"}]).to_dict("records")
        ]
        parts.append(pd.concat([own.assign(name=in_words, given=given, usual=usual), differing], axis=1))
        keys |= set(differing)
    return pd.concat(parts).drop(columns=["path", "module", "test"]), sorted(keys), remarks


def _differing(table: pd.DataFrame) -> pd.DataFrame:
    """The config keys in which the runs of one dataset differ, as columns of text.

    A key missing from some configs was added in a later version and is treated as unset. A model argument that no run
    of a method has stays missing for that method.
    """
    configs = pd.DataFrame([config_text(run.record.config) for run in table.run], index=table.index, dtype=object)
    known = configs.notna()
    applies = known.groupby(table.method).transform("any")
    applies.loc[:, [key for key in configs if not key.startswith("model.init_args.")]] = True
    found = {key: set(configs[key]) for key in configs}
    unset = {key: "false" if "false" in found[key] and "null" not in found[key] else "null" for key in configs}
    configs = configs.where(known | ~applies, pd.Series(unset, dtype=object), axis=1)
    keys = sorted(key for key in configs if key not in _UNDER_ANOTHER_NAME and configs[key].nunique() > 1)
    if len(set(table.test) - {"", NOT_TESTED}) > 1:
        return configs[keys].assign(**{"test rows": table.test.replace("", "unknown")})
    return configs[keys]


def _distinguishing(
    identity: pd.DataFrame, differing: pd.DataFrame, words: Mapping[str, str]
) -> tuple[pd.DataFrame, list[str]]:
    """The columns that tell a dataset's settings apart, and remarks on the keys that follow from these."""
    known, remarks = identity.copy(), []
    # a variant is the name of what else differs
    if VARIANT in differing:
        known[VARIANT] = differing[VARIANT]
        of_variant = [key for key in differing if _follows(differing[key], known[["method", VARIANT]])]
        differing = differing.drop(columns=of_variant)
    for key in differing:
        if not _follows(differing[key], known):
            known[key] = differing[key]
        # a prefix is part of a method, and a run without a teacher has none of its settings
        elif not (key.endswith("prefix") or _is_of_teachers(key, differing[key])):
            remarks.append(_remark(key, differing[key], known, words))
    return known, remarks


def _in_words(known: pd.DataFrame, words: Mapping[str, str]) -> tuple[list[str], str]:
    """Each run's setting in words, and what holds where they say nothing else."""
    keys = known.columns.difference(IDENTITY)
    values = {key: names.short_values(known[key].dropna().unique()) for key in keys}
    settings = known.drop_duplicates()
    usual = {key: value for key in keys if (value := _usual(settings[key], values[key]))}
    found = []
    for row in known.to_dict("records"):
        parts = [names.method(row["method"], row["label_source"])]
        if row["rationales"] not in (None, "own"):
            parts.append(f"{row['rationales']} rationales")
        for key in keys:
            text = values[key].get(row[key], "")
            if text and row[key] != usual.get(key):
                named_so = text.replace("_", " ") if key == VARIANT else f"{words[key]} {text}"
                parts.append(words[key] if text == "true" else named_so)
        found.append(", ".join(parts))
    same = ", ".join(f"{words[key]} {values[key][value]}" for key, value in usual.items())
    return found, same and f"where nothing else is named: {same}"


def _usual(values: pd.Series, texts: Mapping[str, str]) -> str | None:
    """The value of at least three quarters of four or more settings, unless it would be taken for an unset one."""
    shares = values.value_counts(normalize=True)
    if values.count() < 4 or shares.iloc[0] < 0.75 or any(not texts[value] for value in shares.index):
        return None
    return str(shares.index[0])


def _follows(values: pd.Series, known: pd.DataFrame) -> bool:
    """Whether rows that are equal in all known columns have equal values."""
    return bool(values.groupby([known[column] for column in known], dropna=False).nunique().max() <= 1)


def _is_of_teachers(key: str, values: pd.Series) -> bool:
    """Whether a key is a setting of teachers that is the same for all that are there."""
    return key.startswith("model.init_args.teachers.") and len(set(values.dropna()) - {"null"}) <= 1


def _remark(key: str, values: pd.Series, known: pd.DataFrame, words: Mapping[str, str]) -> str:
    columns = (list(some) for size in (1, 2) for some in combinations(known, size))
    by = next((some for some in columns if _follows(values, known[some])), [])
    if not by:
        return f"{words[key]} differs between settings"
    texts = known[by].map(lambda value: "" if pd.isna(value) else as_text(value))
    short = {column: names.short_values(texts[column].unique()) for column in by}
    pairs = pd.concat([texts, values.rename("")], axis=1).dropna().drop_duplicates().sort_values(by)
    shown = []
    for *of, value in pairs.itertuples(index=False, name=None):
        given = " ".join(filter(None, (short[column][text] for column, text in zip(by, of, strict=True))))
        shown.append(f"{given or of[0]}: {value}")
    named = " and ".join(words.get(column, column.replace("_", " ")) for column in by)
    return f"{words[key]} differs with {named} ({', '.join(shown)})"
