"""``annotate``: ask a teacher for a rationale and a label of every row, and store all samples."""

import math
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import yaml
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lit_distill import __version__, checks
from lit_distill.annotation.plan import Asked, Plan, shown
from lit_distill.annotation.prompts import (
    Choose,
    PromptTemplate,
    check_template,
    fixed,
    load_demonstrations,
    load_prompt,
    nearest,
    written_answer,
)
from lit_distill.annotation.record import Annotation, input_hash, read_text, unread
from lit_distill.annotation.store import CARD, FILE, AnnotationStore
from lit_distill.annotation.tally import Tally, most_common, progress
from lit_distill.data.base import RationaleDataModule
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.export import check_hub, push_folder
from lit_distill.files import write_text
from lit_distill.questions import Reply, Sampling, count_tokens
from lit_distill.tasks import Row
from lit_distill.teachers.base import Teacher, TeacherError
from lit_distill.teachers.runner import Budget, RequestRunner, Rounds, queued_interrupts

_SHOWN = 2  # prompts shown in full by a dry run
_MEASURED = 200  # rows whose prompts are measured for an estimate


def annotate(
    datamodule: RationaleDataModule,
    teacher: Teacher,
    out: str | Path | None = None,
    split: Split = "train",
    num_samples: int = 1,
    temperature: float | None = None,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    until_agrees: int | None = None,
    prompt: str | None = None,
    demonstrations: str | None = None,
    num_demonstrations: int | None = None,
    nearest_demonstrations: bool = False,
    kind: str = "rationale",
    structured: bool = False,
    concurrency: int | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    max_cost: float | None = None,
    retry_errors: bool = False,
    dry_run: bool = False,
    wandb_project: str | None = None,
    push_to_hub: str | None = None,
) -> dict[str, Any]:
    """Ask a teacher about all released rows of a split.

    Questions with an answer in ``out`` are not asked again, whatever ended the earlier job. Answers to an earlier input
    of a row stay in ``out``, but are neither judged nor counted.

    The first Ctrl-C (or SIGTERM) waits for the questions in flight, a second one does not; all answers are stored. The
    exit code is 0 if everything is answered or a budget is used up, 1 if there is no answer at all or the teacher was
    too busy for some questions, 2 after an error, and 130 after an interruption.

    Args:
        datamodule: the data.
        teacher: who is asked.
        out: folder of the answers, old and new. A dry run needs none.
        split: the split to ask about.
        num_samples: samples per row, all of which are stored.
        temperature: by default 0 for one sample and 0.7 for several.
        top_p: nucleus sampling.
        max_new_tokens: maximum tokens of an answer.
        seed: of the first sample; each further one has the next.
        until_agrees: sample a row until the label agrees with the gold label (rejection sampling), at most so often.
        prompt: YAML file of another prompt.
        demonstrations: JSON lines file of other demonstrations (``input``, ``rationale``, ``label``, ``id``).
        num_demonstrations: how many to show; by default all of the prompt's, or 8 of a file's.
        nearest_demonstrations: show those with inputs most similar to the row's, not the first ones.
        kind: what the prompt asks for besides the label; tasks select answers by it.
        structured: constrain answers to a JSON schema, if the teacher can.
        concurrency: questions in flight; by default what suits the teacher.
        limit: ask about this many first rows only.
        max_tokens: stop when the answers in ``out`` have used so many tokens, including prompts. A question is asked
            only if its prompt (estimated by four bytes per token) and longest answer fit with those in flight;
            estimated, too, for a teacher that does not count tokens.
        max_cost: the same in US dollars; needs the teacher's prices.
        retry_errors: ask failed questions again.
        dry_run: show the first prompts in full and estimate tokens and cost; ask and write nothing.
        wandb_project: also log the summary to this W&B project.
        push_to_hub: upload ``out`` to this dataset (``USER/NAME``) on the Hugging Face hub, unless interrupted.

    Returns:
        The printed summary.

    Raises:
        UserError: an argument is wrong, or the teacher is unavailable.
    """
    checks.check_choice("split", split, get_args(Split))
    for name, number, low, high in (
        ("num_samples", num_samples, 1, 10_000),
        ("max_new_tokens", max_new_tokens, 1, None),
        ("seed", seed, 0, 2**31 - 1),
        ("until_agrees", until_agrees, num_samples + 1, 10_000),
        ("num_demonstrations", num_demonstrations, 0, None),
        ("concurrency", concurrency, 1, None),
        ("limit", limit, 1, None),
        ("max_tokens", max_tokens, 1, None),
    ):
        if number is not None:
            checks.check_int(name, number, low, high)
    for name, text in (("kind", kind), ("wandb_project", wandb_project), ("push_to_hub", push_to_hub)):
        if text is not None:
            checks.check_text(name, text)
    checks.check_range("temperature", temperature, at_least=0)
    checks.check_range("max_cost", max_cost, above=0)
    several = num_samples > 1 or until_agrees is not None
    if temperature is None:
        temperature = 0.7 if several else 0.0
    if several and temperature == 0:
        raise UserError("temperature must be above 0 for several samples: at 0 they are all the same")
    if max_cost is not None and teacher.cost(1, 1) is None:
        raise UserError("max_cost needs teacher.input_price and teacher.output_price (US dollars a million tokens)")
    if structured:
        teacher.check_schema()
    template, choose, selection = _prompt(
        datamodule, prompt, demonstrations, num_demonstrations, by_similarity=nearest_demonstrations
    )
    plan = Plan(
        template=template,
        choose=choose,
        fields=datamodule.prompt_fields,
        layout=teacher.layout,
        teacher=teacher.name,
        teacher_settings=teacher.settings,
        sampling=Sampling(float(temperature), checks.check_fraction("top_p", top_p), max_new_tokens, seed),
        num_samples=num_samples,
        until_agrees=until_agrees,
        kind=kind,
        structured=structured,
        closed=lambda row: row.choices or datamodule.label_set or (),
        selection=selection,
    )
    rows = _rows(datamodule, split)[:limit]
    # also fails for unknown template fields
    tokens = count_tokens(plan.prompt(rows[0])), max_new_tokens
    if too_small := Budget(max_tokens, max_cost).exhausted(sum(tokens), teacher.cost(*tokens) or 0.0):
        raise UserError(too_small)
    if dry_run:
        summary = _estimate(plan, teacher, rows)
        for row in rows[:_SHOWN]:
            title = Text(f"{row.id} ({plan.layout})")
            Console().print(Panel(Text(shown(plan.prompt(row))), title=title, title_align="left"))
        _show("what would be asked", summary)
        return summary
    if out is None or not str(out):
        raise UserError("out must be given: the folder that the answers go to")
    if push_to_hub is not None:
        check_hub(push_to_hub, "dataset")
    job = _Job(datamodule, teacher, plan, split, rows)
    summary = job.run(Path(out), concurrency or teacher.concurrency, max_tokens, max_cost, retry_errors)
    _show(f"{datamodule.name} {split}, asked of {teacher.name}", summary)
    if wandb_project is not None:
        import wandb

        name = f"{datamodule.name}-{split}-{teacher.name}"
        with wandb.init(project=wandb_project, name=name, job_type="annotate", config=job.settings) as run:
            run.summary.update({key.replace(" ", "_"): value for key, value in summary.items() if value is not None})
    if push_to_hub is not None and summary["stopped"] != "interrupted":
        push_folder(Path(out), push_to_hub, "dataset")
    return summary


