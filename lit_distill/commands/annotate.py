"""``annotate``: ask a teacher for a rationale and a label of every row, and keep all that it says."""

import math
import platform
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lit_distill import __version__, checks
from lit_distill.annotation.demonstrations import Choose, fixed
from lit_distill.annotation.demonstrations import nearest as nearest_of
from lit_distill.annotation.plan import Plan, shown
from lit_distill.annotation.prompts import (
    PromptTemplate,
    check_template,
    load_demonstrations,
    load_prompt,
    written_answer,
)
from lit_distill.annotation.record import Annotation, input_hash, read_text, unread
from lit_distill.annotation.store import CARD, FILE, AnnotationStore
from lit_distill.commands.annotation_progress import Tally, progress
from lit_distill.data.base import RationaleDataModule
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.export import check_hub, push_folder
from lit_distill.files import write_text
from lit_distill.questions import Question, Reply, Sampling, count_tokens
from lit_distill.tasks import Row
from lit_distill.teachers.base import Teacher, TeacherError
from lit_distill.teachers.runner import Budget, RequestRunner, queued_interrupts

SHOWN = 2
"""Prompts that a dry run shows in full."""

_ESTIMATED_FROM = 200
"""Rows whose prompts are measured for an estimate."""


def annotate(
    datamodule: RationaleDataModule,
    teacher: Teacher,
    out: str | Path | None = None,
    split: Literal["train", "val", "test", "predict"] = "train",
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
    """Ask a teacher about a split's whole file, before val is taken off.

    What is in ``out`` already is not asked again, whatever ended the job that wrote it. Answers belong to a row's
    input: those to an input that it had earlier stay in ``out``, and are neither judged nor counted.

    The first Ctrl-C (or SIGTERM) waits for the answers in flight, a second one does not; both keep what was answered.
    The command ends with code 0 where everything is settled or a budget ended it, with 1 where there is no answer at
    all, or questions are left for another start because the teacher was busy, with 2 after an error that it tells in
    one line, and with 130 after an interruption.

    Args:
        datamodule: the data.
        teacher: who is asked.
        out: folder of the answers; goes on with what is there. A dry run needs none.
        split: the rows that are asked about.
        num_samples: samples of each row, all of which are kept.
        temperature: of the teacher's distribution; if not given, 0 for one sample and 0.7 for several.
        top_p: draw from the likeliest tokens that make up this share of the probability.
        max_new_tokens: tokens of an answer at most.
        seed: seed of the first sample; each further one has the next.
        until_agrees: ask for further samples of a row, up to this many in all, until the label of one agrees with the
            gold label (rejection sampling).
        prompt: YAML file of the prompt in place of the dataset's own.
        demonstrations: JSON lines file of demonstrations (``input``, ``rationale``, ``label``, ``id``) in place of
            the prompt's.
        num_demonstrations: how many are shown; all of the prompt's, or 8 of a file's, if not given.
        nearest_demonstrations: show those whose inputs are most like the row's in place of the first ones.
        structured: have answers follow a JSON schema, where the teacher can.
        concurrency: questions in flight at a time; if not given, what suits the teacher.
        limit: ask about the first rows only, so many.
        max_tokens: end the job when the answers in ``out`` have used so many tokens, prompts included. A question is
            asked only while its prompt (four bytes are taken for a token) and its longest answer fit, beside those of
            all in flight; where a teacher does not count tokens, the same estimate counts.
        max_cost: the same in US dollars; needs the teacher's prices.
        retry_errors: ask again what could not be answered.
        dry_run: show the first prompts in full and estimate tokens and cost; ask nothing, write nothing.
        wandb_project: also write the summary to this project of Weights & Biases.
        push_to_hub: upload ``out`` to this dataset (``USER/NAME``) on the Hugging Face hub, unless interrupted.

    Returns:
        The summary that is printed.

    Raises:
        UserError: an argument is wrong, or the teacher is unavailable.
    """
    for name, path in (("out", out), ("prompt", prompt), ("demonstrations", demonstrations)):
        if path is not None and not isinstance(path, Path):
            checks.check_text(name, path)
    for name, given in (("wandb_project", wandb_project), ("push_to_hub", push_to_hub)):
        if given is not None:
            checks.check_text(name, given)
    for name, switch in (
        ("nearest_demonstrations", nearest_demonstrations),
        ("structured", structured),
        ("retry_errors", retry_errors),
        ("dry_run", dry_run),
    ):
        checks.check_bool(name, switch)
    checks.check_choice("split", split, ("train", "val", "test", "predict"))
    checks.check_int("num_samples", num_samples, 1, 10_000)
    checks.check_range("temperature", temperature, at_least=0)
    if temperature is None:
        temperature = 0.0 if num_samples == 1 and until_agrees is None else 0.7
    checks.check_int("max_new_tokens", max_new_tokens, 1)
    checks.check_int("seed", seed, 0, 2**31 - 1)
    sampling = Sampling(float(temperature), checks.check_fraction("top_p", top_p), max_new_tokens, seed)
    if until_agrees is not None:
        checks.check_int("until_agrees", until_agrees, num_samples + 1, 10_000)
    if (num_samples > 1 or until_agrees is not None) and temperature == 0:
        raise UserError("temperature must be above 0 for several samples: at 0 they are all the same")
    for name, value in (("concurrency", concurrency), ("limit", limit), ("max_tokens", max_tokens)):
        if value is not None:
            checks.check_int(name, value, 1)
    checks.check_range("max_cost", max_cost, above=0)
    if max_cost is not None and teacher.cost(1, 1) is None:
        raise UserError("max_cost needs teacher.input_price and teacher.output_price (US dollars a million tokens)")
    if structured:
        teacher.check_schema()
    template, choose, selection = _prompt(
        datamodule, prompt, demonstrations, num_demonstrations, nearest=nearest_demonstrations
    )
    plan = Plan(
        template=template,
        choose=choose,
        fields=datamodule.prompt_fields,
        layout=teacher.layout,
        teacher=teacher.name,
        teacher_settings=teacher.settings,
        sampling=sampling,
        num_samples=num_samples,
        until_agrees=until_agrees,
        structured=structured,
        closed=lambda example: example.choices or datamodule.label_set or (),
        selection=selection,
    )
    rows = _rows(datamodule, split)[:limit]
    # a template that asks for what there is not is found out with the first row
    tokens = count_tokens(plan.prompt(rows[0])), max_new_tokens
    for name, limit_given, least in (
        ("max_tokens", max_tokens, sum(tokens)),
        ("max_cost", max_cost, teacher.cost(*tokens) or 0.0),
    ):
        if limit_given is not None and limit_given < least:
            per_question = f"a prompt of about {tokens[0]:,} tokens and an answer of max_new_tokens {max_new_tokens:,}"
            raise UserError(f"{name} must be at least {least:.6g}, for {per_question}; got {limit_given:g}")
    if dry_run:
        summary = _estimate(plan, teacher, rows)
        _show_prompts(plan, rows)
        _show("what would be asked", summary)
        return summary
    if out is None:
        raise UserError("out must be given: the folder that the answers go to")
    if push_to_hub is not None:
        check_hub(push_to_hub, "dataset")
    job = _Job(datamodule, teacher, plan, split, rows)
    summary = job.run(
        Path(out),
        concurrency=concurrency or teacher.concurrency,
        max_tokens=max_tokens,
        max_cost=max_cost,
        retry_errors=retry_errors,
    )
    _show(f"{datamodule.name} {split}, asked of {teacher.name}", summary)
    if wandb_project is not None:
        _log_to_wandb(wandb_project, job, summary)
    if push_to_hub is not None and summary["stopped"] != "interrupted":
        push_folder(Path(out), push_to_hub, "dataset")
    return summary


def _prompt(
    datamodule: RationaleDataModule, prompt: str | None, demonstrations: str | None, count: int | None, *, nearest: bool
) -> tuple[PromptTemplate, Choose, dict[str, Any] | None]:
    """The template, how a row's demonstrations are chosen, and that choice in plain values."""
    path = Path(prompt) if prompt is not None else datamodule.prompt_file
    template = load_prompt(path)
    if count is not None:
        checks.check_int("num_demonstrations", count, 0)
    if demonstrations is not None:
        template = replace(template, demonstrations=load_demonstrations(demonstrations))
        count = 8 if count is None else count
    shown = template.demonstrations
    if count is not None and count > len(shown):
        raise UserError(f"num_demonstrations must be at most {len(shown)}, got {count}")
    check_template(template, datamodule.prompt_fields, datamodule.parse_teacher, str(demonstrations or path))
    if not nearest:
        return replace(template, demonstrations=shown[:count]), fixed(shown[:count], count), None
    if not shown:
        raise UserError("nearest_demonstrations: there are no demonstrations to choose from")
    return template, nearest_of(shown, len(shown) if count is None else count), {"nearest": count}


def _rows(datamodule: RationaleDataModule, split: Split) -> list[Row]:
    datamodule.prepare_data()
    rows = datamodule.rows_to_ask(split)
    if rows is None:
        taken = ", and val is taken off train, which is asked about whole" if split == "val" else ""
        raise UserError(f"split: {datamodule.absence(split)}{taken}")
    if not rows:
        raise UserError(f"split: {datamodule.name} {split} has no rows")
    return rows


_Asked = tuple[Annotation, Question]
"""A question, and what its answer goes into."""


@dataclass
class _Job:
    """One run of the command."""

    datamodule: RationaleDataModule
    teacher: Teacher
    plan: Plan
    split: Split
    rows: list[Row]
    faults: dict[tuple[str, int], str] = field(default_factory=dict)
    """What a user's own reading of an answer raised, by the row's id and the sample."""
    _estimates: bool = False

    def run(
        self,
        folder: Path,
        *,
        concurrency: int,
        max_tokens: int | None,
        max_cost: float | None,
        retry_errors: bool,
    ) -> dict[str, Any]:
        started = _now()
        tally = Tally(self.asked)
        limited = max_tokens is not None or max_cost is not None
        budget = Budget(max_tokens, max_cost)

        opened = False

        def see(annotation: Annotation) -> None:
            tally.add(annotation)
            if limited and not opened:
                budget.use(*self._used(annotation))

        with AnnotationStore(folder, see, ask_failed=retry_errors, read=self.read) as store:
            opened = True
            if store.torn:
                _tell(f"{store.path}: a torn last line ({store.torn} bytes) was taken off")
            if tally.answers:
                self.teacher.has_answered = True
            _keep_prompt(self.plan, folder)
            self._note_job(store, started, None)
            failed: set[bytes] = set()

            def on_result(asked: _Asked, said: Reply | TeacherError) -> None:
                annotation, question = asked
                if isinstance(said, TeacherError):
                    done = replace(annotation, error=" ".join(str(said).split()) or type(said).__name__)
                    failed.add(bytes.fromhex(annotation.key or ""))
                else:
                    # an answer is kept whatever the user's own reading of it does
                    done = self.read(self._answered(annotation, said))
                    if limited:
                        budget.use(*self._used(done, question))
                store.append(done)

            runner = RequestRunner(self.teacher, concurrency, on_result, budget)
            tally.begin(len(self.rows) * self.plan.num_samples)

            def finish() -> None:
                store.finish(self.read, self.place, self.agree)
                self._note_job(store, started, runner.stopped)
                store.write_parquet()
                if not store.write_card():
                    _tell(f"{folder / CARD} holds words of your own and was left as it is")

            with queued_interrupts() as interrupts:
                try:
                    with progress(tally, self.teacher.name):
                        runner.run(self._questions(store), interrupts)
                except BaseException:
                    # what was paid for is put in order if it can be; why the job ended is what is told
                    with suppress(UserError):
                        finish()
                    raise
                finish()
                unsettled = 0
                if runner.stopped is not None or runner.busy:
                    unsettled = sum(1 for _ in self._unsettled(store, failed))
            summary = self._summary(store) | {
                "rows not finished": unsettled,
                "not answered now": runner.busy.total(),
                "why not": _most_common(runner.busy),
                "could not be read": len(self.faults) or None,
                "stopped": runner.stopped,
                "seconds": round(tally.seconds, 1),
            }
        if self.faults:
            (name, _), fault = next(iter(self.faults.items()))
            _tell(
                f"{type(self.datamodule).__name__} could not read {len(self.faults)} answers, the first of row {name!r}"
                f" ({fault}); they are kept, and read again at the next start"
            )
        return summary | {"file": str(folder / FILE)}

    @cached_property
    def _places(self) -> dict[str, int]:
        return {example.id: position for position, example in enumerate(self.rows)}

    @cached_property
    def _hashes(self) -> list[str]:
        return [input_hash(example) for example in self.rows]

    def place(self, annotation: Annotation) -> int | None:
        """Where a sample's row stands among the rows; ``None`` where it is of no row, or of another input of one."""
        found = self._places.get(annotation.id) if annotation.split == self.split else None
        return found if found is not None and annotation.input in (None, self._hashes[found]) else None

    def read(self, annotation: Annotation) -> Annotation:
        """The columns that follow from a sample's text; not known where the user's own reading of it raises."""
        place = self.place(annotation)
        if place is None:
            return annotation
        try:
            return read_text(
                annotation, self.rows[place], self.datamodule.parse_teacher, self.datamodule.teacher_agrees
            )
        except Exception as error:  # noqa: BLE001 - of a user's own code, whose fault loses no answer
            self._note_fault(annotation, error)
            return unread(annotation)

    def agree(self, label: str, other: str) -> bool:
        """Whether two labels are one answer, as far as the user's own comparison can tell."""
        try:
            return self.datamodule.teacher_agrees(label, other)
        except Exception:  # noqa: BLE001 - of a user's own code, too
            return False

    def _note_fault(self, annotation: Annotation, error: Exception) -> None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        said = " ".join(f"{type(error).__name__}: {error}".split())
        self.faults.setdefault((annotation.id, annotation.sample), f"{said}, in {where}")

    def asked(self, annotation: Annotation) -> bool:
        """Whether a sample is one of this job's, by whichever run of it."""
        return (
            annotation.prompt == self.plan.prompt_hash
            and annotation.settings == self.plan.settings_hash
            and annotation.teacher == self.plan.teacher
            and self.place(annotation) is not None
        )

    def _questions(self, store: AnnotationStore) -> Iterator[Iterator[list[tuple[_Asked, Question]]]]:
        for example in self.rows:
            rounds = self.plan.questions(example, self.split, store.settled, store.agreeing)
            yield ([((annotation, question), question) for annotation, question in asked] for asked in rounds)

    def _unsettled(self, store: AnnotationStore, failed: set[bytes]) -> Iterator[Row]:
        """The rows that another start has something to ask about."""
        settled = store.settled | failed
        for example in self.rows:
            if next(self.plan.questions(example, self.split, settled, store.agreeing), None) is not None:
                yield example

    def _used(self, annotation: Annotation, question: Question | None = None) -> tuple[int, float]:
        """Tokens and US dollars of an answer, for the budget; estimated where the teacher does not count."""
        read, written = annotation.input_tokens, annotation.output_tokens
        if annotation.text is None or (read is not None and written is not None):
            return (read or 0) + (written or 0), annotation.cost or 0.0
        if read is None:
            place = None if question else self.place(annotation)
            prompt = question.prompt if question else None if place is None else self.plan.prompt(self.rows[place])
            read = 0 if prompt is None else self.teacher.count_tokens(prompt)
        if written is None:
            written = len(annotation.text) // 4 + 1
        if not self._estimates:
            self._estimates = True
            _tell(
                f"{self.teacher.name} does not say how many tokens it used: max_tokens and max_cost count an estimate"
            )
        return read + written, self.teacher.cost(read, written) or 0.0

    def _answered(self, annotation: Annotation, reply: Reply) -> Annotation:
        read, written = _countable(reply.input_tokens), _countable(reply.output_tokens)
        counted = read is not None or written is not None
        return replace(
            annotation,
            text=reply.text,
            finish=reply.finish,
            input_tokens=read,
            output_tokens=written,
            logprob=reply.logprob if reply.logprob is not None and math.isfinite(reply.logprob) else None,
            cost=self.teacher.cost(read or 0, written or 0) if counted else None,
        )

    def _note_job(self, store: AnnotationStore, started: str, stopped: str | None) -> None:
        """What this folder's samples were asked with, under the hashes that they hold."""
        metadata = store.read_metadata() or {"format": 1, "jobs": []}
        job = {
            "dataset": self.datamodule.name,
            "split": self.split,
            "rows": len(self.rows),
            "teacher": self.plan.teacher,
            "prompt": self.plan.prompt_hash,
            "settings": self.plan.settings_hash,
            "teacher_settings": self.plan.teacher_settings,
            "sampling": asdict(self.plan.sampling),
            "structured": self.plan.structured,
            "layout": self.plan.layout,
            "demonstrations": self.plan.selection or "fixed",
            "num_samples": self.plan.num_samples,
            "until_agrees": self.plan.until_agrees,
            "started": started,
            "ended": _now(),
            "stopped": stopped,
            "versions": {"lit_distill": __version__, "python": platform.python_version(), **_versions()},
        }
        jobs = [one for one in metadata.get("jobs", []) if one.get("started") != started]
        store.write_metadata(metadata | {"jobs": [*jobs, job]})

    def _summary(self, store: AnnotationStore) -> dict[str, Any]:
        counts: Counter[str] = Counter()
        errors: Counter[str] = Counter()
        answered_rows: set[str] = set()
        tokens: list[int | None] = [None, None]
        cost, priced = 0.0, False
        for annotation in store:
            if not self.asked(annotation):
                continue
            own = annotation.input_tokens, annotation.output_tokens
            tokens = [a if b is None else (a or 0) + b for a, b in zip(tokens, own, strict=True)]
            cost, priced = cost + (annotation.cost or 0.0), priced or annotation.cost is not None
            if annotation.text is None:
                errors[annotation.error or "not told"] += 1
                continue
            new = annotation.id not in answered_rows
            answered_rows.add(annotation.id)
            counts["answers"] += 1
            counts["uncounted"] += None in own
            counts["parsed"] += bool(annotation.parsed)
            counts["contains_label"] += bool(annotation.contains_label)
            counts["cut"] += annotation.finish == "length"
            if annotation.agrees is not None:
                counts["judged"] += 1
                counts["agree"] += annotation.agrees
                gold = self.rows[self._places[annotation.id]].label
                if new and gold is not None:
                    counts["voted"] += 1
                    counts["vote_agree"] += annotation.majority_label is not None and self.agree(
                        annotation.majority_label, gold
                    )
        return {
            "rows": len(self.rows),
            "rows answered": len(answered_rows),
            "answers": counts["answers"],
            "errors": errors.total(),
            "most frequent errors": _most_common(errors),
            "parsed": _share(counts["parsed"], counts["answers"]),
            "agree with gold": _share(counts["agree"], counts["judged"]),
            "majority agrees": _share(counts["vote_agree"], counts["voted"])
            if self.plan.num_samples > 1 or self.plan.until_agrees
            else None,
            "rationale holds the label": _share(counts["contains_label"], counts["parsed"]),
            "cut at max_new_tokens": counts["cut"],
            "prompt tokens": tokens[0],
            "answer tokens": tokens[1],
            "answers without their tokens": counts["uncounted"] or None,
            "cost": round(cost, 6) if priced else None,
        }


def _estimate(plan: Plan, teacher: Teacher, rows: list[Row]) -> dict[str, Any]:
    step = max(1, len(rows) // _ESTIMATED_FROM)
    try:
        measured = [teacher.count_tokens(plan.prompt(example)) for example in rows[::step]]
    except TeacherError as error:
        raise UserError(f"teacher: {error}") from error
    answers = [
        teacher.count_tokens(written_answer(plan.template, plan.fields, one)) for one in plan.template.demonstrations
    ]
    questions = len(rows) * plan.num_samples
    at_most = len(rows) * max(plan.num_samples, plan.until_agrees or 0)
    prompt_tokens = sum(measured) / len(measured)
    expected = sum(answers) / len(answers) if answers else plan.sampling.max_new_tokens
    expected = min(expected, plan.sampling.max_new_tokens)
    return {
        "rows": len(rows),
        "questions": questions,
        "questions at most": at_most,
        "prompt tokens": round(questions * prompt_tokens),
        "answer tokens, as the demonstrations": round(questions * expected),
        "answer tokens at most": at_most * plan.sampling.max_new_tokens,
        "cost": teacher.cost(round(questions * prompt_tokens), round(questions * expected)),
        "cost at most": teacher.cost(round(at_most * prompt_tokens), at_most * plan.sampling.max_new_tokens),
    }


def _show_prompts(plan: Plan, rows: list[Row]) -> None:
    console = Console()
    for example in rows[:SHOWN]:
        title = Text(f"{example.id} ({plan.layout})")
        console.print(Panel(Text(shown(plan.prompt(example))), title=title, title_align="left"))


def _show(title: str, summary: dict[str, Any]) -> None:
    # as texts, so that no name is taken for markup
    table = Table(title=Text(title, style="table.title"), title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", overflow="fold")
    for name, value in summary.items():
        if value is not None:
            table.add_row(name, Text(_cell(name, value)))
    Console().print(table)


def _cell(name: str, value: Any) -> str:  # noqa: ANN401 - plain values
    if name.startswith("cost"):
        return f"${value:,.4f}" if value < 1 else f"${value:,.2f}"
    if isinstance(value, float) and name != "seconds":
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _most_common(reasons: Counter[str]) -> str | None:
    """The most frequent reasons with their counts."""
    return "; ".join(f"{count:,} x {reason[:200]}" for reason, count in reasons.most_common(3)) or None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _countable(tokens: int | None) -> int | None:
    """A number of tokens that a column can hold."""
    return tokens if tokens is not None and 0 <= tokens < 1 << 63 else None


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("transformers", "openai")}


def _keep_prompt(plan: Plan, folder: Path) -> None:
    """The prompt as it was, beside the answers to it."""
    path = folder / "prompts" / f"{plan.prompt_hash}.yaml"
    if path.exists():
        return
    content = {"version": 1, **asdict(plan.template)}
    content["stop"] = list(plan.template.stop)
    content["demonstrations"] = [
        {"input": one.input, "rationale": one.rationale, "label": one.label}
        | ({} if one.choices is None else {"choices": list(one.choices)})
        for one in plan.template.demonstrations
    ]
    try:
        path.parent.mkdir(exist_ok=True)
        write_text(path, yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=110))
    except OSError as error:
        raise UserError(f"out: {path} cannot be written ({error.strerror})") from error


def _log_to_wandb(project: str, job: _Job, summary: dict[str, Any]) -> None:
    import wandb

    plan = job.plan
    config = {
        "dataset": job.datamodule.name,
        "split": job.split,
        "teacher": plan.teacher,
        "prompt": plan.prompt_hash,
        "num_samples": plan.num_samples,
        "teacher_settings": plan.teacher_settings,
        "sampling": asdict(plan.sampling),
        "structured": plan.structured,
    }
    name = f"{job.datamodule.name}-{job.split}-{plan.teacher}"
    with wandb.init(project=project, name=name, job_type="annotate", config=config) as run:
        run.summary.update({key.replace(" ", "_"): value for key, value in summary.items() if value is not None})
