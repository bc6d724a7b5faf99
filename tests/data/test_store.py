"""Rows read from mapped files."""

import pytest

from lit_distill.data.rows import packed_row, row_from
from lit_distill.data.store import CHUNK, Lazy, of_json, unpack
from lit_distill.tasks import Row, TeacherOutput


def test_a_lazy_sequence_reads_as_a_list() -> None:
    plain = [number**2 for number in range(CHUNK + 3)]
    lazy = Lazy(len(plain), lambda at: [plain[position] for position in at])
    assert list(lazy) == plain
    assert lazy == plain
    assert (lazy[-1], lazy[2:7:2], lazy[-2:], lazy[:0]) == (plain[-1], plain[2:7:2], plain[-2:], [])
    assert lazy != plain[:-1]
    with pytest.raises(IndexError):
        lazy[len(plain)]


def test_a_row_comes_back() -> None:
    outputs = (TeacherOutput("so \ud800", None, "t", "program", {"n": float("nan"), "list": [1]}), TeacherOutput(None))
    for group in (None, "", "g \ud800"):
        row = Row("a", "\u00e9\u2028\n", None, ("x", "y"), outputs, group)
        assert repr(row_from(unpack(of_json([packed_row(row)])[0].as_py()))) == repr(row)
