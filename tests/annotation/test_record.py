"""One sample of a teacher: its line, its columns, and what many of them vote for."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_distill.annotation.record import (
    COLUMNS,
    Agree,
    Annotation,
    answer_schema,
    contains_label,
    digest,
    from_row,
    parse_structured,
    read_text,
    said,
    to_line,
    vote,
    with_distinct,
)
from lit_distill.data import SVAMPDataModule, ToyDataModule
from lit_distill.errors import UserError
from lit_distill.tasks import Row

FULL = Annotation(
    id="q7",
    split="train",
    sample=3,
    teacher="gpt-4o",
    kind="program",
    given_rationale="Birds swim.",
    given_label="no",
    text="Birds fly. So the answer is yes.",
    rationale="Birds fly.",
    label="yes",
    error="once timed out",
    parsed=True,
    agrees=False,
    contains_label=False,
    length=2,
    logprob=-0.125,
    votes=4,
    majority_label="no",
    vote_share=0.75,
    in_majority=False,
    distinct=True,
    finish="stop",
    input_tokens=310,
    output_tokens=12,
    cost=0.000125,
    structured=True,
    prompt="0123456789ab",
    settings="ba9876543210",
    input="001122334455",
    key="00112233445566778899aabbccddeeff",
)
ODD_TEXTS = (
    "",
    "two\nlines\r\nand\rmore",
    "\u2028 \u2029 \x85 \x0b \x0c \x1c \x00",  # what `str.splitlines` takes for an end of a line
    '"quoted" \\ud800 \\n {"id": "x"}',
    "tschüß, 你好, 🦉",
)


def exactly(label: str, other: str) -> bool:
    return label == other


@pytest.mark.parametrize(
    ("labels", "winner", "share"),
    [
        (["a"], "a", 1.0),
        (["a", "b", "b"], "b", 2 / 3),
        (["b", "a", "a", "b"], "b", 1 / 2),  # as many: the one that was written first
        (["c", "a", "b"], "c", 1 / 3),
        ([None, "b", None, "a"], "b", 1 / 4),  # what did not parse counts against all
        (["a", None, None], "a", 1 / 3),
        ([None, None], None, 0.0),
        ([], None, 0.0),
    ],
)
def test_votes(labels: Sequence[str | None], winner: str | None, share: float) -> None:
    assert vote(labels, exactly) == (winner, share)


SVAMP = SVAMPDataModule()


@pytest.mark.parametrize(
    ("labels", "winner", "share"),
    [
        (["(7 + 1)", "(84 / 2)", "(42)"], "(84 / 2)", 2 / 3),  # by value, as it was first written
        (["(42)", "(7 + 1)", "(8)", "(21 * 2)"], "(42)", 2 / 4),
        (["(x)", "(8)", "(x)"], "(x)", 2 / 3),  # without a value it is still the same text
        (["(x)", "(y)", "(8)", "(4 + 4)", None], "(8)", 2 / 5),
        (["(8)", "(3) and (8)"], "(8)", 1.0),  # several are worth what Python's `and` gives
        (["(3) and (8)", "(8)"], "(3) and (8)", 1.0),
    ],
)
def test_equations_vote_by_value(labels: Sequence[str | None], winner: str, share: float) -> None:
    assert vote(labels, SVAMP.teacher_agrees) == (winner, share)


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1))
def test_votes_as_counted_plainly(labels: list[str | None]) -> None:
    winner, share = vote(labels, exactly)
    most = max((labels.count(label) for label in labels if label is not None), default=0)
    frequent = [label for label in labels if label is not None and labels.count(label) == most]
    assert (winner, share) == (frequent[0] if frequent else None, most / len(labels))


@pytest.mark.parametrize(
    ("rationale", "label", "leaking"),
    [
        ("It must be an owl.", "owl", True),
        ("OWLS? An Owl!", "owl", True),
        ("Only owls fowl howl.", "owl", False),
        ("an owl_like thing", "owl", False),
        ("a night-owl", "owl", True),
        ("the owl", " owl ", True),
        ("a math problem, surely", "math problem", True),
        ("a math  problem", "math problem", False),
        ("Half of it is 84 / 2, so (84 / 2).", "(84 / 2)", True),
        ("Half of it is 84 / 2.", "(84 / 2)", False),
        ("It costs $4.50 today.", "$4.50", True),
        ("It costs $4x50 today.", "$4.50", False),
        ("He writes C++.", "c++", True),
        ("He writes C.", "c++", False),
        ("Ärger", "ärger", True),
        ("", "owl", False),
    ],
)
def test_leaks(rationale: str, label: str, leaking: bool) -> None:
    assert contains_label(rationale, label) is leaking


def test_a_label_as_long_as_an_answer_is_looked_for_in_linear_time() -> None:
    before = time.process_time()
    assert not contains_label("a " * 100_000, "a " * 50_000 + "b")
    assert contains_label("a " * 100_000 + "b.", "a " * 50_000 + "b")
    assert time.process_time() - before < 3


TOY = ToyDataModule()
ROW = Row("q7", "do birds fly ?", "yes", ("yes", "no"))
NOT_READ = {"parsed": False, "rationale": None, "label": None, "contains_label": None, "length": None}


def read(text: str | None, gold: str | None = "yes", agree: Agree = exactly, **columns: Any) -> dict[str, Any]:
    """The columns that are not as they would be by default."""
    found = read_text(Annotation("q7", text=text, **columns), replace(ROW, label=gold), TOY.parse_teacher, agree)
    return {name: value for name, value in asdict(found).items() if name not in ("id", "text")}


def but(**columns: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(Annotation("q7")).items() if name not in ("id", "text")} | columns


def test_a_text_that_parses() -> None:
    said = {"parsed": True, "rationale": "Birds do, oh yes.", "label": "yes", "length": 4}
    text = " Birds do, oh yes.  So the answer is yes. "
    assert read(text) == but(**said, agrees=True, contains_label=True)
    assert read(text, "no") == but(**said, agrees=False, contains_label=True)
    assert read(text, None) == but(**said, agrees=None, contains_label=True)
    assert read("Birds do. So the answer is yes.")["contains_label"] is False


def test_agreement_is_the_dataset_s() -> None:
    said = read("So. So the answer is (84 / 2).", "( 42.0 )", SVAMP.teacher_agrees)
    assert (said["label"], said["agrees"]) == ("(84 / 2)", True)


@pytest.mark.parametrize("text", ["", "Birds fly.", "So the answer is yes.", "Birds. So the answer is"])
def test_a_text_that_does_not_parse_is_wrong(text: str) -> None:
    assert read(text) == but(**NOT_READ, agrees=False)
    assert read(text, None) == but(**NOT_READ, agrees=None)


def test_what_was_read_otherwise_before_is_read_anew() -> None:
    old: dict[str, Any] = {
        "rationale": "Old.",
        "label": "old",
        "parsed": True,
        "agrees": True,
        "contains_label": True,
        "length": 9,
    }
    assert read("Nothing.", **old) == but(**NOT_READ, agrees=False)
    assert read("New one. So the answer is yes.", **old) == but(
        rationale="New one.", label="yes", parsed=True, agrees=True, contains_label=False, length=2
    )


def test_a_structured_text_is_read_as_json_alone() -> None:
    text = json.dumps({"rationale": "Birds do.", "label": "yes"})
    said = {"parsed": True, "rationale": "Birds do.", "label": "yes", "length": 2, "contains_label": False}
    assert read(text, structured=True) == but(structured=True, **said, agrees=True)
    assert read(text) == but(**NOT_READ, agrees=False)
    written = "Birds do. So the answer is yes."
    assert read(written, structured=True) == but(structured=True, **NOT_READ, agrees=False)


def test_an_error_is_left_as_it_is() -> None:
    failed = replace(FULL, text=None)
    assert read_text(failed, ROW, TOY.parse_teacher, exactly) is failed


def test_every_column_survives_its_line() -> None:
    assert all(value is not None for value in asdict(FULL).values())
    assert list(asdict(FULL)) == list(COLUMNS)
    assert all(getattr(FULL, name) != getattr(Annotation("x"), name) for name in COLUMNS)
    assert from_row(json.loads(to_line(FULL)), "f:1") == FULL
    assert from_row(json.loads(to_line(Annotation("q"))), "f:1") == Annotation("q")


@pytest.mark.parametrize("odd", ODD_TEXTS)
def test_a_sample_is_one_line_whatever_its_texts(odd: str) -> None:
    sample = replace(FULL, id=odd, text=odd, rationale=odd, label=odd, error=odd, teacher=odd)
    line = to_line(sample)
    assert (line.count(b"\n"), line[-1:]) == (1, b"\n")
    assert from_row(json.loads(line.decode("utf-8")), "f:1") == sample


@given(st.text(st.characters(exclude_categories=())), st.floats(allow_nan=False, allow_infinity=False))
def test_any_text_and_number_survive(text: str, number: float) -> None:
    # two halves of a pair that stand side by side are its character, half of one is none
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    sample = Annotation("q", text=whole, logprob=number)
    line = to_line(sample)
    assert line.count(b"\n") == 1
    assert from_row(json.loads(line.decode("utf-8")), "f:1") == sample


def test_other_keys_are_left_aside_and_absent_ones_are_not_known() -> None:
    row = {"id": "q", "score": [1], "text": None, "sample": None, "structured": None}
    assert from_row(row, "f:1") == Annotation("q")


@pytest.mark.parametrize("row", [{}, {"id": None, "text": "x"}])
def test_a_row_needs_an_id(row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^f:1: not a sample: id: "):
        from_row(row, "f:1")


KINDS = {
    **dict.fromkeys(("sample", "length", "votes", "input_tokens", "output_tokens"), "int"),
    **dict.fromkeys(("logprob", "vote_share", "cost"), "float"),
    **dict.fromkeys(("parsed", "agrees", "contains_label", "in_majority", "distinct", "structured"), "bool"),
}
WRONG: dict[str, list[Any]] = {
    "str": [3, True, ["x"]],
    "int": ["many", 3.5],
    "float": ["much", [0.5]],
    "bool": ["perhaps", 3, [True]],
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_value_of_another_type_is_named(name: str) -> None:
    for wrong in WRONG[KINDS.get(name, "str")]:
        with pytest.raises(UserError, match=f"^f:1: not a sample: {name}: Input should be a valid "):
            from_row({"id": "q", name: wrong}, "f:1")


def test_a_whole_number_is_a_number() -> None:
    row = {"id": "q", "cost": 0, "logprob": -1, "votes": math.nan}
    assert from_row(row, "f:1") == Annotation("q", cost=0, logprob=-1)


@pytest.mark.parametrize(
    ("parts", "hashed"),
    [
        # printf '["a", 1, null, ["é"]]' | sha256sum, and so on
        (("a", 1, None, ["é"]), "1c24dc987cd29a13"),
        (({"b": 0.5, "a": 1},), "5b7d9da51b630e73"),
        ((), "4f53cda18c2baa0c"),
        (("\ud800",), "335ffac769e5b3ce"),
    ],
)
def test_a_hash_stays(parts: tuple[Any, ...], hashed: str) -> None:
    assert digest(*parts, length=16) == hashed
    assert digest(*parts) == hashed[:12]


def test_different_parts_have_different_hashes() -> None:
    parts: list[tuple[Any, ...]] = [
        (),
        ("",),
        ("a", "b"),
        ("ab",),
        ("a", "b", None),
        ("b", "a"),
        (["a", "b"],),
        ('a", "b',),
        (1,),
        ("1",),
        (1.5,),
        (True,),
        ({"a": 1},),
        ({"a": 2},),
    ]
    assert len({digest(*each) for each in parts}) == len(parts)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ('{"rationale": "So.", "label": "yes"}', ("So.", "yes")),
        (' {"label": " yes ", "rationale": "\\n So. "}\n', ("So.", "yes")),
        ('{"rationale": "So.", "label": "yes", "score": 3}', ("So.", "yes")),
        ('{"rationale": "\\ud83d", "label": "yes"}', None),
        ('{"rationale": " ", "label": "yes"}', None),
        ('{"rationale": "So.", "label": ""}', None),
        ('{"rationale": "So."}', None),
        ('{"rationale": "So.", "label": null}', None),
        ('{"rationale": "So.", "label": 3}', None),
        ('{"rationale": ["So."], "label": "yes"}', None),
        ('{"rationale": "So.", "label": "ye', None),  # cut at max_new_tokens
        ('Sure: {"rationale": "So.", "label": "yes"}', None),
        ('[{"rationale": "So.", "label": "yes"}]', None),
        ('"rationale label"', None),
        ("NaN", None),
        ("null", None),
        ("", None),
        ("9" * 5000, None),
        ('{"rationale": ' * 5 + "1" + "}" * 5, None),
    ],
)
def test_structured_answers(text: str, read: tuple[str, str] | None) -> None:
    assert parse_structured(text) == read


@pytest.mark.parametrize("text", ["[" * 100_000, '{"rationale":' * 100_000])
def test_a_teacher_that_stutters_brackets_is_not_read(text: str) -> None:
    assert parse_structured(text) is None


@pytest.mark.parametrize(
    ("answer", "open_set", "closed_set"),
    [
        ({"rationale": "So.", "label": "yes"}, True, True),
        ({"rationale": "So.", "label": "maybe"}, True, False),
        ({"rationale": "So."}, False, False),
        ({"label": "yes"}, False, False),
        ({"rationale": 3, "label": "yes"}, False, False),
        ({"rationale": "So.", "label": None}, False, False),
        ({"rationale": "So.", "label": "yes", "score": 1}, False, False),
        (["So.", "yes"], False, False),
    ],
)
def test_the_schema_of_an_answer(answer: Any, open_set: bool, closed_set: bool) -> None:
    for choices, valid in (((), open_set), (("yes", "no"), closed_set)):
        schema = answer_schema(choices)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert jsonschema.Draft202012Validator(schema).is_valid(answer) is valid


def test_a_schema_asks_for_the_rationale_first() -> None:
    # a label that is written before its rationale does not follow from it
    assert list(answer_schema(["b", "a"])["properties"]) == ["rationale", "label"]
    assert answer_schema(["b", "a"])["properties"]["label"]["enum"] == ["b", "a"]


@pytest.mark.parametrize(
    ("name", "wrong", "allowed"),
    [
        ("vote_share", 7.0, "less than or equal to 1"),
        ("votes", -3, "greater than or equal to 0"),
        ("sample", -1, "greater than or equal to 0"),
        ("input_tokens", 10**30, "less than"),
        ("cost", math.inf, "a finite number"),
        ("logprob", -math.inf, "a finite number"),
    ],
)
def test_a_number_that_no_sample_has_is_refused(name: str, wrong: float, allowed: str) -> None:
    with pytest.raises(UserError, match=f": {name}: Input should be {allowed}"):
        from_row({"id": "q", name: wrong}, "f:1")


@pytest.mark.parametrize(
    ("rationale", "same"),
    [
        ("He has 63 - 27 = 36 left.", "63-27=36"),
        ("(1) 9 * 12 = 108 atlases. Then 108 - 15 = 93.", "(1)9*12=108|108-15=93"),
        ("So 1,200 + 30 = $1,230.", "1200+30=1230"),
        ("The sum is: .5 * 3 = 1.5", "5*3=1.5"),
        ("a = 3 * 4; left = a - 5", "a = 3 * 4 left = a - 5"),
        ("x = y and 3 = 3 = three", "x = y and 3 = 3 = three"),
        ("7 * 36 is 252", "7 * 36 is 252"),
        ("Birds  FLY, don't they?\n", "birds fly don t they"),
        ("= = 5 = 6", "= = 5 = 6"),
        ("", ""),
    ],
)
def test_what_a_rationale_says(rationale: str, same: str) -> None:
    assert said(rationale) == same


@pytest.mark.parametrize("text", ["1+" * 200_000, "=" * 200_000, "1 + 1 = " * 50_000, "(" * 200_000 + "=1"])
def test_what_is_said_is_found_in_linear_time(text: str) -> None:
    # the square of the length would take minutes
    began = time.process_time()
    said(text)
    assert time.process_time() - began < 10


def test_samples_that_say_the_same_are_not_distinct() -> None:
    of_a_row = [
        # teacher, kind, rationale, label, whether it is distinct
        ("T", "rationale", "Take 27 away: 63 - 27 = 36.", "(63 + 27)", True),
        ("T", "rationale", "63-27 = 36 are left.", "(63 - 27)", True),  # an earlier one has another answer
        ("T", "rationale", "There are 63 - 27 = 36 of them.", "( 63.0 - 27.0 )", False),
        ("T", "rationale", "63 - 20 = 43, and 43 - 7 = 36.", "(63 - 27)", True),
        ("T", "rationale", None, None, None),
        ("U", "rationale", "63 - 27 = 36 stay.", "(63 - 27)", True),  # another teacher
        ("T", "program", "a = 63 - 27", "36", True),  # another kind
        ("T", "program", "A = 63 - 27;", "36", False),
        ("T", "program", "a = 63 + 27", "90", True),
        ("T", "rationale", "Most stay.", "(63 - 27)", True),
        ("T", "rationale", "most stay", "(36)", False),
    ]
    samples = [
        Annotation("q", teacher=teacher, kind=kind, rationale=rationale, label=label)
        for teacher, kind, rationale, label, _ in of_a_row
    ]
    marked = with_distinct(samples, SVAMP.teacher_agrees)
    assert [one.distinct for one in marked] == [expected for *_, expected in of_a_row]
    assert [replace(one, distinct=None) for one in marked] == samples
