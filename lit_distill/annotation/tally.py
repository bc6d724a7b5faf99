"""Progress of an annotation job: counts, a bar, and a summary."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from lit_distill.annotation.record import Annotation

LINE_SECONDS = 30.0
"""Seconds between lines where no bar can be drawn."""


class Tally:
    """Counts of a job's samples, with those of earlier runs."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.rows: set[str] = set()
        """Ids of the rows with an answer."""
        self.cost: float | None = None

    def add(self, sample: Annotation) -> None:
        """Count a sample."""
        self.counts["samples"] += 1
        for name in ("input_tokens", "output_tokens"):
            if (tokens := getattr(sample, name)) is not None:
                self.counts[name] += tokens
        if sample.cost is not None:
            self.cost = (self.cost or 0.0) + sample.cost
        if sample.text is None:
            self.errors[sample.error or "unknown"] += 1
            return
        self.rows.add(sample.id)
        counted = sample.input_tokens is not None and sample.output_tokens is not None
        self.counts.update(
            answers=1,
            parsed=bool(sample.parsed),
            judged=sample.agrees is not None,
            agree=bool(sample.agrees),
            contains_label=bool(sample.contains_label),
            cut=sample.finish == "length",
            uncounted=not counted,
        )

    def share(self, part: str, whole: str) -> float | None:
        """A count as a fraction of another; ``None`` of 0."""
        return self.counts[part] / self.counts[whole] if self.counts[whole] else None

    def line(self) -> str:
        """The counts as text."""
        tokens = self.counts["input_tokens"] + self.counts["output_tokens"]
        parts = [f"{tqdm.format_sizeof(tokens)} tokens"]
        if self.cost is not None:
            parts.append(f"${self.cost:.2f}")
        for name, part, whole in (("parsed", "parsed", "answers"), ("agree", "agree", "judged")):
            if (share := self.share(part, whole)) is not None:
                parts.append(f"{name} {share:.0%}")
        if self.errors:
            parts.append(f"errors {self.errors.total()}")
        return ", ".join(parts)

    def summary(self) -> dict[str, Any]:
        """The counts by name, for the command."""
        counts, known = self.counts, self.counts.keys()
        return {
            "rows answered": len(self.rows),
            "answers": counts["answers"],
            "errors": self.errors.total(),
            "most frequent errors": most_common(self.errors),
            "parsed": self.share("parsed", "answers"),
            "agree with gold": self.share("agree", "judged"),
            "rationale contains the label": self.share("contains_label", "parsed"),
            "cut at max_new_tokens": counts["cut"],
            "prompt tokens": counts["input_tokens"] if "input_tokens" in known else None,
            "answer tokens": counts["output_tokens"] if "output_tokens" in known else None,
            "answers without their tokens": counts["uncounted"] or None,
            "cost": None if self.cost is None else round(self.cost, 6),
        }


@contextmanager
def progress(tally: Tally, name: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, or lines without a terminal; yields the function that advances it."""
    shown = time.monotonic()
    done = min(tally.counts["samples"], total)
    with tqdm(total=total, initial=done, desc=name, disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:

        def update() -> None:
            nonlocal shown
            bar.set_postfix_str(tally.line(), refresh=False)
            bar.update()
            if bar.disable and time.monotonic() - shown > LINE_SECONDS:
                shown = time.monotonic()
                print(f"{name}: {tally.counts['samples']} of {total}, {tally.line()}", file=sys.stderr, flush=True)

        yield update


def most_common(reasons: Counter[str]) -> str | None:
    """The most frequent reasons with their counts."""
    return "; ".join(f"{count:,} x {reason[:200]}" for reason, count in reasons.most_common(3)) or None
