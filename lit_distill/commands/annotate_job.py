"""One job of ``annotate``: a teacher is asked about the rows of a split; its answers go to a folder."""

import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from lit_distill import __version__
from lit_distill.annotation.plan import Asked, Plan
from lit_distill.annotation.record import Annotation, input_hash, read_text, unread
from lit_distill.annotation.store import FILE, PARQUET, AnnotationStore
from lit_distill.data.base import RationaleDataModule
from lit_distill.files import write_text
from lit_distill.progress import ticker
from lit_distill.questions import Reply
from lit_distill.tasks import Row
from lit_distill.teachers.base import Teacher, TeacherError
from lit_distill.teachers.runner import Budget, RequestRunner, Rounds, queued_interrupts


class Job:
    """The plan's questions about rows, asked of a teacher; the data module reads and judges the answers."""

    def __init__(self, datamodule: RationaleDataModule, teacher: Teacher, plan: Plan, rows: list[Row]) -> None:
        self.datamodule, self.teacher, self.plan, self.rows = datamodule, teacher, plan, rows
        self.places = {row.id: place for place, row in enumerate(rows)}
        self.hashes = {row.id: input_hash(row) for row in rows}
        self.faulty = False  # an exception of a user's own parser was shown

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

        def on_result(asked: Asked, result: Reply | TeacherError) -> None:
            sample, _ = asked
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
                    runner.run(self.questions(store), interrupts)
            finally:
                self.note(store, started, runner.stopped)
                store.finish(self.place, self.agree)
                store.write_card()
        return self.summary(folder) | {
            "not answered now": runner.busy.total(),
            "why not": most_common(runner.busy),
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
        plan = self.plan
        own = (plan.prompt_hash, plan.settings_hash, plan.teacher, plan.kind)
        return (sample.prompt, sample.settings, sample.teacher, sample.kind) == own and self.place(sample) is not None

    def questions(self, store: AnnotationStore) -> Iterator[Rounds[Asked]]:
        """The questions about each row that are left."""
        for row in self.rows:
            rounds = self.plan.questions(row, store.settled, store.agreeing)
            yield ([(asked, asked[1]) for asked in questions] for questions in rounds)

    def answered(self, sample: Annotation, reply: Reply) -> Annotation:
        """A sample with the teacher's answer."""
        read, written = (
            tokens if tokens is not None and 0 <= tokens < 1 << 63 else None
            for tokens in (reply.input_tokens, reply.output_tokens)
        )
        return replace(
            sample,
            text=reply.text,
            finish=reply.finish,
            input_tokens=read,
            output_tokens=written,
            logprob=reply.logprob if reply.logprob is not None and math.isfinite(reply.logprob) else None,
            cost=None if read is written is None else self.teacher.cost(read or 0, written or 0),
        )

    def read(self, sample: Annotation) -> Annotation:
        """Fill in the columns that follow from a sample's text; left unknown if the user's parser fails."""
        place = self.place(sample)
        if place is None:
            return sample
        try:
            return read_text(sample, self.rows[place], self.datamodule.parse_teacher, self.datamodule.teacher_agrees)
        except Exception as error:  # noqa: BLE001 - a fault of a user's own code loses no answer
            if not self.faulty:
                self.faulty = True
                fault = " ".join("".join(traceback.format_exception(error, limit=-1)[1:]).split())
                reader = type(self.datamodule).__name__
                print(f"{reader} cannot read an answer to {sample.id!r}, which is kept: {fault}", file=sys.stderr)
            return unread(sample)

    def agree(self, label: str, other: str) -> bool:
        """Whether two labels are the same answer; false if the user's own comparison fails."""
        try:
            return self.datamodule.teacher_agrees(label, other)
        except Exception:  # noqa: BLE001 - a user's own code, too
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
        names = ("split", "teacher", "kind", "teacher_settings", "structured", "layout", "num_samples", "until_agrees")
        job = {
            "dataset": self.datamodule.name,
            "rows": len(self.rows),
            **{name: getattr(plan, name) for name in names},
            "prompt": plan.prompt_hash,
            "settings": plan.settings_hash,
            "sampling": asdict(plan.sampling),
            "demonstrations": plan.selection or "fixed",
            "started": started,
            "ended": now(),
            "stopped": stopped,
            "version": __version__,
        }
        metadata = store.read_metadata()
        earlier = [one for one in metadata["jobs"] if one.get("started") != started]
        store.write_metadata(metadata | {"jobs": [*earlier, job]})
        prompt = store.folder / "prompts" / f"{plan.prompt_hash}.yaml"
        prompt.parent.mkdir(exist_ok=True)
        if not prompt.exists():
            content = plan.template.model_dump(mode="json", exclude_none=True)
            write_text(prompt, yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=110))

    def summary(self, folder: Path) -> dict[str, Any]:
        """Counts of the samples of this job's questions, whenever they were asked."""
        # slow to import
        import pandas as pd  # type: ignore[import-untyped]

        plan = self.plan
        own = {"split": self.plan.split, "prompt": plan.prompt_hash, "settings": plan.settings_hash}
        own |= {"teacher": plan.teacher, "kind": plan.kind}
        counted = ["id", "input", "error", "label", "majority_label", "parsed", "agrees", "contains_label", "finish"]
        tokens = ["input_tokens", "output_tokens", "cost"]
        samples = pd.read_parquet(folder / PARQUET, columns=[*own, *counted, *tokens], dtype_backend="numpy_nullable")
        for name, value in own.items():
            samples = samples[samples[name] == value]
        samples = samples[samples.input == samples.id.map(self.hashes)]
        answers = samples[samples.error.isna()]
        judged = answers[answers.agrees.notna()]
        majority = judged[(judged.label == judged.majority_label) & judged.agrees]
        several = len(answers) > answers.id.nunique()

        def total(name: str) -> Any:
            return None if answers[name].isna().all() else answers[name].sum()

        return {
            "rows": len(self.rows),
            "rows answered": answers.id.nunique(),
            "answers": len(answers),
            "errors": len(samples) - len(answers),
            "most frequent errors": most_common(Counter(samples.error.dropna())),
            "parsed": share(answers.parsed.fillna(False)),
            "agree with gold": share(judged.agrees),
            "rationale contains the label": share(answers.contains_label),
            "majority agrees": share(judged.id.drop_duplicates().isin(majority.id)) if several else None,
            "cut at max_new_tokens": int(answers.finish.eq("length").sum()),
            "prompt tokens": total("input_tokens"),
            "answer tokens": total("output_tokens"),
            "answers without their tokens": int(answers[tokens[:2]].isna().any(axis=1).sum()) or None,
            "cost": total("cost"),
        }


def now() -> str:
    """The time, as in metadata."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def share(found: Any) -> float | None:
    """The share of true values, missing ones aside; ``None`` of nothing."""
    known = found.dropna()
    return float(known.mean()) if len(known) else None


def most_common(reasons: Counter[str]) -> str | None:
    """The most frequent reasons with their counts."""
    return "; ".join(f"{count:,} x {reason[:200]}" for reason, count in reasons.most_common(3)) or None
