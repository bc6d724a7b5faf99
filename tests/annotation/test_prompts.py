"""Prompt files, their checks, and how a question is written of them."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_distill.annotation.prompts import (
    PromptTemplate,
    check_template,
    load_demonstrations,
    load_prompt,
    write_prompt,
    written_answer,
)
from lit_distill.data import ToyDataModule
from lit_distill.errors import UserError
from lit_distill.questions import Layout, Message
from lit_distill.tasks import Row, TeacherOutput
from tests.rows import make_row, write_rows

TOY = ToyDataModule()

FILE = r"""
version: 1
instruction: >-
  Find the word that does
  not belong.
question: "{input}{options}"
answer: "{rationale} So the answer is {label}."
question_cue: "Q: "
answer_cue: "A: "
stop: ["\nQ:"]
demonstrations:
  - input: which of owl , oak , crow ?
    choices: [owl, oak, crow]
    rationale: >-
      An oak is a tree. The others
      are birds.
    label: oak
  - {input: "which of tin , fig ?", rationale: A fig is no metal., label: fig}
"""

OAK = make_row(
    id="",
    input="which of owl , oak , crow ?",
    label="oak",
    choices=("owl", "oak", "crow"),
    rationale="An oak is a tree. The others are birds.",
)
FIG = make_row(id="", input="which of tin , fig ?", label="fig", rationale="A fig is no metal.")
TEMPLATE = PromptTemplate(
    instruction="Find the word that does not belong.",
    question="{input}{options}",
    answer="{rationale} So the answer is {label}.",
    question_cue="Q: ",
    answer_cue="A: ",
    stop=("\nQ:",),
    demonstrations=(OAK, FIG),
)
ROW = make_row("toy-test-7", "which of carp , saw ?", "saw", ("carp", "saw"), "fish : carp . tool : saw .", "saw")

CHAT = (
    Message("system", "Find the word that does not belong."),
    Message("user", "which of owl , oak , crow ?\nOptions: owl, oak, crow"),
    Message("assistant", "An oak is a tree. The others are birds. So the answer is oak."),
    Message("user", "which of tin , fig ?"),
    Message("assistant", "A fig is no metal. So the answer is fig."),
    Message("user", "which of carp , saw ?\nOptions: carp, saw"),
)

COMPLETION = """Find the word that does not belong.

Q: which of owl , oak , crow ?
Options: owl, oak, crow
A: An oak is a tree. The others are birds. So the answer is oak.

Q: which of tin , fig ?
A: A fig is no metal. So the answer is fig.

Q: which of carp , saw ?
Options: carp, saw
A:"""

WritePrompt = Callable[..., Path]


@pytest.fixture
def write_file(tmp_path: Path) -> WritePrompt:
    """Write the file above with other values; ``None`` leaves a key out."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "mine.yaml"
        values = {key: value for key, value in (yaml.safe_load(FILE) | changes).items() if value is not None}
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


def one_line(error: pytest.ExceptionInfo[UserError], path: Path, key: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(("prompt: ", "demonstrations: "))
    assert str(path) in message
    assert key in message


# ---------------------------------------------------------------- files


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE, encoding="utf-8")
    assert load_prompt(path) == load_prompt(str(path)) == TEMPLATE


