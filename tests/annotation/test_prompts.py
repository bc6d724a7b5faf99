"""Prompt files, their checks, and how a question is written of them."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_distill.annotation.plan import Plan
from lit_distill.annotation.prompts import (
    Demonstration,
    PromptTemplate,
    check_template,
    fixed,
    load_demonstrations,
    load_prompt,
    written_answer,
)
from lit_distill.data import ToyDataModule
from lit_distill.data.styles import parse_program
from lit_distill.errors import UserError
from lit_distill.questions import Layout, Message, Prompt
from lit_distill.tasks import Row, TeacherOutput
from tests.rows import make_row
from tests.runs import write_lines

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

OAK = Demonstration(
    input="which of owl , oak , crow ?",
    label="oak",
    choices=("owl", "oak", "crow"),
    rationale="An oak is a tree. The others are birds.",
)
FIG = Demonstration(input="which of tin , fig ?", label="fig", rationale="A fig is no metal.")
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


def changed(**values: Any) -> PromptTemplate:
    return TEMPLATE.model_copy(update=values)


def written(layout: Layout, template: PromptTemplate = TEMPLATE, row: Row = ROW) -> Prompt:
    return Plan(template, fixed(template.demonstrations), TOY.prompt_fields, layout).prompt(row)


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


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE, encoding="utf-8")
    assert load_prompt(path) == load_prompt(str(path)) == TEMPLATE


def test_question_and_answer_are_enough(write_file: WritePrompt) -> None:
    path = write_file(instruction=None, question_cue=None, answer_cue=None, stop=None, demonstrations=None)
    template = load_prompt(path)
    assert template == PromptTemplate(question=TEMPLATE.question, answer=TEMPLATE.answer)


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
        (b"", "Input should be a valid dictionary or instance of PromptTemplate, got None"),
        (b"- version: 1", "Input should be a valid dictionary"),
        (b"question: [\nanswer: {", "not YAML"),
        (b"question: \xff", "not YAML"),
        (b"question: \x07", "not YAML"),
    ],
)
def test_what_is_no_prompt_is_said(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        load_prompt(path)
    one_line(error, path, says)


def check(template: PromptTemplate) -> None:
    check_template(template, TOY.prompt_fields, TOY.parse_teacher, "mine.yaml")


def test_a_good_template_passes() -> None:
    check(TEMPLATE)
    check(changed(demonstrations=()))


@pytest.mark.parametrize("shown", [(), (OAK,)])
@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"question": "{premise}"}, "question", "asks for {premise}, and there are {input}, {choices}, {options}"),
        ({"question": "{input.label}"}, "question", "asks for {input.label}, and there are {input}"),
        ({"question": "{}"}, "question", "asks for {}, and there are {input}"),
        ({"question": "{rationale}"}, "question", "asks for {rationale}, and there are {input}, {choices}, {options}"),
        ({"question": "{input"}, "question: ", "expected '}'"),
        (
            {"answer": "{letter}"},
            "answer",
            "asks for {letter}, and there are {input}, {choices}, {options}, {wrong}, {given_r",
        ),
        ({"answer": "{rationale} }"}, "answer: ", "Single '}'"),
        ({"question": "{input:>2000000000}"}, "question: ", "{input} must stand without ':' and '!'"),
        ({"question": "{input:{label}}"}, "question: ", "{input} must stand without ':' and '!'"),
        ({"answer": "{rationale} {label!r}"}, "answer: ", "{label} must stand without ':' and '!'"),
        ({"question": "{input.__class__}"}, "question", "asks for {input.__class__}, and there are {input}"),
        ({"reads": "verdict"}, "question", "a verdict needs {given_rationale} or {given_label} to judge"),
        ({"question": "{input[0]}"}, "question", "asks for {input[0]}, and there are {input}"),
    ],
)
def test_templates_ask_for_what_the_dataset_offers(
    changes: dict[str, Any], key: str, says: str, shown: tuple[Demonstration, ...]
) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as error:
        check(changed(demonstrations=shown, **changes))
    one_line(error, Path("mine.yaml"), f"mine.yaml: {key}")


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("{rationale}\nThe answer is {label}", OAK),
        ("So the answer is {label}. {rationale}", OAK),
        ("{rationale} So the answer is {label}. Done", OAK),
        (TEMPLATE.answer, OAK.model_copy(update={"label": "oak.\nOr not"})),
    ],
)
def test_a_demonstration_that_is_not_read_back_is_named(answer: str, shown: Demonstration) -> None:
    with pytest.raises(UserError, match="is read by the dataset as") as error:
        check(changed(answer=answer, demonstrations=(shown,)))
    one_line(error, Path("mine.yaml"), "the answer of demonstration 1")


def test_a_chat_ends_with_the_user_s_turn() -> None:
    assert written("chat") == CHAT


def test_a_text_ends_with_the_answer_s_cue() -> None:
    assert written("completion") == COMPLETION


def test_a_prompt_of_nothing_but_the_question() -> None:
    bare = PromptTemplate(instruction="  ", question="{input}", answer="{label}")
    assert written("chat", bare) == (Message("user", "which of carp , saw ?"),)
    assert written("completion", bare) == "which of carp , saw ?\n"


def test_demonstrations_are_shown_in_their_order() -> None:
    assert written("chat", changed(demonstrations=(FIG, OAK))) == (CHAT[0], *CHAT[3:5], *CHAT[1:3], CHAT[5])


@pytest.mark.parametrize("layout", ["chat", "completion"])
def test_the_row_s_own_answer_is_not_shown(layout: Layout) -> None:
    hidden = replace(ROW, label="HIDDEN", outputs=(TeacherOutput("HIDDEN", "HIDDEN"),))
    assert written(layout, row=hidden) == written(layout)


def test_texts_are_put_in_as_they_are() -> None:
    odd = replace(ROW, input="{label} {{x}} %s", choices=None)
    assert written("completion", PromptTemplate(question="{{{input}}}", answer="x"), odd) == "{{label} {{x}} %s}\n"
    shown = Demonstration(input="x", rationale=" {input} ", label=" {y} ")
    assert written_answer(TEMPLATE, TOY.prompt_fields, shown) == "{input} So the answer is {y}."


def test_a_hash_is_of_the_content_alone(tmp_path: Path) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text(FILE, encoding="utf-8")
    other.write_text("# of another spelling\n" + yaml.safe_dump(yaml.safe_load(FILE), width=30), encoding="utf-8")
    assert load_prompt(one).hash == load_prompt(other).hash == TEMPLATE.hash
    assert re.fullmatch("[0-9a-f]{12}", TEMPLATE.hash)
    # annotations of earlier versions name it
    assert TEMPLATE.hash == "9b7ccc00b680"


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
        {"reads": "program"},
        {"reads": "verdict"},
    ]
    assert {name for change in changes for name in change} == PromptTemplate.model_fields.keys() - {"version"}
    others: list[dict[str, Any]] = [{"input": "oáks"}, {"label": "oáks"}, {"rationale": "oáks"}]
    others += [{"given_rationale": "oáks"}, {"given_label": "oák"}]
    others += [{"choices": ("oak", "owl", "crow")}, {"choices": None}]
    changes += [{"demonstrations": (OAK.model_copy(update=other), FIG)} for other in others]
    hashes = {changed(**change).hash for change in changes} | {TEMPLATE.hash}
    assert len(hashes) == len(changes) + 1


BOXES = Demonstration(input="two boxes of 3", rationale="a = 2 * 3\nanswer = a", label="6")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"rationale": "a = 2 * 3; answer = a"}, None),
        ({"label": "7"}, "is read by the dataset as ('a = 2 * 3; answer = a', '6')"),
        ({"rationale": "print(6)"}, "is read by the dataset as 'statement 1 has no value: print(6)'"),
    ],
)
def test_a_demonstrated_program_runs(change: dict[str, str], says: str | None) -> None:
    shown = BOXES.model_copy(update=change)
    template = PromptTemplate(question="{input}", answer="{rationale}", reads="program", demonstrations=(shown,))
    if says is None:
        return check_template(template, TOY.prompt_fields, parse_program, "mine.yaml")
    with pytest.raises(UserError, match=re.escape(says)):
        check_template(template, TOY.prompt_fields, parse_program, "mine.yaml")


SHOWN = [
    {"id": "r1", "teacher_label": "crow", **OAK.model_dump(mode="json")},
    {"id": "r2", **FIG.model_dump(mode="json", exclude_none=True)},
]


def test_demonstrations_are_read_from_rows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "shown.jsonl", SHOWN)
    assert load_demonstrations(path) == load_demonstrations(str(path)) == (OAK, FIG)


@pytest.mark.parametrize("key", ["input", "rationale", "label"])
@pytest.mark.parametrize("value", [None, "", 3])
def test_demonstrations_have_rationale_and_label(key: str, value: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "shown.jsonl", [SHOWN[0], SHOWN[1] | {key: value}])
    with pytest.raises(UserError, match=rf"shown\.jsonl:2: {key}: .*should") as error:
        load_demonstrations(path)
    one_line(error, path, ":2:")


def test_a_file_without_demonstrations_is_said(tmp_path: Path) -> None:
    path = tmp_path / "shown.jsonl"
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="is empty") as error:
        load_demonstrations(path)
    one_line(error, path, "is empty")
