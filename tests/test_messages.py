"""One line for what a parser says in many, from its texts written down by hand."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_distill.messages import import_given, known_subclasses, likely, one_line

UNION = """Parser key "trainer.precision":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'int'>, <class 'NoneType'>]
  Errors:
    - Expected a <class 'int'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: half
    of it"""


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (UNION, "trainer.precision: got half of it; allowed is int, or null"),
        (
            "Parser key \"a\":\n  Expected a typing.Literal['x', 'y']. Got value: z",
            "a: got z; allowed is one of 'x', 'y'",
        ),
        (
            "unrecognized arguments: --trainer.max_step=3 --other 4",
            "trainer.max_step: no such argument (did you mean trainer.max_steps?);"
            " allowed are trainer.devices, trainer.max_steps",
        ),
        ("unrecognized arguments: stray --x", "unexpected argument 'stray'; allowed are --key value and --config FILE"),
        (
            "Group 'trainer' does not accept option 'max_step'",
            "trainer.max_step: no such argument (did you mean trainer.max_steps?);"
            " allowed are trainer.devices, trainer.max_steps",
        ),
        ("Option 'zzz' is not accepted", "zzz: no such argument; allowed are seed, trainer"),
        ("argument --seed: expected one argument", "seed: a value must be given, as --seed VALUE or --seed.KEY VALUE"),
        (
            "the following arguments are required: fit.model, fit.data",
            "model, data: must be given, in a config file or as --model, --data",
        ),
        (
            "Problems parsing config: while parsing\n  found\n  line 2, column 1",
            "config: not YAML: while parsing found line 2, column 1",
        ),
        ('Parser key "config":\n  File does not exist: /a/b.yaml', "config: File does not exist: /a/b.yaml"),
        (
            "Parser key \"lr\":\n  Expected a <class 'float'>. Got value: NestedArg(key='x', val='1')",
            "lr: got {'x': '1'}; allowed is float",
        ),
        ("Option 'teachers+.big.model' is not accepted", "teachers+.big.model: no such argument; only a list takes +"),
        ("something that\nnobody foresaw", "something that nobody foresaw"),
    ],
)
def test_each_kind_of_error(message: str, line: str) -> None:
    assert one_line(message, ["config", "help", "seed", "trainer.max_steps", "trainer.devices"]) == line


def test_very_many_keys_are_not_listed() -> None:
    options = [f"group.key{number}" for number in range(100)]
    line = one_line("Group 'group' does not accept option 'other'", options)
    assert line == "group.other: no such argument; allowed are the keys of group that --help lists"


def test_an_error_inside_a_class_names_the_whole_key() -> None:
    inner = "init.wieght: no such argument (did you mean weight?); allowed are weight"
    message = f"Parser key \"model\":\n  Errors:\n    - {inner}\n    - Expected a <class 'NoneType'>"
    assert one_line(message) == f"model.{inner}"
    inner = "student: must be given, in a config file or as --student"
    assert one_line(f'Parser key "model":\n  Errors:\n    - {inner}') == (
        "model.student: must be given, in a config file or as --model.student"
    )


@given(st.text(), st.lists(st.text(max_size=8), max_size=4))
def test_whatever_the_text_it_is_one_line(message: str, options: list[str]) -> None:
    assert len(one_line(message, options).splitlines()) <= 1
    assert len(one_line(f'Parser key "k":\n{message}', options).splitlines()) <= 1


def test_likely() -> None:
    assert likely("lable", ["label", "rationale"]) == " (did you mean label?)"
    assert likely("xyz", ["label", "rationale"]) == ""
    assert likely("xyz", []) == ""


def test_known_subclasses_are_those_that_can_be_named() -> None:
    names = known_subclasses("lit_distill.data.base.RationaleDataModule")
    expected = {"CQADataModule", "SVAMPDataModule", "ESNLIDataModule", "ANLIDataModule", "ToyDataModule"}
    assert expected | {"JSONLDataModule"} <= names.keys()
    assert not [name for name in names if name.startswith("_")]


def test_a_fault_in_the_given_file_goes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_when_imported.py").write_text("1 / 0\n")
    for value in ("broken_when_imported.Own", "{'class_path': 'broken_when_imported.Own'}"):
        with pytest.raises(ZeroDivisionError):
            import_given(f'Parser key "model":\n  Given value: {value}')
        sys.modules.pop("broken_when_imported", None)
    # what is not there is the parser's to tell
    import_given('Parser key "model":\n  Given value: not_there_at_all.Own')
    import_given('Parser key "model":\n  Given value: email.not_there.Own')
    import_given('Parser key "model":\n  Given value: 3')
