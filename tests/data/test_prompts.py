"""The prompts that come with the datasets: read back by their datasets, balanced, and nobody's rows."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from lit_distill.annotation.plan import Plan
from lit_distill.annotation.prompts import Demonstration, check_template, fixed, load_prompt, written_answer
from lit_distill.data import (
    ANLIDataModule,
    CQADataModule,
    ESNLIDataModule,
    JSONLDataModule,
    RationaleDataModule,
    SVAMPDataModule,
)
from lit_distill.data.paper import NLI_LABELS, SEPARATOR
from lit_distill.data.styles import VERDICTS, parse_program, reader, styles_of
from lit_distill.data.toy import KINDS
from lit_distill.equations import evaluate
from lit_distill.questions import Message
from lit_distill.tasks import Row

PROMPTS = CQADataModule().prompt_file.parent
FILES = sorted(PROMPTS.glob("*.yaml"))
SHOWING = [path for path in FILES if path.stem != "default"]
NLI = [ANLIDataModule, ESNLIDataModule]
ANSWER_FORMS = {
    "anli": r"[^\n]+\. So the answer is (entailment|neutral|contradiction)\.",
    "cqa": r"[^\n]+\. So the answer is \([a-e]\) [^\n]+\.",
    "esnli": r"[^\n]+\.\nAnswer: (entailment|neutral|contradiction)",
    "svamp": r"[^\n]+\. The answer is \( [^\n]+ \)\.",
    "toy": r"([a-z]+ : [a-z]+ \. ){4}So the answer is [a-z]+ \.",
}


def owners(base: type[RationaleDataModule] = RationaleDataModule) -> Iterator[type[RationaleDataModule]]:
    """The datasets of the package that can be used as they are."""
    for dataset in base.__subclasses__():
        if dataset.__module__.startswith("lit_distill.data.") and not dataset.__name__.startswith("_"):
            yield dataset
        yield from owners(dataset)


OWNERS = {dataset.prompt: dataset for dataset in owners()}


def module_of(path: Path) -> RationaleDataModule:
    dataset = OWNERS[path.stem]
    return dataset(train="none.jsonl") if dataset is JSONLDataModule else dataset()


@cache
def demonstrations(name: str) -> tuple[Demonstration, ...]:
    found = load_prompt(PROMPTS / f"{name}.yaml").demonstrations
    assert found
    return found


def plain(text: str) -> str:
    """Without case, whitespace and punctuation."""
    return re.sub(r"[\W_]+", "", text).lower()


def test_each_file_has_its_dataset_and_each_dataset_its_file() -> None:
    assert {path.stem for path in FILES} == set(OWNERS)
    assert OWNERS["default"] is JSONLDataModule
    assert {"cqa", "svamp", "esnli", "anli", "toy"} == {path.stem for path in SHOWING}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_dataset_reads_its_own_demonstrations(path: Path) -> None:
    module = module_of(path)
    assert module.prompt_file == path
    template = load_prompt(path)
    check_template(template, module.prompt_fields, module.parse_teacher, str(path))
    assert template.instruction.strip()
    assert template.stop


@pytest.mark.parametrize("path", SHOWING, ids=lambda path: path.stem)
def test_labels_are_among_the_choices(path: Path) -> None:
    module = module_of(path)
    for example in demonstrations(path.stem):
        if module.label_set is not None:
            assert example.choices is None
            assert example.label in module.label_set
        else:
            assert (example.choices is None) is (path.stem == "svamp")
            assert example.choices is None or (example.label in example.choices)


@pytest.mark.parametrize("path", SHOWING, ids=lambda path: path.stem)
def test_answers_have_the_form_of_the_released_teacher_s(path: Path) -> None:
    module, template = module_of(path), load_prompt(path)
    for example in template.demonstrations:
        assert re.fullmatch(ANSWER_FORMS[path.stem], written_answer(template, module.prompt_fields, example))


@pytest.mark.parametrize("path", SHOWING, ids=lambda path: path.stem)
def test_an_answer_that_runs_on_into_a_next_question_is_cut(path: Path) -> None:
    module, template = module_of(path), load_prompt(path)
    own, invented, other = template.demonstrations[:3]
    written = Plan(template, fixed([own, invented]), module.prompt_fields, "completion").prompt(other.row)
    assert isinstance(written, str)
    text = written[written.index(own.rationale) :]
    stopped = text[: min(text.index(stop) for stop in template.stop)].strip()
    assert stopped == written_answer(template, module.prompt_fields, own)
    # where nothing stopped it, the released datasets' parsers cut it; the toy's teacher is always stopped
    for cut in [stopped] if path.stem == "toy" else [stopped, text]:
        assert module.parse_teacher(cut) == (own.rationale, own.label)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_written_prompts(path: Path) -> None:
    module, template = module_of(path), load_prompt(path)
    row = Row("row", "One thing</s>another thing", None, ("this", "that"))
    shown = template.demonstrations
    plan = Plan(template, fixed(shown), module.prompt_fields, "chat")
    chat, text = plan.prompt(row), replace(plan, layout="completion").prompt(row)
    count = len(shown)
    assert isinstance(chat, tuple)
    assert [turn.role for turn in chat] == ["system", *["user", "assistant"] * count, "user"]
    assert chat[0] == Message("system", template.instruction.strip())
    assert isinstance(text, str)
    cue = template.answer_cue.rstrip()
    assert cue
    assert text.endswith(f"\n{cue}")
    assert text.count(f"\n{template.answer_cue}") == count
    for written in (chat[-1].content, text):
        assert "One thing" in written
        assert "another thing" in written
        assert "{" not in written


@pytest.mark.parametrize("dataset", NLI)
def test_nli_inputs_are_as_rows_are_read(dataset: type[RationaleDataModule]) -> None:
    for example in demonstrations(dataset.prompt):
        premise, hypothesis = example.input.split(SEPARATOR)
        row = {"premise": premise, "hypothesis": hypothesis, "label": NLI_LABELS.index(example.label)}
        read = dataset().read_row(row)
        assert (read.input, read.label) == (example.input, example.label)
        assert premise == premise.strip() != ""
        assert hypothesis == hypothesis.strip() != ""
        assert "\n" not in example.input


def test_cqa_inputs_are_as_rows_are_read() -> None:
    for example in demonstrations("cqa"):
        assert example.choices is not None
        question = example.input.partition("\nAnswer Choices:")[0]
        read = CQADataModule().read_row({"question": question, "choices": [*example.choices], "answer": example.label})
        assert (read.input, read.label, read.choices) == (example.input, example.label, example.choices)
        assert len(set(example.choices)) == 5


def test_svamp_equations_have_values_that_their_rationales_come_to() -> None:
    for example in demonstrations("svamp"):
        label = example.label
        assert re.fullmatch(r"\( .* \)", label)
        assert re.fullmatch(r"[0-9.() +*/-]+", label)
        value = evaluate(label)
        assert value is not None
        assert f"= {value:g}" in example.rationale
        # every step that is written is right
        for left, right in re.findall(r"([0-9]+ [+*/-] [0-9]+) = ([0-9]+)", example.rationale):
            assert evaluate(left) == float(right)
        # numbers of the problem alone, each as the data writes it
        assert {float(number) for number in re.findall(r"[0-9.]+", label)} <= {
            float(number) for number in re.findall(r"[0-9]+", example.input)
        }
        assert all(re.fullmatch(r"[0-9]+\.0", number) for number in re.findall(r"[0-9.]+", label))
        assert example.input.count("\n") == 1
        assert example.input.endswith("?")


def test_toy_demonstrations_are_as_the_toy_writes() -> None:
    kind_of = {word: kind for kind, words in KINDS.items() for word in words}
    odd_kinds = set()
    for example in demonstrations("toy"):
        assert example.choices is not None
        kinds = Counter(kind_of[word] for word in example.choices)
        assert sorted(kinds.values()) == [1, 3]
        assert kinds[kind_of[example.label]] == 1
        assert example.input == f"which one does not belong : {' , '.join(example.choices)} ?"
        assert example.rationale == " ".join(f"{kind_of[word]} : {word} ." for word in example.choices)
        odd_kinds.add(kind_of[example.label])
    assert odd_kinds == set(KINDS)
    assert all(kind in load_prompt(PROMPTS / "toy.yaml").instruction for kind in KINDS)


STYLES = {
    "anli": {"counterfactual", "self_evaluation"},
    "cqa": {"counterfactual", "self_evaluation"},
    "default": {"counterfactual", "program", "self_evaluation"},
    "esnli": {"counterfactual", "self_evaluation"},
    "svamp": {"counterfactual", "program", "self_evaluation"},
    "toy": {"counterfactual", "self_evaluation"},
}
STYLE_FILES = sorted(PROMPTS.glob("*/*.yaml"))


def test_each_dataset_has_its_styles() -> None:
    assert {path.stem: {*styles_of(module_of(path))} - {"rationale"} for path in FILES} == STYLES
    assert len(STYLE_FILES) == sum(map(len, STYLES.values()))


@pytest.mark.parametrize("path", STYLE_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_style_is_read_back_and_needs_what_it_names(path: Path) -> None:
    module, template = module_of(path.parent.with_suffix(".yaml")), load_prompt(path)
    parse, _ = reader(template.reads, module)
    check_template(template, module.prompt_fields, parse, str(path))
    assert template.stop == load_prompt(module.prompt_file).stop
    needs = {"counterfactual": {"wrong"}, "self_evaluation": {"given_rationale", "given_label"}}
    assert template.needs == needs.get(path.stem, set())
    if path.stem == "self_evaluation":
        assert {shown.label for shown in template.demonstrations} in (set(), {*VERDICTS})
        assert all(shown.given_rationale and shown.given_label for shown in template.demonstrations)
    if path.stem == "counterfactual":
        usual = load_prompt(module.prompt_file)
        assert template.answer == usual.answer
        # what is argued for is named in the question, as in the answer
        for shown in template.demonstrations:
            fields = module.prompt_fields(shown.row)
            assert shown.label in template.question.format_map(fields)
            assert shown.choices is None or shown.label in shown.choices
    if path.stem == "program":
        for shown in template.demonstrations:
            assert parse_program(shown.rationale)[1] == shown.label
            numbers = set(re.findall(r"\d+", shown.rationale))
            assert numbers <= set(re.findall(r"\d+", shown.input))


def known_by(text: str) -> set[str]:
    """What an input is recognised by: a question, a problem, a premise, a premise with its hypothesis."""
    if SEPARATOR in text:
        return {plain(text.partition(SEPARATOR)[0]), plain(text.replace(SEPARATOR, " "))}
    return {plain(text.partition("\nAnswer Choices:")[0])}


@pytest.mark.parametrize("dataset", [CQADataModule, SVAMPDataModule, *NLI])
def test_no_demonstration_is_a_row_of_the_data(dataset: type[RationaleDataModule], shared_data: Path) -> None:
    module = dataset(data_dir=shared_data)
    inputs = [row.input for split in module.splits for row in module.load_rows(split) or ()]
    assert len(inputs) >= 1000
    known = set().union(*map(known_by, inputs))
    assert known_by(inputs[0]) <= known
    for path in styles_of(module).values():
        for example in load_prompt(path).demonstrations:
            assert known_by(example.input).isdisjoint(known), example.input