def _prompt(
    datamodule: RationaleDataModule,
    prompt: str | None,
    demonstrations: str | None,
    count: int | None,
    *,
    by_similarity: bool,
) -> tuple[PromptTemplate, Choose, dict[str, Any] | None]:
    """The template, the function that selects demonstrations, and the selection in plain values."""
    path = Path(prompt) if prompt is not None else datamodule.prompt_file
    template = load_prompt(path)
    if demonstrations is not None:
        template = replace(template, demonstrations=load_demonstrations(demonstrations))
        count = 8 if count is None else count
    known = template.demonstrations
    if count is not None and count > len(known):
        raise UserError(f"num_demonstrations must be at most {len(known)}, got {count}")
    check_template(template, datamodule.prompt_fields, datamodule.parse_teacher, str(demonstrations or path))
    if not by_similarity:
        return replace(template, demonstrations=known[:count]), fixed(known[:count], count), None
    if not known:
        raise UserError("nearest_demonstrations: there are no demonstrations to choose from")
    return template, nearest(known, len(known) if count is None else count), {"nearest": count}


def _rows(datamodule: RationaleDataModule, split: Split) -> list[Row]:
    datamodule.prepare_data()
    rows = datamodule.rows_to_ask(split)
    if rows is None:
        taken = ", and val is split off train, which is asked about whole" if split == "val" else ""
        raise UserError(f"split: {datamodule.absence(split)}{taken}")
    if not rows:
        raise UserError(f"split: {datamodule.name} {split} has no rows")
    return rows