def test_question_and_answer_are_enough(write_file: WritePrompt) -> None:
    path = write_file(instruction=None, question_cue=None, answer_cue=None, stop=None, demonstrations=None)
    template = load_prompt(path)
    assert template == PromptTemplate("", TEMPLATE.question, TEMPLATE.answer)
    path.write_text(path.read_text() + "stop:\ndemonstrations:\n", encoding="utf-8")
    assert load_prompt(path) == template


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"questoin": "{input}"}, "questoin", "Extra inputs are not permitted"),
        ({"version": 2}, "version", "Input should be 1, got 2"),
        ({"question": None}, "question", "Field required"),
        ({"answer": " \n"}, "answer", "String should match pattern"),
        ({"instruction": ["Answer."]}, "instruction", "Input should be a valid string, got ['Answer.']"),
        ({"stop": ["Q:", ""]}, "stop.1", "at least 1 character"),
        ({"demonstrations": {"input": "x"}}, "demonstrations", "got {'input': 'x'}"),
        ({"demonstrations": ["x"]}, "demonstrations.0", "got 'x'"),
        ({"demonstrations": [{"input": "x", "label": "y"}]}, "demonstrations.0.rationale", "Field required"),
        ({"demonstrations": [{"input": "x", "label": 3, "rationale": "z"}]}, "demonstrations.0.label", "got 3"),
    ],
)
def test_a_wrong_key_is_named(changes: dict[str, Any], key: str, says: str, write_file: WritePrompt) -> None:
    path = write_file(**changes)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        load_prompt(path)
    one_line(error, path, key)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "must have the keys version, instruction"),
        (b"- version: 1", "must have the keys"),
        (b"question: [\nanswer: {", "is not YAML"),
        (b"question: \xff", "is not YAML"),
        (b"question: \x07", "is not YAML"),
    ],
)
def test_what_is_no_prompt_is_said(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        load_prompt(path)
    one_line(error, path, says)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot be read") as error:
            load_prompt(path)
        one_line(error, path, "cannot be read")


# ---------------------------------------------------------------- checks


def check(template: PromptTemplate) -> None:
    check_template(template, TOY.prompt_fields, TOY.parse_teacher, "mine.yaml")


def test_a_good_template_passes() -> None:
    check(TEMPLATE)
    check(replace(TEMPLATE, demonstrations=()))


@pytest.mark.parametrize("shown", [(), (OAK,)])
@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"question": "{premise}"}, "question", "asks for {premise}, and there are {input}, {choices}, {options}"),
        ({"question": "{input.label}"}, "question", "asks for {input.label}, and there are {input}"),
        ({"question": "{}"}, "question", "asks for {}, and there are {input}"),
        ({"question": "{rationale}"}, "question", "asks for {rationale}, and there are {input}, {choices}, {options}"),
        ({"question": "{input"}, "question: ", "expected '}'"),
        ({"answer": "{letter}"}, "answer", "asks for {letter}, and there are {input}, {choices}, {options}, {rat"),
        ({"answer": "{rationale} }"}, "answer: ", "Single '}'"),
        ({"question": "{input:>2000000000}"}, "question: ", "{input} must stand without ':' and '!'"),
        ({"question": "{input:{label}}"}, "question: ", "{input} must stand without ':' and '!'"),
        ({"answer": "{rationale} {label!r}"}, "answer: ", "{label} must stand without ':' and '!'"),
        ({"question": "{input.__class__}"}, "question", "asks for {input.__class__}, and there are {input}"),
        ({"question": "{input[0]}"}, "question", "asks for {input[0]}, and there are {input}"),
    ],
)
def test_templates_ask_for_what_the_dataset_offers(
    changes: dict[str, Any], key: str, says: str, shown: tuple[Row, ...]
) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as error:
        check(replace(TEMPLATE, demonstrations=shown, **changes))
    one_line(error, Path("mine.yaml"), f"mine.yaml: {key}")


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("{rationale}\nThe answer is {label}", OAK),
        ("So the answer is {label}. {rationale}", OAK),
        ("{rationale} So the answer is {label}. Done", OAK),
        (TEMPLATE.answer, replace(OAK, label="oak.\nOr not")),
    ],
)
def test_a_demonstration_that_is_not_read_back_is_named(answer: str, shown: Row) -> None:
    with pytest.raises(UserError, match="is read by the dataset as") as error:
        check(replace(TEMPLATE, answer=answer, demonstrations=(shown,)))
    one_line(error, Path("mine.yaml"), "the answer of demonstration 1")


@pytest.mark.parametrize("lacking", [replace(OAK, label=None), replace(OAK, outputs=())])
def test_a_demonstration_has_rationale_and_label(lacking: Row) -> None:
    with pytest.raises(UserError, match="demonstration 2 needs a rationale and a label") as error:
        check(replace(TEMPLATE, demonstrations=(FIG, lacking)))
    one_line(error, Path("mine.yaml"), "demonstration 2")


# ---------------------------------------------------------------- writing


def test_a_chat_ends_with_the_user_s_turn() -> None:
    assert write_prompt(TEMPLATE, "chat", TOY.prompt_fields, TEMPLATE.demonstrations, ROW) == CHAT


def test_a_text_ends_with_the_answer_s_cue() -> None:
    assert write_prompt(TEMPLATE, "completion", TOY.prompt_fields, TEMPLATE.demonstrations, ROW) == COMPLETION


def test_a_prompt_of_nothing_but_the_question() -> None:
    bare = PromptTemplate("  ", "{input}", "{label}")
    assert write_prompt(bare, "chat", TOY.prompt_fields, (), ROW) == (Message("user", "which of carp , saw ?"),)
    assert write_prompt(bare, "completion", TOY.prompt_fields, (), ROW) == "which of carp , saw ?\n"


def test_demonstrations_are_shown_in_their_order_and_only_those_given() -> None:
    written = write_prompt(TEMPLATE, "chat", TOY.prompt_fields, (FIG,), ROW)
    assert written == (CHAT[0], *CHAT[3:])
    turned = write_prompt(TEMPLATE, "chat", TOY.prompt_fields, (FIG, OAK), ROW)
    assert turned == (CHAT[0], *CHAT[3:5], *CHAT[1:3], CHAT[5])


