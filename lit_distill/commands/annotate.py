"""``annotate``: ask a teacher for a rationale and a label of every row, and store all samples."""

from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lit_distill import checks
from lit_distill.annotation.plan import Plan
from lit_distill.annotation.prompts import check_template, fixed, load_demonstrations, load_prompt, nearest
from lit_distill.commands.annotate_job import Job
from lit_distill.data.base import RationaleDataModule
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.export import check_hub, push_folder
from lit_distill.questions import Prompt, Sampling, count_tokens
from lit_distill.tasks import Row
from lit_distill.teachers.base import Teacher, TeacherError
from lit_distill.teachers.runner import Budget


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
        push_to_hub: upload ``out`` to this dataset (``USER/NAME``) on the Hugging Face hub, unless interrupted.
    """
    checks.check_choice("split", split, get_args(Split))
    checks.check_text("kind", kind)
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
    if max_cost is not None and teacher.cost(1, 1) is None:
        raise UserError("max_cost needs teacher.input_price and teacher.output_price (US dollars a million tokens)")
    if structured:
        teacher.check_schema()
    where = prompt or str(datamodule.prompt_file)
    template = load_prompt(where)
    if demonstrations is not None:
        where = demonstrations
        num_demonstrations = 8 if num_demonstrations is None else num_demonstrations
        template = template.model_copy(update={"demonstrations": load_demonstrations(demonstrations)})
    known = template.demonstrations
    if num_demonstrations is not None and num_demonstrations > len(known):
        raise UserError(f"num_demonstrations must be at most {len(known)}, got {num_demonstrations}")
    check_template(template, datamodule.prompt_fields, datamodule.parse_teacher, where)
    if nearest_demonstrations:
        choose = nearest(known, len(known) if num_demonstrations is None else num_demonstrations)
    else:
        template = template.model_copy(update={"demonstrations": known[:num_demonstrations]})
        choose = fixed(template.demonstrations, num_demonstrations)
    plan = Plan(
        template=template,
        choose=choose,
        fields=datamodule.prompt_fields,
        layout=teacher.layout,
        split=split,
        teacher=teacher.name,
        teacher_settings=teacher.settings,
        sampling=Sampling(float(temperature), float(top_p), max_new_tokens, seed),
        num_samples=num_samples,
        until_agrees=until_agrees,
        kind=kind,
        structured=structured,
        label_set=datamodule.label_set or (),
        selection={"nearest": num_demonstrations} if nearest_demonstrations else None,
    )
    datamodule.prepare_data()
    rows = list((datamodule.rows_to_ask(split) or [])[:limit])
    if not rows:
        raise UserError(f"split: {datamodule.absence(split)}")
    budget = Budget(max_tokens, max_cost)
    tokens = count_tokens(plan.prompt(rows[0])), max_new_tokens
    if too_small := budget.exhausted(sum(tokens), teacher.cost(*tokens) or 0.0):
        raise UserError(too_small)
    if dry_run:
        for row in rows[:2]:
            title = Text(f"{row.id} ({plan.layout})")
            Console().print(Panel(Text(shown(plan.prompt(row))), title=title, title_align="left"))
        return show("what would be asked", estimate(plan, teacher, rows))
    if not out:
        raise UserError("out must be given: the folder that the answers go to")
    if push_to_hub is not None:
        check_hub(checks.check_text("push_to_hub", push_to_hub), "dataset")
    job = Job(datamodule, teacher, plan, rows)
    summary = job.run(Path(out), concurrency or teacher.concurrency, budget, ask_failed=retry_errors)
    show(f"{datamodule.name} {split}, asked of {teacher.name}", summary)
    if push_to_hub is not None and summary["stopped"] != "interrupted":
        push_folder(Path(out), push_to_hub, "dataset")
    return summary


def estimate(plan: Plan, teacher: Teacher, rows: list[Row]) -> dict[str, Any]:
    """The most that a job may ask, by the mean prompt of some rows; nothing is asked."""
    measured = rows[:: max(1, len(rows) // 200)]
    try:
        prompt = sum(teacher.count_tokens(plan.prompt(row)) for row in measured) / len(measured)
    except TeacherError as error:
        raise UserError(f"teacher: {error}") from error
    questions = len(rows) * max(plan.num_samples, plan.until_agrees or 0)
    read, written = round(questions * prompt), questions * plan.sampling.max_new_tokens
    return {
        "rows": len(rows),
        "questions at most": questions,
        "prompt tokens at most": read,
        "answer tokens at most": written,
        "cost at most": teacher.cost(read, written),
    }


def show(title: str, summary: dict[str, Any]) -> dict[str, Any]:
    """Print a summary, and return it."""
    # as `Text`, so that names are no markup
    table = Table(title=Text(title, style="table.title"), title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", overflow="fold")
    for name, value in summary.items():
        if value is None:
            continue
        if name.startswith("cost"):
            text = f"${value:,.4f}" if value < 1 else f"${value:,.2f}"
        elif isinstance(value, float) and name != "seconds":
            text = f"{100 * value:.1f} %"
        else:
            text = value if isinstance(value, str) else f"{value:,}"
        table.add_row(name, Text(text))
    Console().print(table)
    return summary


def shown(prompt: Prompt) -> str:
    """A prompt as text."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"[{one.role}]\n{one.content}" for one in prompt)
