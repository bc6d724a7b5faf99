"""The card of a folder of samples, as the Hugging Face hub shows it and `datasets` reads it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from docstring_parser import parse_from_object
from huggingface_hub import DatasetCard, DatasetCardData

from lit_distill import __version__
from lit_distill.annotation.record import KINDS, Annotation

MARK = "<!-- written by lit_distill annotate, again at each start; take this line out to keep your own words -->"

_COUNTS = ("samples", "errors", "parsed", "agrees with gold", "rationale holds the label")


def write_card(jobs: Sequence[Mapping[str, Any]], samples: Iterable[Annotation], parquet: str, out: str) -> str:
    """The text of the card.

    Args:
        jobs: of the folder's metadata.
        samples: all of them.
        parquet: name of the file that `datasets` reads.
        out: name of the folder.
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    for one in samples:
        found = counts.setdefault((one.split or "any", one.teacher or "not told"), Counter())
        found.update(samples=1, errors=one.text is None, parsed=bool(one.parsed))
        found.update({"agrees with gold": bool(one.agrees), "rationale holds the label": bool(one.contains_label)})
    datasets = list(dict.fromkeys(str(job.get("dataset")) for job in jobs))
    splits = {split for split, _ in counts}
    data = DatasetCardData(
        pretty_name=f"Rationales for {', '.join(datasets)}",
        license="other",
        license_name="source-data-and-teacher-terms",
        tags=["rationales", "synthetic", "distillation", "lit_distill"],
        # one split is named as the hub names it, several are told apart by their column
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": splits.pop() if len(splits) == 1 else "annotations", "path": parquet}],
            }
        ],
    )
    groups = [[*group, *(f"{found[name]:,}" for name in _COUNTS)] for group, found in counts.items()]
    asked = ("dataset", "split", "rows", "teacher", "num_samples", "until_agrees", "prompt", "ended", "stopped")
    described = {one.arg_name: one.description for one in parse_from_object(Annotation).params}
    body = f"""
{MARK}

# Rationales of {", ".join(dict.fromkeys(teacher for _, teacher in counts)) or "no teacher"} for {", ".join(datasets)}

What language models said when they were asked for a rationale and a label of each row, sample by sample, for
distilling step-by-step ([2305.02301](https://arxiv.org/abs/2305.02301)). Made by lit_distill {__version__}. The rows'
inputs and gold labels are not here: a sample belongs to the row with its `id`.

```bash
lit-distill fit --config CONFIG --data.rationales {out}
```

## What was asked of whom

{_table(asked, [[job.get(name) for name in asked] for job in jobs])}

The prompts are in `prompts/`, by the hash above; teachers' settings and sampling are in `metadata.json`.

## Counts

{_table(("split", "teacher", *_COUNTS), groups)}

## Columns

{_table(("column", "type", "meaning"), [[f"`{name}`", KINDS[name].__name__, described[name]] for name in KINDS])}

## Licence

The licence of the source data and the terms of the teacher and of whoever serves it hold for these texts; this card
grants no other. Language models err: a rationale may be wrong where its label is right.
"""
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n{body}"))


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join('' if cell is None else _cell(cell) for cell in row)} |" for row in cells)


def _cell(value: Any) -> str:  # noqa: ANN401 - plain values
    return " ".join(str(value).split()).replace("|", "\\|")
