"""How the answers of styles are read, and the wrong answers that are argued for."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lit_distill.annotation.record import Annotation
from lit_distill.data import ANLIDataModule, CQADataModule, JSONLDataModule, SVAMPDataModule
from lit_distill.data.styles import given_output, parse_program, parse_verdict, read_answer
from lit_distill.equations import ProgramError, evaluate
from lit_distill.tasks import Row, TeacherOutput


@pytest.mark.parametrize(
    ("text", "program", "value"),
    [
        ("a = 3\nanswer = a * 2", "a = 3; answer = a * 2", "6"),
        ("Here it is:\n```python\na = 3  # three\n\nanswer = a / 2\n```\nDone.", "a = 3; answer = a / 2", "1.5"),
        ("```\n7 - 2\n```", "7 - 2", "5"),
        ("```python\nanswer = 1", "answer = 1", "1"),
        (" answer = round(7 / 3, 1);", "answer = round(7 / 3, 1)", "2.3"),
    ],
)
def test_programs_are_run(text: str, program: str, value: str) -> None:
    assert parse_program(text) == (program, value)


@pytest.mark.parametrize("text", ["", "```python\n```", "It is 5.", "print(5)", "def f():\n  return 5", "a = 5 b = 6"])
def test_what_is_no_program_is_refused(text: str) -> None:
    with pytest.raises(ProgramError):
        parse_program(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("All is well. So the solution is correct.", ("All is well.", "correct")),
        ("So the solution is odd. So the solution is **Wrong** .\n", ("So the solution is odd.", "wrong")),
        ("No. So the solution is incorrect.", ("No.", "wrong")),
        ("So the solution is correct.", None),
        ("All is well. So the solution is correct, I think.", None),
        ("It is correct.", None),
        ("", None),
    ],
)
def test_verdicts(text: str, found: tuple[str, str] | None) -> None:
    assert parse_verdict(text) == found


def test_a_program_agrees_by_value_whatever_the_metric() -> None:
    answer = Annotation("r", text="a = 84 / 2")
    for data, gold, agrees in (
        (SVAMPDataModule(), "( 84.0 / 2.0 )", True),
        (SVAMPDataModule(), "( 84.0 - 2.0 )", False),
        (JSONLDataModule(train="none.jsonl"), "42.0", True),
        (JSONLDataModule(train="none.jsonl"), "forty-two", False),
        (JSONLDataModule(train="none.jsonl"), None, None),
    ):
        read = read_answer(answer, Row("r", "q", gold), "program", data)
        assert (read.label, read.agrees) == ("42", agrees)


def test_a_verdict_is_about_the_given_label() -> None:
    data, row = SVAMPDataModule(), Row("r", "q", "( 84.0 / 2.0 )")
    for given, verdict, agrees in (("(42)", "correct", True), ("(42)", "wrong", False), ("(43)", "wrong", True)):
        answer = Annotation("r", given_label=given, text=f"Well. So the solution is {verdict}.")
        read = read_answer(answer, row, "verdict", data)
        assert (read.rationale, read.label, read.agrees) == ("Well.", verdict, agrees)
        assert read_answer(answer, replace(row, label=None), "verdict", data).agrees is None


def test_the_answer_to_judge_is_the_first_whole_rationale() -> None:
    outputs = (
        TeacherOutput("a = 1", "1", kind="program"),
        TeacherOutput(None, "1"),
        TeacherOutput("Because.", None),
        TeacherOutput("So.", "1", "T"),
        TeacherOutput("Or.", "2"),
    )
    assert given_output(Row("r", "q", "1", None, outputs)) == (outputs[3],)
    assert given_output(Row("r", "q", "1", None, outputs[:3])) == ()


def test_a_wrong_label_is_another_choice() -> None:
    row = Row("r", "q", "b", ("a", "b", "c", "d", "e"))
    data = CQADataModule()
    found = [data.wrong_label(replace(row, id=f"r{number}")) for number in range(400)]
    counts = Counter(found)
    assert set(counts) == {"a", "c", "d", "e"}
    # about as often each: 100 with a standard deviation of 9
    assert all(60 < count < 140 for count in counts.values())
    assert found == [CQADataModule().wrong_label(replace(row, id=f"r{number}")) for number in range(400)]
    assert data.wrong_label(replace(row, label=None)) is None
    assert data.wrong_label(replace(row, choices=("b",))) is None
    assert ANLIDataModule().wrong_label(replace(row, label="neutral", choices=None)) in ("entailment", "contradiction")


@pytest.mark.parametrize(
    ("gold", "others"),
    [
        ("( 6.0 + 2.0 )", {"( 6.0 - 2.0 )", "( 6.0 * 2.0 )", "( 6.0 / 2.0 )"}),
        ("(2+2)", {"(2-2)", "(2/2)"}),  # 2 * 2 is 4, too
        ("( -3.0 - 4.0 )", {"( -3.0 + 4.0 )", "( -3.0 * 4.0 )", "( -3.0 / 4.0 )"}),
        ("5 - 0", {"5 * 0"}),  # 5 / 0 has no value
        ("7", set()),
        ("( 1.0e-5 )", set()),
    ],
)
def test_a_wrong_equation_has_another_operator_and_another_value(gold: str, others: set[str]) -> None:
    data = SVAMPDataModule()
    rows = [Row(f"r{number}", "q", gold) for number in range(60)]
    assert {wrong for row in rows if (wrong := data.wrong_label(row))} == others
    assert JSONLDataModule(train="none.jsonl").wrong_label(rows[0]) is None
    own = JSONLDataModule(train="none.jsonl", metric="equation")
    assert own.wrong_label(rows[0]) == data.wrong_label(rows[0])


def test_every_row_of_svamp_has_a_wrong_equation(shared_data: Path) -> None:
    data = SVAMPDataModule(data_dir=shared_data)
    for row in data.load_rows("train") or ():
        wrong = data.wrong_label(row)
        assert wrong is not None
        assert evaluate(wrong) is not None
        assert not data.teacher_agrees(wrong, row.label or "")
