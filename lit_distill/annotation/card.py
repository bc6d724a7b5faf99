"""The dataset card of a folder of samples."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from docstring_parser import parse_from_object
from huggingface_hub import DatasetCard, DatasetCardData

from lit_distill import __version__
from lit_distill.annotation.record import KINDS, Annotation

MARK = "<!-- written by lit_distill annotate, again at each start; take this line out to keep your own words -->"

_JOB = ("dataset", "split", "rows", "teacher", "num_samples", "until_agrees", "prompt", "ended", "stopped")
_COUNTS = ("samples", "errors", "parsed", "agrees with gold", "rationale contains the label")


def write_card(jobs: Sequence[Mapping[str, Any]], samples: Iterable[Annotation], parquet: str, out: str) -> str:
    """The text of the card.

    Args:
        jobs: from the folder's metadata.
        samples: all of them.
        parquet: name of the Parquet file.
        out: name of the folder.
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    for one in samples:
        values = (True, one.text is None, one.parsed, one.agrees, one.contains_label)
        group = counts.setdefault((one.split or "any", one.teacher or "unknown"), Counter())
        group.update({name: bool(value) for name, value in zip(_COUNTS, values, strict=True)})
    datasets = ", ".join(dict.fromkeys(str(job.get("dataset")) for job in jobs))
    teachers = ", ".join(dict.fromkeys(teacher for _, teacher in counts)) or "no teacher"
    splits = {split for split, _ in counts}
    # several splits are told apart by their column
    split = splits.pop() if len(splits) == 1 else "annotations"
    data = DatasetCardData(
        pretty_name=f"Rationales for {datasets}",
        license="other",
        license_name="source-data-and-teacher-terms",
        tags=["rationales", "synthetic", "distillation", "lit_distill"],
        configs=[{"config_name": "default", "data_files": [{"split": split, "path": parquet}]}],
    )
    described = {one.arg_name: one.description for one in parse_from_object(Annotation).params}
    body = f"""
{MARK}

# Rationales of {teachers} for {datasets}

Rationales and labels that language models gave for each row, sample by sample, for
distilling step-by-step ([2305.02301](https://arxiv.org/abs/2305.02301)). Made by lit_distill {__version__}. The rows'
inputs and gold labels are not included: a sample belongs to the row with its `id`.

```bash
lit-distill fit --config CONFIG --data.rationales {out}
```

## Teachers and settings

{_table(_JOB, [[job.get(name) for name in _JOB] for job in jobs])}

The prompts are in `prompts/`, by the hash above; teachers' settings and sampling are in `metadata.json`.

## Counts

{_table(("split", "teacher", *_COUNTS), [[*key, *(f"{n[name]:,}" for name in _COUNTS)] for key, n in counts.items()])}

## Columns

{_table(("column", "type", "meaning"), [[f"`{name}`", KINDS[name].__name__, described[name]] for name in KINDS])}

## Licence

The licence of the source data and the terms of the teacher and its provider apply to these texts; this card grants
no other. Language models err: a rationale may be wrong where its label is right.
"""
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n{body}"))


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = [[" ".join(str("" if cell is None else cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *cells))
