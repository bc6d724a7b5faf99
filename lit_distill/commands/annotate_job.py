"""One job of ``annotate``: teachers are asked about the rows of a split; their answers go to a folder."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lit_distill import __version__
from lit_distill.annotation.plan import Plan
from lit_distill.annotation.prompts import Reads, load_prompt
from lit_distill.annotation.record import Annotation, input_hash, unread
from lit_distill.annotation.store import FILE, PARQUET, AnnotationStore
from lit_distill.data.base import RationaleDataModule
from lit_distill.data.styles import read_answer
from lit_distill.files import write_text
from lit_distill.progress import ticker
from lit_distill.questions import Reply
from lit_distill.tasks import Row
from lit_distill.teachers.base import Teacher, TeacherError
from lit_distill.teachers.runner import Budget, RequestRunner, queued_interrupts


@dataclass(frozen=True)
class Ask:
    """What one teacher is asked in one style."""

    teacher: Teacher
    plan: Plan
    rows: Sequence[Row]  # those that have what the prompt names


class Job:
    """Questions about rows, asked of one teacher after the other; the data module reads and judges the answers."""

    def __init__(self, datamodule: RationaleDataModule, asks: Sequence[Ask], rows: Sequence[Row]) -> None:
        self.datamodule, self.asks, self.rows = datamodule, asks, rows
        self.split = asks[0].plan.split
        self.places = {row.id: place for place, row in enumerate(rows)}
        self.hashes = {row.id: input_hash(row) for row in rows}
        self.faults: Counter[str] = Counter()  # of the user's own comparison of labels
        of_ids = {id(ask.rows): {row.id: row for row in ask.rows} for ask in asks}
        self._asks = {tuple(ask.plan.columns.values()): (ask, of_ids[id(ask.rows)]) for ask in asks}
        self._reads: dict[str, Reads] = {}  # prompt of earlier jobs -> how its answers are read

    def run(self, folder: Path, concurrency: int | None, budget: Budget, *, ask_failed: bool) -> dict[str, Any]:
        """Ask all questions that have no answer in the folder; return a summary."""
        started, began = now(), time.monotonic()
        counts: Counter[str] = Counter()
        busy: Counter[str] = Counter()
        stopped: str | None = None
        self._reads = {path.stem: load_prompt(path).reads for path in (folder / "prompts").glob("*.yaml")}

        def count(sample: Annotation) -> None:
            if (asked := self.asked(sample)) is not None:
                counts.update(samples=1, errors=sample.text is None, parsed=bool(sample.parsed))
                asked[0].teacher.has_answered |= sample.text is not None
            if (budget.max_tokens, budget.max_cost) != (None, None):
                budget.use(*self.used(sample))

        def on_result(sample: Annotation, result: Reply | TeacherError) -> None:
            if isinstance(result, TeacherError):
                sample = replace(sample, error=" ".join(str(result).split()) or type(result).__name__)
            else:
                sample = self.read(self.answered(sample, result))
            store.append(sample)
            advance(1, f"{counts['parsed']:,} parsed, {counts['errors']:,} errors")

        with (
            AnnotationStore(folder, count, ask_failed=ask_failed, read=self.read) as store,
            queued_interrupts() as interrupts,
        ):
            for ask in self.asks:
                self.note(store, ask, started)
            total = sum(len(ask.rows) * ask.plan.num_samples for ask in self.asks)
            try:
                with ticker("annotate", total, min(counts["samples"], total)) as advance:
                    for teacher, group in groupby(self.asks, lambda ask: ask.teacher):
                        asks = list(group)
                        runner = RequestRunner(teacher, concurrency or teacher.concurrency, on_result, budget)
                        try:
                            runner.run(
                                (ask.plan.questions(row, store.answered) for ask in asks for row in ask.rows),
                                interrupts,
                            )
                        finally:
                            busy, stopped = busy + runner.busy, runner.stopped
                        if stopped is not None:
                            break
            finally:
                for ask in self.asks:
                    self.note(store, ask, started, stopped)
                store.finish(self.place, self.agree)
                store.write_card()
        return self.summary(folder) | {
            "not answered now": busy.total(),
            "why not": most_common(busy),
            "labels not compared": most_common(self.faults),
            "stopped": stopped,
            "seconds": round(time.monotonic() - began, 1),
            "file": str(folder / FILE),
        }

    def place(self, sample: Annotation) -> int | None:
        """The position of a sample's row; ``None`` for an unknown row or another input."""
        known = sample.split == self.split and sample.input in (None, self.hashes.get(sample.id))
        return self.places.get(sample.id) if known else None

    def asked(self, sample: Annotation) -> tuple[Ask, Row] | None:
        """What a sample answers in this job, and the row; ``None`` for another job's questions."""
        ask, rows = self._asks.get(tuple(getattr(sample, name) for name in self.asks[0].plan.columns), (None, {}))
        row = rows.get(sample.id)
        return None if ask is None or row is None or self.place(sample) is None else (ask, row)

    def answered(self, sample: Annotation, reply: Reply) -> Annotation:
        """A sample with the teacher's answer."""
        asked = self.asked(sample)
        read, written, logprob = reply.input_tokens, reply.output_tokens, reply.logprob
        # a file with such numbers could not be read again
        read, written = (None if number is None or not 0 <= number < 1 << 63 else number for number in (read, written))
        logprob = None if logprob is None or not math.isfinite(logprob) else logprob
        cost = None if asked is None or read is written is None else asked[0].teacher.cost(read or 0, written or 0)
        sample = replace(sample, text=reply.text, finish=reply.finish, logprob=logprob, cost=cost)
        return replace(sample, input_tokens=read, output_tokens=written)

    def read(self, sample: Annotation) -> Annotation:
        """Fill in the columns that follow from a sample's text; its error says why the user's parser fails."""
        place, asked = self.place(sample), self.asked(sample)
        if place is None:
            return sample
        reads = self._reads.get(sample.prompt or "", "answer") if asked is None else asked[0].plan.template.reads
        try:
            return read_answer(sample, self.rows[place], reads, self.datamodule)
        except Exception as error:  # noqa: BLE001 - a fault of a user's own code loses no answer
            return unread(sample, _words(error))

    def agree(self, label: str, other: str) -> bool:
        """Whether two labels are the same answer; not if the user's own comparison fails."""
        try:
            return self.datamodule.teacher_agrees(label, other)
        except Exception as error:  # noqa: BLE001 - a fault of a user's own code loses no answer
            self.faults[_words(error)] += 1
            return False

    def used(self, sample: Annotation) -> tuple[int, float]:
        """Tokens and US dollars of an answer; estimated if the teacher does not count."""
        read, written = sample.input_tokens, sample.output_tokens
        if sample.text is None or (read is not None and written is not None):
            return (read or 0) + (written or 0), sample.cost or 0.0
        asked = self.asked(sample)
        teacher = self.asks[0].teacher if asked is None else asked[0].teacher
        if read is None:
            read = 0 if asked is None else teacher.count_tokens(asked[0].plan.prompt(asked[1]))
        if written is None:
            written = len(sample.text) // 4 + 1
        return read + written, teacher.cost(read, written) or 0.0

    def note(self, store: AnnotationStore, ask: Ask, started: str, stopped: str | None = None) -> None:
        """Write what is asked, and how, to the metadata, and the prompt beside it."""
        plan = ask.plan
        about = {"dataset": self.datamodule.name, "rows": len(ask.rows), "demonstrations": plan.selection or "fixed"}
        names = ("teacher_settings", "structured", "layout", "num_samples", "until_agrees")
        settings = {name: getattr(plan, name) for name in names} | {"sampling": asdict(plan.sampling)}
        times = {"started": started, "ended": now(), "stopped": stopped, "version": __version__}
        store.note(about | plan.columns | settings | times)
        prompt = store.folder / "prompts" / f"{plan.columns['prompt']}.yaml"
        prompt.parent.mkdir(exist_ok=True)
        if not prompt.exists():
            content = plan.template.model_dump(mode="json", exclude_none=True)
            write_text(prompt, yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=110))

    def summary(self, folder: Path) -> dict[str, Any]:
        """Counts of the samples of this job's questions, whenever they were asked; ``styles`` has those of each ask."""
        # slow to import
        import pandas as pd  # type: ignore[import-untyped]

        own = self.asks[0].plan.columns
        read = ["id", "input", "error", "label", "majority_label", "parsed", "agrees", "contains_label", "distinct"]
        read += ["finish", "input_tokens", "output_tokens", "cost", *own]
        samples = pd.read_parquet(folder / PARQUET, columns=read, dtype_backend="numpy_nullable")
        samples = samples[samples.input == samples.id.map(self.hashes)]
        keys = pd.MultiIndex.from_frame(samples[list(own)])
        parts = {id(ask): samples[keys == tuple(ask.plan.columns.values())] for ask in self.asks}
        of_all = {"rows": len(self.rows)} | counted(pd.concat(parts.values()))
        styles = [{"teacher": ask.plan.teacher, "kind": ask.plan.kind, **counted(parts[id(ask)])} for ask in self.asks]
        return of_all | {"styles": styles}


