"""The teacher's text: shapes that PaLM really wrote (retold here), and mutations of them."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_distill.data import ANLIDataModule, CQADataModule, ESNLIDataModule, RationaleDataModule, SVAMPDataModule
from lit_distill.errors import UserError

CQA, SVAMP, ESNLI, ANLI = CQADataModule(), SVAMPDataModule(), ESNLIDataModule(), ANLIDataModule()

CQA_TEXT = (
    "The answer must be a place to swim. Of the above choices, only pools are for swimming. So the answer is (d) the"
    " pool.\n\nQ: What is the best way to get to the airport?\nAnswer Choices:\n(a) taxi\n(b) bus\nA: The answer must"
    " be a way to travel. So the answer is (b) bus."
)
SVAMP_TEXT = (
    "She had 12 apples and 3 baskets. 12 / 3 = 4. The answer is (12 / 3).\n\nQ: There are 15 trees.\nA: There are 15"
    " trees. The answer is (15 + 6)."
)
ESNLI_TEXT = (
    "A dog is an animal.\nAnswer: entailment\n\nPremise: A dog runs.\nHypothesis: It sleeps.\nReasonings: It cannot"
    " sleep.\nAnswer: contradiction"
)
ANLI_TEXT = (
    "The premise mentions that he was born in 1920. So the answer is contradiction.\n\nPremise: The 2016 season was"
    " the 127th.\nHypothesis: It was not.\nAnswer: The premise. So the answer is neutral."
)


@pytest.mark.parametrize(
    ("module", "text", "expected"),
    [
        (
            CQA,
            CQA_TEXT,
            ("The answer must be a place to swim. Of the above choices, only pools are for swimming.", "the pool"),
        ),
        # the text after the letter, with the letters that follow it; only one final stop goes
        (CQA, "Both fit. So the answer is either (a) lake or (e) pond.", ("Both fit.", "lake or (e) pond")),
        (CQA, "It is. So the answer is (c) Washington D.C..", ("It is.", "Washington D.C.")),
        (CQA, "It is. So the answer is (c) pond", ("It is.", "pond")),
        (CQA, "Many do. So the answer is one of these four.\n\nQ: What?\n(a) x", None),
        (CQA, "It is (a) pond.", None),
        (CQA, "So the answer is (a) pond.", None),
        (CQA, "It is. So the answer is (a) .", None),
        (SVAMP, SVAMP_TEXT, ("She had 12 apples and 3 baskets. 12 / 3 = 4.", "(12 / 3)")),
        (SVAMP, "So. The answer is (10 - (3 + 6)).", ("So.", "(10 - (3 + 6))")),
        (SVAMP, "So. The answer is (19 - 6) + (18 - 15).", ("So.", "(19 - 6) + (18 - 15)")),
        (SVAMP, "So. The answer is 12.", None),
        (SVAMP, "So. The answer is (12 / 3", None),
        (SVAMP, "So. The answer is ( ).", None),
        (SVAMP, "The answer is (12 / 3).", None),
        (SVAMP, "11 / 3 = 3.333333333333", None),
        (ESNLI, ESNLI_TEXT, ("A dog is an animal.", "entailment")),
        # cut off by the teacher's length limit, inside the next demonstration or before it
        (ESNLI, "A dog runs.\nAnswer: neutral\n\nPre", ("A dog runs.", "neutral\n\nPre")),
        (ESNLI, "A dog is not asleep.\nAnswer:", None),
        (ESNLI, "A dog is not asleep.\nAnswer: ", None),
        (ESNLI, "A toddler is a child. A child is a person. A person", None),
        (ESNLI, "\nAnswer: neutral", None),
        (ANLI, ANLI_TEXT, ("The premise mentions that he was born in 1920.", "contradiction")),
        (ANLI, "It was 1995, so the answer is contradiction.\n\nPremise: x. So the answer is neutral.", None),
        (ANLI, "The answer is contradiction.", None),
        (ANLI, "", None),
    ],
)
def test_real_shapes(module: RationaleDataModule, text: str, expected: tuple[str, str] | None) -> None:
    assert module.parse_teacher(text) == expected


PIECES = st.sampled_from(
    [
        "So the answer is",
        "The answer is",
        "Answer: ",
        "Premise",
        "Q:",
        "(a)",
        "(12 / 3)",
        "(",
        ")",
        ".",
        " ",
        "\n",
        "neutral",
        "é",
        "",
    ]
)


@st.composite
def mutated(draw: st.DrawFn, text: str) -> str:
    """Pieces put in, cut out and doubled at a few places."""
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 40)))
        text = text[:start] + draw(st.one_of(PIECES, st.text(max_size=8), st.just(text[start:end] * 2))) + text[end:]
    return text


def check(module: RationaleDataModule, text: str, cut: str, mark: str) -> None:
    parsed = module.parse_teacher(text)
    before = text.split(cut)[0]
    if parsed is None:
        return
    rationale, label = parsed
    assert rationale == rationale.strip() != ""
    assert label == label.strip() != ""
    assert cut not in rationale
    assert cut not in label
    assert mark not in rationale
    assert rationale in before
    assert label in before
    assert before.index(rationale) + len(rationale) <= before.index(mark)


@given(mutated(CQA_TEXT))
def test_cqa_mutations(text: str) -> None:
    check(CQA, text, "Q:", "So the answer is")


@given(mutated(SVAMP_TEXT))
def test_svamp_mutations(text: str) -> None:
    check(SVAMP, text, "Q:", "The answer is")
    parsed = SVAMP.parse_teacher(text)
    assert parsed is None or (parsed[1][0], parsed[1][-1]) == ("(", ")")


@given(mutated(ESNLI_TEXT))
def test_esnli_mutations(text: str) -> None:
    check(ESNLI, text, "Premise", "Answer: ")


@given(mutated(ANLI_TEXT))
def test_anli_mutations(text: str) -> None:
    check(ANLI, text, "Premise", "So the answer is")


@given(st.text())
def test_any_text_at_all(text: str) -> None:
    for module in (CQA, SVAMP, ESNLI, ANLI):
        module.parse_teacher(text)


@pytest.mark.parametrize(
    ("equation", "gold", "right"),
    [
        ("(84 / 2)", "( 84.0 / 2.0 )", True),
        ("(84 - 2)", "( 84.0 / 2.0 )", False),
        ("(2 + 1) and (7 - 4)", "( 7.0 - 4.0 )", True),
        ("((2 + 1) and (7 - 5))", "( 7.0 - 5.0 )", True),
        ("(7 - 5) and (2 + 1)", "( 7.0 - 5.0 )", False),
        ("(7 - 7)", "( 5.0 - 5.0 )", True),
        ("(some - 8)", "( 9.0 - 8.0 )", False),
        ("(14, 21)", "( 7.0 * 3.0 )", False),
    ],
)
def test_svamp_agreement_is_by_value(equation: str, gold: str, right: bool) -> None:
    assert SVAMP.teacher_agrees(equation, gold) is right


@given(st.text("()1 ", max_size=12))
def test_an_equation_reaches_from_the_first_bracket_to_the_last(answer: str) -> None:
    found = re.search(r"\(.*\)", answer)
    read = SVAMP.parse_teacher(f"So. The answer is {answer}")
    assert read == (("So.", found[0]) if found and found[0][1:-1].strip() else None)


@pytest.mark.parametrize("answer", ["(" * 500_000, ")" * 500_000 + "(", "(" * 250_000 + ")"])
def test_brackets_without_end_are_read_at_once(answer: str) -> None:
    began = time.monotonic()
    SVAMP.parse_teacher(f"So. The answer is {answer}")
    # a search from every bracket on takes minutes
    assert time.monotonic() - began < 5


def test_the_type_of_a_problem_is_its_group() -> None:
    row = {"input": "5 and 4?", "label": "( 5.0 + 4.0 )"}
    assert SVAMP.read_row(row).group is None
    assert SVAMP.read_row(row | {"Type": "Addition"}).group == "Addition"
    with pytest.raises(UserError, match="'Type' must be a string, got 3"):
        SVAMP.read_row(row | {"Type": 3})
