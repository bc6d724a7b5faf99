"""``annotate``: ask teachers for a rationale and a label of every row, and store all samples."""

from collections.abc import Sequence
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lit_distill import checks
from lit_distill.annotation.plan import Plan
from lit_distill.annotation.prompts import (
    Choose,
    PromptTemplate,
    check_template,
    fixed,
    load_demonstrations,
    load_prompt,
    nearest,
)
from lit_distill.commands.annotate_job import Ask, Job
from lit_distill.data.base import RationaleDataModule
from lit_distill.data.styles import find_style, reader, rows_with_needs, styles_of
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.exporting.hugging_face import check_hub, push_folder
from lit_distill.questions import Prompt, Sampling, count_tokens
from lit_distill.teachers.base import Teacher, TeacherError
from lit_distill.teachers.runner import Budget

_COLUMNS = {
    "rows": "rows",
    "questions at most": "questions",
    "prompt tokens at most": "prompt tokens",
    "answer tokens at most": "answer tokens",
    "cost at most": "cost",
    "answers": "answers",
    "programs that do not run": "not run",
    "parsed": "parsed",
    "agree with gold": "agree",
    "distinct": "distinct",
    "answer tokens": "tokens",
    "cost": "cost",
}
"""What is said of each teacher and style -> the heading of its column."""
_SUMS = ("cost", "cost at most", "seconds")
"""Numbers with a fraction that are no share of the answers."""