def counted(samples: Any) -> dict[str, Any]:
    """What there is to say of a data frame of samples, in plain values, which JSON takes."""
    import pandas as pd

    # a program that does not run is an answer
    answers = samples[samples.error.isna() | samples.parsed.notna()]
    judged = answers[answers.agrees.notna()]
    right = judged[judged.agrees]
    majority = right[right.label == right.majority_label]
    uncounted = answers.input_tokens.isna() | answers.output_tokens.isna()
    found = {
        "rows answered": answers.id.nunique(),
        "answers": len(answers),
        "errors": len(samples) - len(answers),
        "programs that do not run": answers.error.notna().sum() or None,
        "most frequent errors": most_common(Counter(samples.error.dropna())),
        "parsed": answers.parsed.fillna(False).mean(),
        "agree with gold": judged.agrees.mean(),
        "distinct": answers.distinct.mean(),
        "agree and distinct": right.distinct.sum() if len(judged) else None,
        "rationale contains the label": answers.contains_label.mean(),
        "cut at max_new_tokens": answers.finish.eq("length").sum(),
        "prompt tokens": answers.input_tokens.sum(min_count=1),
        "answer tokens": answers.output_tokens.sum(min_count=1),
        "answers without their tokens": uncounted.sum() or None,
        "cost": answers.cost.sum(min_count=1),
        "majority agrees": majority.id.nunique() / judged.id.nunique() if len(judged) else None,
    }
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in found.items()}
    return {name: None if pd.isna(value) else value for name, value in plain.items()}


def now() -> str:
    """The time, as in metadata."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def most_common(reasons: Counter[str]) -> str | None:
    """The most frequent reasons with their counts."""
    return "; ".join(f"{count:,} x {reason[:200]}" for reason, count in reasons.most_common(3)) or None