@dataclass
class _Job:
    """One run of the command."""

    datamodule: RationaleDataModule
    teacher: Teacher
    plan: Plan
    split: Split
    rows: list[Row]
    faults: dict[tuple[str, int], str] = field(default_factory=dict)
    """Exceptions of a user's own parser, by row id and sample."""
    _estimates: bool = False

    def run(
        self, folder: Path, concurrency: int, max_tokens: int | None, max_cost: float | None, retry_errors: bool
    ) -> dict[str, Any]:
        started, tally = _now(), Tally()
        budget = Budget(max_tokens, max_cost) if max_tokens is not None or max_cost is not None else None

        def count(sample: Annotation) -> None:
            if self.is_asked(sample):
                tally.add(sample)
            if budget is not None:
                budget.use(*self.used(sample))

        with AnnotationStore(folder, count, ask_failed=retry_errors, read=self.read) as store:
            if store.torn:
                _warn(f"{store.path}: an incomplete last line ({store.torn} bytes) was removed")
            self.teacher.has_answered = tally.counts["answers"] > 0 or self.teacher.has_answered
            _keep_prompt(self.plan, folder)
            self.note(store, started, None)
            began = time.monotonic()

            def on_result(asked: Asked, result: Reply | TeacherError) -> None:
                sample, _ = asked
                if isinstance(result, TeacherError):
                    sample = replace(sample, error=" ".join(str(result).split()) or type(result).__name__)
                else:
                    sample = self.read(self.answered(sample, result))
                store.append(sample)
                show()

            runner = RequestRunner(self.teacher, concurrency, on_result, budget)

            def finish() -> None:
                store.finish(self.read, self.place, self.agree)
                self.note(store, started, runner.stopped)
                store.write_parquet()
                if not store.write_card():
                    _warn(f"{folder / CARD} was edited and is not overwritten")

            total = len(self.rows) * self.plan.num_samples
            with queued_interrupts() as interrupts:
                try:
                    with progress(tally, self.teacher.name, total) as show:
                        runner.run(self.questions(store), interrupts)
                except BaseException:
                    # finish the file if possible, but raise why the job ended
                    with suppress(UserError):
                        finish()
                    raise
                finish()
            summary = self.summary(store) | {
                "not answered now": runner.busy.total(),
                "why not": most_common(runner.busy),
                "could not be read": len(self.faults) or None,
                "stopped": runner.stopped,
                "seconds": round(time.monotonic() - began, 1),
                "file": str(folder / FILE),
            }
        if self.faults:
            (name, _), fault = next(iter(self.faults.items()))
            unread = f"{type(self.datamodule).__name__} could not read {len(self.faults)} answers"
            _warn(f"{unread}, the first of row {name!r} ({fault}); they are kept, and read again at the next start")
        return summary

    @cached_property
    def places(self) -> dict[str, int]:
        return {row.id: position for position, row in enumerate(self.rows)}

    @cached_property
    def hashes(self) -> list[str]:
        return [input_hash(row) for row in self.rows]

    def place(self, sample: Annotation) -> int | None:
        """The position of a sample's row; ``None`` for an unknown row or another input."""
        found = self.places.get(sample.id) if sample.split == self.split else None
        return found if found is not None and sample.input in (None, self.hashes[found]) else None

    def is_asked(self, sample: Annotation) -> bool:
        """Whether a sample belongs to this job's questions."""
        plan = self.plan
        own = (plan.prompt_hash, plan.settings_hash, plan.teacher, plan.kind)
        return (sample.prompt, sample.settings, sample.teacher, sample.kind) == own and self.place(sample) is not None

    def read(self, sample: Annotation) -> Annotation:
        """Fill in the columns that follow from a sample's text; left unknown if the user's parser fails."""
        place = self.place(sample)
        if place is None:
            return sample
        try:
            return read_text(sample, self.rows[place], self.datamodule.parse_teacher, self.datamodule.teacher_agrees)
        except Exception as error:  # noqa: BLE001 - a fault of a user's own code loses no answer
            last = traceback.extract_tb(error.__traceback__)[-1]
            fault = " ".join(f"{type(error).__name__}: {error}".split())
            self.faults.setdefault((sample.id, sample.sample), f"{fault}, in {Path(last.filename).name}:{last.lineno}")
            return unread(sample)

    def agree(self, label: str, other: str) -> bool:
        """Whether two labels are the same answer; false if the user's own comparison fails."""
        try:
            return self.datamodule.teacher_agrees(label, other)
        except Exception:  # noqa: BLE001 - a user's own code, too
            return False

    def questions(self, store: AnnotationStore) -> Iterator[Rounds[Asked]]:
        for row in self.rows:
            rounds = self.plan.questions(row, self.split, store.settled, store.agreeing)
            yield ([(asked, asked[1]) for asked in questions] for questions in rounds)

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
        if not self._estimates:
            self._estimates = True
            _warn(f"{self.teacher.name} does not say how many tokens it used: max_tokens and max_cost use an estimate")
        return read + written, self.teacher.cost(read, written) or 0.0

    def answered(self, sample: Annotation, reply: Reply) -> Annotation:
        read, written = (
            tokens if tokens is not None and 0 <= tokens < 1 << 63 else None
            for tokens in (reply.input_tokens, reply.output_tokens)
        )
        counted = read is not None or written is not None
        return replace(
            sample,
            text=reply.text,
            finish=reply.finish,
            input_tokens=read,
            output_tokens=written,
            logprob=reply.logprob if reply.logprob is not None and math.isfinite(reply.logprob) else None,
            cost=self.teacher.cost(read or 0, written or 0) if counted else None,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the job, in plain values."""
        plan = self.plan
        return {
            "dataset": self.datamodule.name,
            "split": self.split,
            "rows": len(self.rows),
            "teacher": plan.teacher,
            "kind": plan.kind,
            "prompt": plan.prompt_hash,
            "settings": plan.settings_hash,
            "teacher_settings": plan.teacher_settings,
            "sampling": asdict(plan.sampling),
            "structured": plan.structured,
            "layout": plan.layout,
            "demonstrations": plan.selection or "fixed",
            "num_samples": plan.num_samples,
            "until_agrees": plan.until_agrees,
        }

    def note(self, store: AnnotationStore, started: str, stopped: str | None) -> None:
        """Write prompt, teacher and settings to the metadata, under their hashes."""
        metadata = store.read_metadata() or {"format": 1, "jobs": []}
        versions = {name: version(name) for name in ("transformers", "openai")}
        versions = {"lit_distill": __version__, "python": platform.python_version(), **versions}
        job = self.settings | {"started": started, "ended": _now(), "stopped": stopped, "versions": versions}
        jobs = [one for one in metadata.get("jobs", []) if one.get("started") != started]
        store.write_metadata(metadata | {"jobs": [*jobs, job]})

    def summary(self, store: AnnotationStore) -> dict[str, Any]:
        tally = Tally()
        agreeing: list[bool] = []
        for sample in store:
            if not self.is_asked(sample):
                continue
            gold = self.rows[self.places[sample.id]].label
            if sample.agrees is not None and sample.id not in tally.rows and gold is not None:
                majority = sample.majority_label
                agreeing.append(majority is not None and self.agree(majority, gold))
            tally.add(sample)
        several = self.plan.num_samples > 1 or self.plan.until_agrees is not None
        share = sum(agreeing) / len(agreeing) if several and agreeing else None
        return {"rows": len(self.rows), **tally.summary(), "majority agrees": share}


def _estimate(plan: Plan, teacher: Teacher, rows: list[Row]) -> dict[str, Any]:
    try:
        measured = [teacher.count_tokens(plan.prompt(row)) for row in rows[:: max(1, len(rows) // _MEASURED)]]
    except TeacherError as error:
        raise UserError(f"teacher: {error}") from error
    texts = [written_answer(plan.template, plan.fields, one) for one in plan.template.demonstrations]
    longest = plan.sampling.max_new_tokens
    answer = min(longest, sum(map(teacher.count_tokens, texts)) / len(texts)) if texts else longest
    questions = len(rows) * plan.num_samples
    at_most = len(rows) * max(plan.num_samples, plan.until_agrees or 0)
    prompt = sum(measured) / len(measured)
    return {
        "rows": len(rows),
        "questions": questions,
        "questions at most": at_most,
        "prompt tokens": round(questions * prompt),
        "answer tokens, as the demonstrations": round(questions * answer),
        "answer tokens at most": at_most * longest,
        "cost": teacher.cost(round(questions * prompt), round(questions * answer)),
        "cost at most": teacher.cost(round(at_most * prompt), at_most * longest),
    }


def _show(title: str, summary: dict[str, Any]) -> None:
    # as `Text`, so that names are no markup
    table = Table(title=Text(title, style="table.title"), title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", overflow="fold")
    for name, value in summary.items():
        if value is not None:
            table.add_row(name, Text(_cell(name, value)))
    Console().print(table)


def _cell(name: str, value: Any) -> str:
    if name.startswith("cost"):
        return f"${value:,.4f}" if value < 1 else f"${value:,.2f}"
    if isinstance(value, float) and name != "seconds":
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _keep_prompt(plan: Plan, folder: Path) -> None:
    """Write the prompt file next to the answers."""
    path = folder / "prompts" / f"{plan.prompt_hash}.yaml"
    try:
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_text(path, yaml.safe_dump(plan.template.plain(), allow_unicode=True, sort_keys=False, width=110))
    except OSError as error:
        raise UserError(f"out: {path} cannot be written ({error.strerror})") from error
