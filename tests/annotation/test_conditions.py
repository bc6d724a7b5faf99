"""Conditions on columns, as text."""

import operator
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_distill.annotation.conditions import columns_of, condition, is_condition
from lit_distill.errors import UserError

ROW: dict[str, Any] = {
    "agrees": True,
    "contains_label": False,
    "vote_share": 0.6,
    "votes": 5,
    "logprob": -1.5,
    "length": 0,
    "label": "yes",
    "majority_label": "1",
    "teacher": "gpt-4",
    "finish": "",
    "error": None,
}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("agrees", True),
        ("not agrees", False),
        ("contains_label", False),
        ("not contains_label", True),
        ("agrees and not contains_label", True),
        ("agrees and contains_label", False),
        ("agrees and vote_share >= 0.6 and not contains_label", True),
        ("agrees and vote_share > 0.6 and not contains_label", False),
        ("  agrees\n  and   not\tcontains_label ", True),
        ("agrees == true", True),
        ("agrees == yes", True),  # as YAML has it
        ("agrees == false", False),
        ("contains_label != true", True),
        ("vote_share>=0.6", True),
        ("vote_share <= .5", False),
        ("votes == 5", True),
        ("votes == 5.0", True),
        ("votes != 5", False),
        ("votes < 6", True),
        ("logprob > -2", True),
        ("logprob > -1", False),
        ("logprob >= -1.5e+0", True),
        ("length", False),  # zero words
        ("not length", True),
        ("finish", False),
        ("not finish", True),
        ("label", True),
        ("label == yes", True),
        ("label == 'yes'", True),
        ('label == "yes"', True),
        ("label == Yes", False),
        ("label != no", True),
        ("majority_label == 1", True),
        ("majority_label == 1.0", False),
        ("majority_label != 01", True),
        ("teacher == gpt-4", True),
        ("teacher == gpt-4o", False),
        ("teacher != gpt-4 and agrees", False),
    ],
)
def test_what_is_kept(text: str, kept: bool) -> None:
    assert is_condition(text)
    assert condition(text)(ROW) is kept


@pytest.mark.parametrize("held", [{"error": None}, {}])
@pytest.mark.parametrize("text", ["error", "not error", *(f"error {sign} 1" for sign in ("==", "!=", ">=", "<", ">"))])
def test_what_is_not_known_is_not_kept(text: str, held: dict[str, Any]) -> None:
    assert condition(text)(held) is False
    assert condition(f"agrees and {text}")(held | {"agrees": True}) is False
    assert condition("error == null")(held) is False
    assert condition("error != null")(held) is False


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("(84 / 2)", "label == (84 / 2)"),
        ("a: b", "label == a: b"),
        ("no", "label == no"),
        ("2024-05-06", "label == 2024-05-06"),
        ("2024-13-45", "label == 2024-13-45"),
        ("it's", "label == it's"),
        ("@cf/llama", "label == @cf/llama"),
        ("[x", "label == [x"),
        ("*", "label == *"),
    ],
)
def test_a_text_is_compared_with_the_text_that_stands_there(label: str, text: str) -> None:
    assert is_condition(text)
    assert condition(text)({"label": label}) is True
    assert condition(text)({"label": "other"}) is False


def test_a_quoted_text_may_hold_the_word_that_joins() -> None:
    text = "agrees and label == 'rock and roll'"
    assert is_condition(text)
    assert columns_of(text) == ["agrees", "label"]
    assert condition(text)({"agrees": True, "label": "rock and roll"}) is True
    assert condition(text)({"agrees": True, "label": "rock"}) is False


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("a and b", 'label == "a and b"'),
        ("a and b", "label == 'a and b' and agrees"),
        ("it's", "label == it's and teacher != bob's and agrees"),
        ("a", "label == a and teacher != 'x and y' and agrees"),
    ],
)
def test_conditions_are_split_outside_quotes(label: str, text: str) -> None:
    assert is_condition(text)
    row = {"label": label, "agrees": True, "teacher": "T"}
    assert condition(text)(row) is True
    assert condition(text)(row | {"label": "other"}) is False


SIGNS = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
NUMBERS = st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False)


@given(st.sampled_from(sorted(SIGNS)), NUMBERS, st.sampled_from([None, 1.0]) | NUMBERS, st.sampled_from(["", " "]))
def test_numbers_are_compared_as_python_does(sign: str, held: float, other: float | None, space: str) -> None:
    value = held if other is None else other  # the same one often enough
    text = f"cost{space}{sign}{space}{value!r}"
    assert condition(text)({"cost": held}) is SIGNS[sign](held, value)


@pytest.mark.parametrize("value", ["1e-5", "1E-5", "1e5", "+1e+05", "-2e3", "1.5e-07"])
def test_numbers_may_have_an_exponent(value: str) -> None:
    assert condition(f"cost == {value}")({"cost": float(value)}) is True
    assert condition(f"cost < {value}")({"cost": float(value) - 1}) is True


@pytest.mark.parametrize(
    "text",
    [
        "",
        "agrees and",
        "agrees or contains_label",
        "not not agrees",
        "not votes >= 3",
        "agrees ==",
        "== 3",
        "votes = 3",
        "votes => 3",
        "3 < votes",
        "(agrees)",
        "agrees, contains_label",
        "agrees and my.module.function",
    ],
)
def test_what_is_none_names_the_argument(text: str) -> None:
    with pytest.raises(
        UserError, match=r"^rationale_filter: a condition is a column, .* joined by 'and'; got "
    ) as error:
        condition(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["agrees and " * 20_000 + "agrees", "x" * 200_000, "agrees" + " " * 200_000, "a." * 100_000 + "a", "'" * 9_999],
)
def test_too_long_a_text_is_refused_unread(text: str) -> None:
    for read in (is_condition, condition, columns_of):
        with pytest.raises(UserError, match=r"^rationale_filter must have at most 2,000 characters, got [0-9,]+$"):
            read(text)


@pytest.mark.parametrize("value", ["[" * 1900, "{a: " * 450 + "b", "[1, 2]", "{a: 1}", "!!set {a}", "&a [b, *a]"])
def test_a_value_that_is_no_column_s_is_a_text(value: str) -> None:
    assert condition(f"label == {value}")({"label": value}) is True
    assert condition(f"label == {value}")({"label": "other"}) is False


@pytest.mark.parametrize(
    ("text", "row", "says"),
    [
        ("votes >= many", {"votes": 3}, "votes holds 3, which cannot be compared with 'many'"),
        ("agrees > x", {"agrees": True}, "agrees holds True, which cannot be compared with 'x'"),
        ("agrees != flase", {"agrees": True}, "agrees holds True, which cannot be compared with 'flase'"),
        ('agrees == "true"', {"agrees": True}, "agrees holds True, which cannot be compared with 'true'"),
        ("tags > 3", {"tags": ["a"]}, "tags holds ['a'], which cannot be compared with 3"),
    ],
)
def test_what_cannot_be_compared_is_said(text: str, row: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"rationale_filter: {says}")):
        condition(text)(row)


@pytest.mark.parametrize(
    "text",
    ["tests.data.test_base.never", "my.module.function", "a.b", "agrees.x and length", "C:\\x", "", "x-y"],
)
def test_an_import_path_is_no_condition(text: str) -> None:
    assert not is_condition(text)


def test_columns_are_named_in_order() -> None:
    assert columns_of("agrees and vote_share >= 0.6 and not contains_label and x_1 == y") == [
        "agrees",
        "vote_share",
        "contains_label",
        "x_1",
    ]
