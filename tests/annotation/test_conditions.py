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
        ("not contains_label", True),
        ("agrees and contains_label", False),
        ("agrees and vote_share >= 0.6 and not contains_label", True),
        ("agrees and vote_share > 0.6 and not contains_label", False),
        ("  agrees\n  and   not\tcontains_label ", True),
        ("contains_label or (votes > 4 and agrees)", True),
        ("contains_label or votes > 5", False),
        ("not (agrees and votes == 5)", False),
        ("not not agrees", True),
        ("not votes >= 6", True),
        ("agrees == true", True),
        ("agrees == false", False),
        ("contains_label != True", True),
        ("vote_share>=0.6", True),
        ("votes == 5.0", True),
        ("logprob > -2", True),
        ("logprob >= -1.5e+0", True),
        ("length", False),  # zero words
        ("not finish", True),
        ("label == yes", True),
        ("label == 'yes'", True),
        ("label == Yes", False),
        ("majority_label == 1", True),
        ("majority_label == 1.0", False),
        ("teacher == gpt-4", True),
        ("teacher == 'gpt-4o'", False),
    ],
)
def test_what_is_kept(text: str, kept: bool) -> None:
    assert is_condition(text)
    assert condition(text)(ROW) is kept


@pytest.mark.parametrize("held", [{"error": None}, {}])
@pytest.mark.parametrize("text", ["error", "not error", *(f"error {sign} 1" for sign in ("==", "!=", ">=", "<", ">"))])
def test_what_is_not_known_is_not_kept(text: str, held: dict[str, Any]) -> None:
    assert condition(text)(held) is False
    assert condition(f"not ({text})")(held) is False
    assert condition(f"agrees and {text}")(held | {"agrees": True}) is False
    # unless another part decides it
    assert condition(f"agrees or {text}")(held | {"agrees": True}) is True


@pytest.mark.parametrize("label", ["(84 / 2)", "a: b", "2024-13-45", "it's", "rock and roll", "@cf/llama", "[x", "*"])
def test_a_quoted_text_may_hold_anything(label: str) -> None:
    text = f"agrees and label == {label!r}"
    assert columns_of(text) == ["agrees", "label"]
    assert condition(text)({"agrees": True, "label": label}) is True
    assert condition(text)({"agrees": True, "label": "other"}) is False


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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "agrees and",
        "agrees ==",
        "== 3",
        "votes = 3",
        "votes => 3",
        "3 < votes",
        "1 < votes < 3",
        "agrees, contains_label",
        "agrees and my.module.function",
        "label in ['a']",
        "agrees == yes and label == it's",
        "__import__('os').system('true')",
        "(lambda: agrees)()",
        "agrees if votes else agrees",
        "[agrees for agrees in votes]",
        "(agrees := votes)",
        "(" * 900 + "agrees" + ")" * 900,
        "not " * 490 + "=",
    ],
)
def test_what_is_none_names_the_argument(text: str) -> None:
    assert not is_condition(text)
    with pytest.raises(
        UserError, match=r"^rationale_filter: a condition is a column, .* and parentheses; got "
    ) as error:
        condition(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["__import__('os').getcwd()", "9**9**9**9", "f'{teacher}'", "[1] * 10**9"])
def test_a_value_is_never_evaluated(value: str) -> None:
    assert condition(f"label == {value}")({"label": value}) is True


@pytest.mark.parametrize("text", ["agrees and " * 20_000 + "agrees", "x" * 200_000, "agrees" + " " * 200_000])
def test_too_long_a_text_is_refused_unread(text: str) -> None:
    assert is_condition(text)
    for read in (condition, columns_of):
        with pytest.raises(UserError, match=r"^rationale_filter must have at most 2,000 characters, got [0-9,]+$"):
            read(text)


@pytest.mark.parametrize(
    ("text", "row", "says"),
    [
        ("votes >= many", {"votes": 3}, "votes is 3, which cannot be compared with 'many'"),
        ("agrees != flase", {"agrees": True}, "agrees is True, which cannot be compared with 'flase'"),
        ('agrees == "true"', {"agrees": True}, "agrees is True, which cannot be compared with 'true'"),
        ("tags > 3", {"tags": ["a"]}, "tags is ['a'], which cannot be compared with 3"),
        ("votes > (1, 2)", {"votes": 3}, "votes is 3, which cannot be compared with (1, 2)"),
    ],
)
def test_what_cannot_be_compared_is_said(text: str, row: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"rationale_filter: {says}")):
        condition(text)(row)


@pytest.mark.parametrize("text", ["tests.data.test_base.never", "a.b", "agrees.x and length", "C:\\x", "x-y"])
def test_an_import_path_is_no_condition(text: str) -> None:
    assert not is_condition(text)