def annotate(
    datamodule: RationaleDataModule,
    teacher: Teacher,
    more_teachers: list[Teacher] | None = None,
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
    kind: str | None = None,
    styles: dict[str, str] | None = None,
    structured: bool = False,
    concurrency: int | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    max_cost: float | None = None,
    retry_errors: bool = False,
    dry_run: bool = False,
    push_to_hub: str | None = None,
) -> dict[str, Any]:
    """Ask one teacher, or several one after the other, about all released rows of a split.

    Questions with an answer in ``out`` are not asked again, whatever ended the earlier job. Answers to an earlier input
    of a row stay in ``out``, but are neither judged nor counted.

    The first Ctrl-C (or SIGTERM) waits for the questions in flight, a second one does not; all answers are stored. The
    exit code is 0 if everything is answered or a budget is used up, 1 if there is no answer at all or the teacher was
    too busy for some questions, 2 after an error, and 130 after an interruption.

    Args:
        datamodule: the data.
        teacher: who is asked.
        more_teachers: further teachers, each with a name of its own, who are asked the same.
        out: folder of the answers, old and new. A dry run needs none.
        split: the split to ask about.
        num_samples: samples per row, all of which are stored.
        temperature: by default 0 for one sample and 0.7 for several.
        top_p: nucleus sampling.
        max_new_tokens: maximum tokens of an answer.
        seed: of the first sample; each further one has the next.
        until_agrees: sample a row until the label agrees with the gold label (rejection sampling), at most so often.
        prompt: YAML file of another prompt, or a style of the dataset (``program``, ``counterfactual``,
            ``self_evaluation``); by default the style named as ``kind``, or the usual one.
        demonstrations: JSON lines file of other demonstrations (``input``, ``rationale``, ``label``, ``id``).
        num_demonstrations: how many to show; by default all of the prompt's, or 8 of a file's.
        nearest_demonstrations: show those with inputs most similar to the row's, not the first ones.
        kind: what the prompt asks for besides the label; tasks select answers by it. By default the style's name, for a
            file ``rationale``.
        styles: several kinds -> their prompts, in place of ``kind`` and ``prompt``; ``rationale`` is the usual one.
        structured: constrain answers to a JSON schema, if the teacher can.
        concurrency: questions in flight; by default what suits each teacher.
        limit: ask about this many first rows only.
        max_tokens: stop when the answers in ``out`` have used so many tokens, including prompts. A question is asked
            only if its prompt (estimated by four bytes per token) and longest answer fit with those in flight;
            estimated, too, for a teacher that does not count tokens.
        max_cost: the same in US dollars; needs the teacher's prices.
        retry_errors: ask failed questions again.
        dry_run: show each style's first prompts in full and estimate tokens and cost; ask and write nothing.
        push_to_hub: upload ``out`` to this dataset (``USER/NAME``) on the Hugging Face hub, unless interrupted.
    """
    checks.check_choice("split", split, get_args(Split))
    several = num_samples > 1 or until_agrees is not None
    temperature = (0.7 if several else 0.0) if temperature is None else temperature
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
    checks.check_fraction("top_p", top_p)
    checks.check_range("temperature", temperature, at_least=0)
    checks.check_range("max_cost", max_cost, above=0)
    if several and temperature == 0:
        raise UserError("temperature must be above 0 for several samples: at 0 they are all the same")
    teachers = [teacher, *(more_teachers or ())]
    for position, one in enumerate(teachers):
        place = "teacher" if position == 0 else f"more_teachers.{position - 1}"
        if one.name in [other.name for other in teachers[:position]]:
            raise UserError(f"{place}: another teacher has the name {one.name!r}, too; give each a name")
        if max_cost is not None and one.cost(1, 1) is None:
            raise UserError(
                f"max_cost needs {place}.input_price and {place}.output_price (US dollars a million tokens)"
            )
        if structured:
            one.check_schema()
    prompts = _prompts(datamodule, kind, prompt, styles, demonstrations)
    chosen: dict[str, tuple[PromptTemplate, Choose]] = {}
    for name, (argument, path) in prompts.items():
        template, where = load_prompt(path), demonstrations or str(path)
        if demonstrations is not None:
            num_demonstrations = 8 if num_demonstrations is None else num_demonstrations
            template = template.model_copy(update={"demonstrations": load_demonstrations(demonstrations)})
        known = template.demonstrations
        if num_demonstrations is not None and num_demonstrations > len(known):
            raise UserError(f"num_demonstrations must be at most {len(known)}, got {num_demonstrations}")
        check_template(template, datamodule.prompt_fields, reader(template.reads, datamodule)[0], where)
        if structured and template.reads != "answer":
            raise UserError(f"structured: not with {argument}: {where}, whose answers are each a {template.reads}")
        if until_agrees is not None and "wrong" in template.needs:
            raise UserError(f"until_agrees: not with {argument}: {where}, whose answers are to be wrong")
        if nearest_demonstrations:
            choose = nearest(known, len(known) if num_demonstrations is None else num_demonstrations)
        else:
            template = template.model_copy(update={"demonstrations": known[:num_demonstrations]})
            choose = fixed(template.demonstrations)
        chosen[name] = template, choose
    datamodule.prepare_data()
    rows = list((datamodule.rows_to_ask(split) or [])[:limit])
    if not rows:
        raise UserError(f"split: {datamodule.absence(split)}")
    of_kind = {
        name: rows_with_needs(template, datamodule, split, rows, prompts[name][0])
        for name, (template, _) in chosen.items()
    }
    asks: list[Ask] = []
    for one, (name, (template, choose)) in product(teachers, chosen.items()):
        plan = Plan(
            template=template,
            choose=choose,
            fields=datamodule.prompt_fields,
            layout=one.layout,
            split=split,
            teacher=one.name,
            teacher_settings=one.settings,
            sampling=Sampling(float(temperature), float(top_p), max_new_tokens, seed),
            num_samples=num_samples,
            until_agrees=until_agrees,
            kind=name,
            structured=structured,
            label_set=datamodule.label_set or (),
            wrong_label=datamodule.wrong_label,
            selection={"nearest": num_demonstrations} if nearest_demonstrations else None,
        )
        asks.append(Ask(one, plan, of_kind[name]))
    budget = Budget(max_tokens, max_cost)
    for ask in asks:
        tokens = count_tokens(ask.plan.prompt(ask.rows[0])), max_new_tokens
        if too_small := budget.exhausted(sum(tokens), ask.teacher.cost(*tokens) or 0.0):
            raise UserError(too_small)
    if dry_run:
        for ask in asks[: len(chosen)]:
            for row in ask.rows[: 2 if len(chosen) == 1 else 1]:
                title = Text(f"{row.id}, {ask.plan.kind} ({ask.plan.layout})")
                Console().print(Panel(Text(shown(ask.plan.prompt(row))), title=title, title_align="left"))
        return show("what would be asked", estimate(asks))
    if not out:
        raise UserError("out must be given: the folder that the answers go to")
    if push_to_hub is not None:
        check_hub(checks.check_text("push_to_hub", push_to_hub), "dataset")
    summary = Job(datamodule, asks, rows).run(Path(out), concurrency, budget, ask_failed=retry_errors)
    show(f"{datamodule.name} {split}, asked of {', '.join(one.name for one in teachers)}", summary)
    if push_to_hub is not None and summary["stopped"] != "interrupted":
        push_folder(Path(out), push_to_hub, "dataset")
    return summary