@pytest.mark.parametrize("layout", ["chat", "completion"])
def test_the_row_s_own_answer_is_not_shown(layout: Layout) -> None:
    hidden = replace(ROW, label="HIDDEN", outputs=(TeacherOutput("HIDDEN", "HIDDEN"),))
    written = write_prompt(TEMPLATE, layout, TOY.prompt_fields, TEMPLATE.demonstrations, hidden)
    assert written == write_prompt(TEMPLATE, layout, TOY.prompt_fields, TEMPLATE.demonstrations, ROW)


def test_texts_are_put_in_as_they_are() -> None:
    odd = replace(ROW, input="{label} {{x}} %s", choices=None, outputs=(TeacherOutput(" {input} "),), label=" {y} ")
    assert write_prompt(PromptTemplate("", "{{{input}}}", "x"), "completion", TOY.prompt_fields, (), odd) == (
        "{{label} {{x}} %s}\n"
    )
    assert written_answer(TEMPLATE, TOY.prompt_fields, odd) == "{input} So the answer is {y}."


def test_a_field_that_is_not_offered_is_said_without_a_file_too() -> None:
    for question in ("{premise}", "{"):
        with pytest.raises(UserError, match=r"^prompt: question[: ]"):
            write_prompt(replace(TEMPLATE, question=question), "chat", TOY.prompt_fields, (), ROW)


# ---------------------------------------------------------------- the hash


def test_a_hash_is_of_the_content_alone(tmp_path: Path) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text(FILE, encoding="utf-8")
    other.write_text("# of another spelling\n" + yaml.safe_dump(yaml.safe_load(FILE), width=30), encoding="utf-8")
    assert load_prompt(one).hash == load_prompt(other).hash == TEMPLATE.hash
    assert re.fullmatch("[0-9a-f]{12}", TEMPLATE.hash)
    # what a demonstration is called, or was said of by a teacher, is not shown
    named = replace(OAK, id="r1", outputs=(TeacherOutput(OAK.rationale, "crow"),))
    assert replace(TEMPLATE, demonstrations=(named, FIG)).hash == TEMPLATE.hash


def test_a_hash_changes_with_anything() -> None:
    changes: list[dict[str, Any]] = [
        {"instruction": "Find it."},
        {"question": "{input}"},
        {"answer": "{rationale} So the answer is {label} ."},
        {"question_cue": "Q:"},
        {"answer_cue": "A:"},
        {"stop": ("\nQ:", "\nA:")},
        {"stop": ()},
        {"demonstrations": ()},
        {"demonstrations": (FIG, OAK)},
        {"demonstrations": (OAK,)},
    ]
    assert {name for change in changes for name in change} == set(PromptTemplate.__dataclass_fields__)
    others: list[dict[str, Any]] = [{"input": "oáks"}, {"label": "oáks"}, {"outputs": (TeacherOutput("oáks"),)}]
    others += [{"choices": ("oak", "owl", "crow")}, {"choices": None}]
    changes += [{"demonstrations": (replace(OAK, **other), FIG)} for other in others]
    hashes = {replace(TEMPLATE, **change).hash for change in changes} | {TEMPLATE.hash}
    assert len(hashes) == len(changes) + 1


# ---------------------------------------------------------------- demonstrations of a file of examples


def test_demonstrations_are_read_from_examples(tmp_path: Path) -> None:
    path = tmp_path / "shown.jsonl"
    write_rows(path, [replace(OAK, id="r1", outputs=(TeacherOutput(OAK.rationale, "crow"),)), replace(FIG, id="r2")])
    assert load_demonstrations(path) == load_demonstrations(str(path)) == (OAK, FIG)


@pytest.mark.parametrize("lacking", [{"outputs": ()}, {"label": None}, {"outputs": (TeacherOutput(""),)}])
def test_examples_to_show_have_rationale_and_label(lacking: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "shown.jsonl"
    write_rows(path, [replace(OAK, id="r1"), replace(FIG, id="r2", **lacking)])
    with pytest.raises(UserError, match=r"shown\.jsonl:2: (rationale|label): .*should") as error:
        load_demonstrations(path)
    one_line(error, path, ":2:")


def test_a_file_without_examples_is_said(tmp_path: Path) -> None:
    path = tmp_path / "shown.jsonl"
    with pytest.raises(UserError, match="cannot be read") as error:
        load_demonstrations(path)
    one_line(error, path, "cannot be read")
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="is empty") as error:
        load_demonstrations(path)
    one_line(error, path, "is empty")
    path.write_text('{"id": "r1"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"shown\.jsonl:1: input: "):
        load_demonstrations(path)
