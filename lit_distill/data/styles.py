"""Styles of answers: what a prompt asks for, what of a row it needs, and how its answers are read.

A style is a prompt file. Besides the fields of the dataset its question may name ``{wrong}``, a wrong answer to argue
for (counterfactual, SCOTT: Wang et al. 2023, arXiv 2305.01879), and ``{given_rationale}`` with ``{given_label}``, a
teacher's earlier answer to judge (self_evaluation, Mind's Mirror: Liu et al. 2023, arXiv 2311.09214). Its key ``reads``
says how an answer is read: as the dataset's own, as a program that is run, or as a verdict.
"""

from dataclasses import replace
from pathlib import Path

from lit_distill.annotation.prompts import GIVEN, Parse, PromptTemplate, Reads, load_prompt
from lit_distill.annotation.record import Agree, Annotation, read_text
from lit_distill.data.base import RationaleDataModule
from lit_distill.equations import program_value, statements
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.evaluation.metrics import equations_agree
from lit_distill.tasks import Row, TeacherOutput

VERDICTS = ("correct", "wrong")  # as in the published data of Mind's Mirror
NEEDS = {"wrong": "a gold label and other choices, or a gold equation with an operator"}
NEEDS |= dict.fromkeys(GIVEN, "a teacher's rationale with a label (data.rationales)")
"""Field that not each row has -> what it needs."""


def find_style(given: str, data: RationaleDataModule, argument: str) -> Path:
    """The prompt file: a path, or the name of one of the dataset's styles. Raises a ``UserError`` for other names."""
    styles = styles_of(data)
    if Path(given).suffix or Path(given).is_file():
        return Path(given)
    if given in styles:
        return styles[given]
    raise UserError(f"{argument}: {data.name} has no style {given!r}; there are {', '.join(styles)}, or give a file")


def styles_of(data: RationaleDataModule) -> dict[str, Path]:
    """The dataset's styles, and their prompt files; the usual one is ``rationale``."""
    more = sorted(data.prompt_file.with_suffix("").glob("*.yaml"))
    return {"rationale": data.prompt_file} | {path.stem: path for path in more}


def rows_with_needs(
    template: PromptTemplate, data: RationaleDataModule, split: Split, rows: list[Row], argument: str
) -> list[Row]:
    """The rows that have what a prompt names, with the output to judge if it names that.

    Raises a ``UserError`` that names the ``argument`` of the prompt, and the dataset's styles that can be had, if no
    row has it.
    """
    if found := _fit(template, data, split, rows):
        return found
    offered = [name for name, path in styles_of(data).items() if _fit(load_prompt(path), data, split, rows)]
    missing = " and ".join(dict.fromkeys(NEEDS[name] for name in sorted(template.needs)))
    raise UserError(
        f"{argument}: no row of {data.name} {split} has {missing}; styles that it has: {', '.join(offered)}"
    )


def _fit(template: PromptTemplate, data: RationaleDataModule, split: Split, rows: list[Row]) -> list[Row]:
    if "wrong" in template.needs:
        rows = [row for row in rows if data.wrong_label(row) is not None]
    if template.needs & GIVEN:
        known = {row.id for row in rows}
        given = ((row, given_output(row)) for row in data.released(split) or () if row.id in known)
        rows = [replace(row, outputs=output) for row, output in given if output]
    return rows


def given_output(row: Row) -> tuple[TeacherOutput, ...]:
    """The first output with a rationale and a label, alone; empty if there is none."""
    fit = (one for one in row.outputs if one.kind == "rationale" and None not in (one.text, one.label))
    return next(((one,) for one in fit), ())


def read_answer(sample: Annotation, row: Row, reads: Reads, data: RationaleDataModule) -> Annotation:
    """Fill in the columns that follow from a sample's text, read as its prompt says.

    A program is stored in one line, as T5's tokenizer knows no other, and its label is its value, which agrees with a
    gold label by value. A verdict agrees if it is right about the given label.
    """
    parse, agree = reader(reads, data)

    def right(verdict: str, gold: str) -> bool:
        return (verdict == VERDICTS[0]) is data.teacher_agrees(str(sample.given_label), gold)

    return read_text(sample, row, parse, right if reads == "verdict" else agree)


def reader(reads: Reads, data: RationaleDataModule) -> tuple[Parse, Agree]:
    """How the texts of a style are parsed, and their labels compared."""
    if reads == "program":
        return parse_program, lambda value, gold: equations_agree(value, gold) or data.teacher_agrees(value, gold)
    return (parse_verdict if reads == "verdict" else data.parse_teacher), data.teacher_agrees


def parse_program(text: str) -> tuple[str, str]:
    """A program in one line, and its value; without the fence of a code block.

    Raises a `ProgramError` if it does not run.
    """
    _, fence, code = text.partition("```")
    program = statements(code.partition("```")[0].removeprefix("python") if fence else text)
    return "; ".join(program), program_value(program)


def parse_verdict(text: str) -> tuple[str, str] | None:
    """``... So the solution is correct.``, or ``wrong``; ``None`` without such a sentence at the end."""
    reasons, _, verdict = text.rpartition("So the solution is")
    label = {"incorrect": VERDICTS[1]}.get(verdict := verdict.strip(" \n.*").lower(), verdict)
    return (reasons.strip(), label) if reasons.strip() and label in VERDICTS else None