def _prompts(
    datamodule: RationaleDataModule,
    kind: str | None,
    prompt: str | None,
    styles: dict[str, str] | None,
    demonstrations: str | None,
) -> dict[str, tuple[str, Path]]:
    """Kind -> the argument that names its prompt, and the prompt's file."""
    if styles is None:
        own = styles_of(datamodule)
        path = find_style(prompt or (kind if kind in own else None) or "rationale", datamodule, "prompt")
        # a file may be named as a style is
        usual = next((name for name, file in own.items() if file == path), "rationale")
        return {usual if kind is None else checks.check_text("kind", kind): ("prompt", path)}
    for option, given in (("kind", kind), ("prompt", prompt), ("demonstrations", demonstrations)):
        if given is not None:
            raise UserError(f"{option}: is for one style; leave it out, or styles: {', '.join(styles) or 'none'}")
    if not styles:
        raise UserError("styles must map at least one kind to a prompt")
    return {
        checks.check_text("styles", name): (f"styles.{name}", find_style(given, datamodule, f"styles.{name}"))
        for name, given in styles.items()
    }


def estimate(asks: Sequence[Ask]) -> dict[str, Any]:
    """The most that a job may ask, by the mean prompt of some rows; nothing is asked."""
    styles: list[dict[str, Any]] = []
    for ask in asks:
        plan, teacher, rows = ask.plan, ask.teacher, ask.rows
        measured = rows[:: max(1, len(rows) // 200)]
        try:
            prompt = sum(teacher.count_tokens(plan.prompt(row)) for row in measured) / len(measured)
        except TeacherError as error:
            raise UserError(f"teacher: {error}") from error
        questions = len(rows) * max(plan.num_samples, plan.until_agrees or 0)
        read, written = round(questions * prompt), questions * plan.sampling.max_new_tokens
        of_all: dict[str, Any] = {"rows": len(rows), "questions at most": questions, "prompt tokens at most": read}
        of_all |= {"answer tokens at most": written, "cost at most": teacher.cost(read, written)}
        styles.append({"teacher": teacher.name, "kind": plan.kind, **of_all})
    known = {name: [style[name] for style in styles if style[name] is not None] for name in of_all}
    total = {name: sum(values) if values else None for name, values in known.items()}
    return total | {"rows": max(known["rows"]), "styles": styles}


def show(title: str, summary: dict[str, Any]) -> dict[str, Any]:
    """Print a summary, with a row for each teacher and style if there are several, and return it."""
    # as `Text`, so that names are no markup
    heading: Text | None = Text(title, style="table.title")
    styles, facts = summary.get("styles", ()), summary
    if len(styles) > 1:
        known = {name for style in styles for name, value in style.items() if value is not None}
        names = [name for name in _COLUMNS if name in known]
        table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("teacher and kind", overflow="fold")
        for name in names:
            table.add_column(_COLUMNS[name], justify="right", no_wrap=True)
        for teacher, of_teacher in groupby(styles, itemgetter("teacher")):
            table.add_row(Text(teacher))
            for style in of_teacher:
                table.add_row(Text(f" {style['kind']}"), *(_cell(name, style[name]) for name in names))
        # a mean over styles says nothing
        facts = {name: value for name, value in summary.items() if name in _SUMS or not isinstance(value, float)}
        table.add_row("all", *(_cell(name, facts.get(name)) for name in names))
        Console().print(table)
        heading, facts = None, {name: value for name, value in facts.items() if name not in names}
    table = Table(title=heading, title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", overflow="fold")
    for name, value in facts.items():
        if value is not None and name != "styles":
            table.add_row(name, _cell(name, value))
    if table.rows:
        Console().print(table)
    return summary


def _cell(name: str, value: Any) -> Text:
    if value is None:
        return Text("")
    if name.startswith("cost"):
        return Text(f"${value:,.4f}" if value < 1 else f"${value:,.2f}")
    if isinstance(value, float) and name not in _SUMS:
        return Text(f"{100 * value:.1f} %")
    return Text(value if isinstance(value, str) else f"{value:,}")


def shown(prompt: Prompt) -> str:
    """A prompt as text."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"[{one.role}]\n{one.content}" for one in prompt)
