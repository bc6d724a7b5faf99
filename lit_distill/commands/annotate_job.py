"""One job of ``annotate``: a teacher is asked about the rows of a split; its answers go to a folder."""

import math
import time
from collections import Counter
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lit_distill import __version__
from lit_distill.annotation.plan import Plan
from lit_distill.annotation.record import Annotation, input_hash, read_text, unread
from lit_distill.annotation.store import FILE, PARQUET, AnnotationStore
from lit_distill.data.base import RationaleDataModule
from lit_distill.files import write_text
from lit_distill.progress import ticker
from lit_distill.questions import Reply
from lit_distill.tasks import Row
from lit_distill.teachers.base import Teacher, TeacherError
from lit_distill.teachers.runner import Budget, RequestRunner, queued_interrupts


class Job:
    """The plan's questions about rows, asked of a teacher; the data module reads and judges the answers."""

    def __init__(self, datamodule: RationaleDataModule, teacher: Teacher, plan: Plan, rows: list[Row]) -> None:
        self.datamodule, self.teacher, self.plan, self.rows = datamodule, teacher, plan, rows
        self.places = {row.id: place for place, row in enumerate(rows)}
        self.hashes = {row.id: input_hash(row) for row in rows}
        self.faults: Counter[str] = Counter()  # of the user's own comparison of labels

    def run(self, folder: Path, concurrency: int, budget: Budget, *, ask_failed: bool) -> dict[str, Any]:
        """Ask all questions that have no answer in the folder; return a summary."""
        started, began = now(), time.monotonic()
        counts: Counter[str] = Counter()

        def count(sample: Annotation) -> None:
            if self.is_asked(sample):
                counts.update(samples=1, errors=sample.text is None, parsed=bool(sample.parsed))
                self.teacher.has_answered |= sample.text is not None
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
            self.note(store, started)
            runner = RequestRunner(self.teacher, concurrency, on_result, budget)
            total = len(self.rows) * self.plan.num_samples
            try:
                with ticker(self.teacher.name, total, min(counts["samples"], total)) as advance:
                    runner.run((self.plan.questions(row, store.answered) for row in self.rows), interrupts)
            finally:
                self.note(store, started, runner.stopped)
                store.finish(self.place, self.agree)
                store.write_card()
        return self.summary(folder) | {
            "not answered now": runner.busy.total(),
            "why not": most_common(runner.busy),
            "labels not compared": most_common(self.faults),
            "stopped": runner.stopped,
            "seconds": round(time.monotonic() - began, 1),
            "file": str(folder / FILE),
        }

    def place(self, sample: Annotation) -> int | None:
        """The position of a sample's row; ``None`` for an unknown row or another input."""
        known = sample.split == self.plan.split and sample.input in (None, self.hashes.get(sample.id))
        return self.places.get(sample.id) if known else None

    def is_asked(self, sample: Annotation) -> bool:
        """Whether a sample belongs to this job's questions."""
        own = self.plan.columns.items()
        return self.place(sample) is not None and all(getattr(sample, name) == value for name, value in own)

    def answered(self, sample: Annotation, reply: Reply) -> Annotation:
        """A sample with the teacher's answer."""
        read, written, logprob = reply.input_tokens, reply.output_tokens, reply.logprob
        # a file with such numbers could not be read again
        read, written = (None if number is None or not 0 <= number < 1 << 63 else number for number in (read, written))
        logprob = None if logprob is None or not math.isfinite(logprob) else logprob
        cost = None if read is written is None else self.teacher.cost(read or 0, written or 0)
        sample = replace(sample, text=reply.text, finish=reply.finish, logprob=logprob, cost=cost)
        return replace(sample, input_tokens=read, output_tokens=written)

    def read(self, sample: Annotation) -> Annotation:
        """Fill in the columns that follow from a sample's text; its error says why the user's parser fails."""
        place = self.place(sample)
        if place is None:
            return sample
        try:
            return read_text(sample, self.rows[place], self.datamodule.parse_teacher, self.datamodule.teacher_agrees)
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
        if read is None:
            place = self.place(sample)
            read = 0 if place is None else self.teacher.count_tokens(self.plan.prompt(self.rows[place]))
        if written is None:
            written = len(sample.text) // 4 + 1
        return read + written, self.teacher.cost(read, written) or 0.0

    def note(self, store: AnnotationStore, started: str, stopped: str | None = None) -> None:
        """Write what is asked, and how, to the metadata, and the prompt beside it."""
        plan = self.plan
        about = {"dataset": self.datamodule.name, "rows": len(self.rows), "demonstrations": plan.selection or "fixed"}
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
        """Counts of the samples of this job's questions, whenever they were asked."""
        # slow to import
        import pandas as pd  # type: ignore[import-untyped]

        read = ["id", "input", "error", "label", "majority_label", "parsed", "agrees", "contains_label", "finish"]
        read += ["input_tokens", "output_tokens", "cost", *self.plan.columns]
        samples = pd.read_parquet(folder / PARQUET, columns=read, dtype_backend="numpy_nullable")
        for name, value in self.plan.columns.items():
            samples = samples[samples[name] == value]
        samples = samples[samples.input == samples.id.map(self.hashes)]
        answers = samples[samples.error.isna()]
        judged = answers[answers.agrees.notna()]
        right = judged[judged.agrees]
        majority = right[right.label == right.majority_label]
        uncounted = answers.input_tokens.isna() | answers.output_tokens.isna()
        found = {
            "rows": len(self.rows),
            "rows answered": answers.id.nunique(),
            "answers": len(answers),
            "errors": len(samples) - len(answers),
            "most frequent errors": most_common(Counter(samples.error.dropna())),
            "parsed": answers.parsed.fillna(False).mean(),
            "agree with gold": judged.agrees.mean(),
            "rationale contains the label": answers.contains_label.mean(),
            "cut at max_new_tokens": answers.finish.eq("length").sum(),
            "prompt tokens": answers.input_tokens.sum(min_count=1),
            "answer tokens": answers.output_tokens.sum(min_count=1),
            "answers without their tokens": uncounted.sum() or None,
            "cost": answers.cost.sum(min_count=1),
            "majority agrees": majority.id.nunique() / judged.id.nunique() if len(judged) else None,
        }
        # plain values, which JSON takes
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
