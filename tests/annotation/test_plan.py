"""What is asked about each row, and that it is asked once."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from lit_distill.annotation.plan import Plan
from lit_distill.annotation.prompts import Demonstration, PromptTemplate, fixed
from lit_distill.annotation.record import Annotation, answer_schema, digest
from lit_distill.commands.annotate import shown
from lit_distill.data import CQADataModule, ToyDataModule
from lit_distill.questions import Layout, Message, Question, Sampling
from lit_distill.tasks import Row
from tests.rows import make_row

OAK = Demonstration(input="owl , oak ?", label="oak", choices=("owl", "oak"), rationale="An oak is a tree.")
FIG = Demonstration(input="tin , fig ?", label="fig", rationale="A fig is no metal.")
TEMPLATE = PromptTemplate(
    instruction="Find it.",
    question="{input}{options}",
    answer="{rationale} So the answer is {label}.",
    question_cue="Q: ",
    answer_cue="A: ",
    stop=("\nQ:",),
    demonstrations=(OAK, FIG),
)


def changed(**values: Any) -> PromptTemplate:
    return TEMPLATE.model_copy(update=values)


ROW = make_row("r1", "carp , saw ?", "saw", ("carp", "saw"))
PLAN = Plan(
    template=TEMPLATE,
    choose=fixed(TEMPLATE.demonstrations),
    fields=ToyDataModule().prompt_fields,
    layout="completion",
    teacher="T",
    teacher_settings={"model": "T-7b", "quantization": None},
    sampling=Sampling(temperature=0.7, seed=40),
    num_samples=1,
)

Round = list[tuple[Annotation, Question]]


class Answers:
    """Who answers all that is asked, some of it rightly."""

    def __init__(self, *right: int) -> None:
        self.right = right
        self.answered: dict[str, bool] = {}

    def rounds(self, plan: Plan, example: Row = ROW) -> Iterator[list[int]]:
        """The numbers of the samples that are asked for together; each is answered before the next is asked for."""
        for asked in plan.questions(example, self.answered):
            yield [annotation.sample for annotation, _ in asked]
            for annotation, _ in asked:
                self.answered[hashed(annotation)] = annotation.sample in self.right


def hashed(annotation: Annotation) -> str:
    assert annotation.key is not None
    return annotation.key


def questions(plan: Plan = PLAN, example: Row = ROW) -> Round:
    """All of the first round."""
    return next(plan.questions(example, {}))


def keys(plan: Plan = PLAN, example: Row = ROW) -> list[str | None]:
    return [annotation.key for annotation, _ in questions(plan, example)]


def test_a_question_and_what_its_answer_goes_into() -> None:
    (asked,) = questions()
    annotation, question = asked
    assert question == Question(
        "Find it.\n\n"
        "Q: owl , oak ?\nOptions: owl, oak\nA: An oak is a tree. So the answer is oak.\n\n"
        "Q: tin , fig ?\nA: A fig is no metal. So the answer is fig.\n\n"
        "Q: carp , saw ?\nOptions: carp, saw\nA:",
        Sampling(temperature=0.7, seed=40),
        ("\nQ:",),
        None,
    )
    assert annotation == Annotation(
        "r1",
        "train",
        teacher="T",
        prompt=PLAN.columns["prompt"],
        settings=PLAN.columns["settings"],
        input=digest("carp , saw ?", ["carp", "saw"]),
        key=annotation.key,
    )
    assert len(hashed(annotation)) == 32


def test_a_chat_has_no_stops() -> None:
    ((_, question),) = questions(replace(PLAN, layout="chat"))
    assert (question.stop, question.prompt[-1]) == ((), Message("user", "carp , saw ?\nOptions: carp, saw"))


def test_each_sample_has_a_seed_of_its_own() -> None:
    asked = questions(replace(PLAN, num_samples=3))
    assert [annotation.sample for annotation, _ in asked] == [0, 1, 2]
    assert [question.sampling for _, question in asked] == [
        Sampling(temperature=0.7, seed=seed) for seed in (40, 41, 42)
    ]
    assert len({annotation.key for annotation, _ in asked}) == 3
    assert len({question.prompt for _, question in asked}) == 1


def test_a_schema_is_given_where_answers_are_structured_alone() -> None:
    ((plain, question),) = questions()
    assert (plain.structured, question.schema) == (False, None)
    structured = replace(PLAN, structured=True)
    ((annotation, question),) = questions(structured)
    assert (annotation.structured, question.schema) == (True, answer_schema(("carp", "saw")))
    ((_, question),) = questions(structured, replace(ROW, choices=None))
    assert question.schema == answer_schema(())
    ((_, question),) = questions(replace(structured, label_set=("yes", "no")), replace(ROW, choices=None))
    assert question.schema == answer_schema(("yes", "no"))


LETTERED = "Is it ({letter})? {input}"


@pytest.mark.parametrize("layout", ["chat", "completion"])
@pytest.mark.parametrize("structured", [False, True])
def test_a_row_s_own_label_is_not_given_away(layout: Layout, structured: bool) -> None:
    row = make_row("r1", "carp , saw ?", "saw", ("carp", "saw"), rationale="GIVEN", teacher_label="GIVEN")
    template = changed(question=LETTERED)
    cqa = CQADataModule()
    plan = replace(PLAN, template=template, fields=cqa.prompt_fields, layout=layout, structured=structured)
    prompts = [plan.prompt(replace(row, label=label)) for label in ("saw", "carp", "neither", None)]
    assert len(set(prompts)) == 1
    text = shown(prompts[0])
    assert text.count("Is it (b)?") == 1  # the first demonstration's, which is no secret
    assert "Is it (?)? carp , saw ?" in text
    assert "GIVEN" not in text


def test_a_row_is_asked_the_same_whatever_its_label() -> None:
    assert keys(example=replace(ROW, label="carp")) == keys(example=replace(ROW, label=None)) == keys()


def test_a_prompt_as_it_is_looked_at() -> None:
    assert shown("a text") == "a text"
    chat = (Message("system", "Be brief."), Message("user", "Who?\nWhen?"))
    assert shown(chat) == "[system]\nBe brief.\n\n[user]\nWho?\nWhen?"


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "split": ({"split": "test"}, {}),
    "id": ({}, {"id": "r2"}),
    "input": ({}, {"input": "carp , axe ?"}),
    "choices": ({}, {"choices": ("saw", "carp")}),
    "instruction": ({"template": changed(instruction="Find it !")}, {}),
    "stop": ({"template": changed(stop=("\nQ",))}, {}),
    "demonstrations": ({"choose": fixed(TEMPLATE.demonstrations[:1])}, {}),
    "their order": ({"choose": fixed((FIG, OAK))}, {}),
    "layout": ({"layout": "chat"}, {}),
    "teacher": ({"teacher": "U"}, {}),
    "teacher_settings": ({"teacher_settings": {"model": "T-7b", "quantization": "fp8"}}, {}),
    "temperature": ({"sampling": Sampling(0.8, seed=40)}, {}),
    "top_p": ({"sampling": Sampling(0.7, 0.9, seed=40)}, {}),
    "max_new_tokens": ({"sampling": Sampling(0.7, max_new_tokens=128, seed=40)}, {}),
    "seed": ({"sampling": Sampling(0.7, seed=41)}, {}),
    "structured": ({"structured": True}, {}),
}


def test_a_key_changes_with_anything_that_is_asked() -> None:
    found = [*keys(replace(PLAN, num_samples=2))]
    for plan, example in OTHERS.values():
        # the next sample of a seed is not the first one of the next
        found += keys(replace(PLAN, num_samples=2, **plan), replace(ROW, **example))
    assert len(set(found)) == len(found) == 2 * (len(OTHERS) + 1)


@pytest.mark.parametrize("structured", [False, True])
def test_a_row_with_other_choices_is_another_question_though_its_prompt_shows_none(structured: bool) -> None:
    plan = replace(PLAN, template=changed(question="{input}"), structured=structured)
    assert keys(plan) != keys(plan, replace(ROW, choices=("saw", "axe")))


def test_a_key_is_the_same_in_another_plan() -> None:
    again = Plan(
        template=changed(demonstrations=(OAK.model_copy(), FIG.model_copy())),
        choose=fixed([OAK, FIG]),
        fields=ToyDataModule(train_size=1).prompt_fields,
        layout="completion",
        teacher="T",
        teacher_settings={"quantization": None, "model": "T-7b"},
        sampling=Sampling(seed=40, temperature=0.7),
        num_samples=3,
        until_agrees=9,
    )
    assert keys(again)[:1] == keys()
    assert again.columns == PLAN.columns


def test_keys_of_earlier_samples_stay_when_there_are_more() -> None:
    five = keys(replace(PLAN, num_samples=5))
    for count in range(1, 5):
        assert keys(replace(PLAN, num_samples=count)) == five[:count]


def test_hashes_tell_prompts_and_settings_apart() -> None:
    assert PLAN.columns["prompt"] == TEMPLATE.hash
    assert replace(PLAN, selection={"nearest": 2}).columns["prompt"] not in (
        PLAN.columns["prompt"],
        replace(PLAN, selection={"nearest": 1}).columns["prompt"],
    )
    changes = [OTHERS[name][0] for name in ("teacher_settings", "temperature", "top_p", "max_new_tokens", "seed")]
    changes.append(OTHERS["structured"][0])
    hashes = {PLAN.columns["settings"], *(replace(PLAN, **change).columns["settings"] for change in changes)}
    assert len(hashes) == len(changes) + 1
    assert all(replace(PLAN, **change).columns["prompt"] == PLAN.columns["prompt"] for change in changes)


def test_what_is_answered_is_not_asked() -> None:
    answers, plan = Answers(), replace(PLAN, num_samples=3)
    assert list(answers.rounds(plan)) == [[0, 1, 2]]
    assert list(answers.rounds(plan)) == []
    assert list(answers.rounds(replace(plan, num_samples=5))) == [[3, 4]]
    assert list(answers.rounds(plan, replace(ROW, id="r2"))) == [[0, 1, 2]]
    del answers.answered[hashed(questions(plan)[1][0])]
    assert list(answers.rounds(plan)) == [[1]]


@pytest.mark.parametrize(
    ("right", "num_samples", "limit", "rounds"),
    [
        ((0,), 1, 5, [[0]]),
        ((2,), 1, 5, [[0], [1], [2]]),
        ((2, 3), 2, 5, [[0, 1], [2]]),
        ((), 1, 4, [[0], [1], [2], [3]]),
        ((4,), 1, 4, [[0], [1], [2], [3]]),
        ((), 3, 3, [[0, 1, 2]]),
        ((), 3, 2, [[0, 1, 2]]),
        ((1,), 3, 9, [[0, 1, 2]]),
        ((), 2, None, [[0, 1]]),
    ],
)
def test_more_is_asked_until_one_agrees(
    right: tuple[int, ...], num_samples: int, limit: int | None, rounds: list[list[int]]
) -> None:
    answers, plan = Answers(*right), replace(PLAN, num_samples=num_samples, until_agrees=limit)
    assert list(answers.rounds(plan)) == rounds
    assert list(answers.rounds(plan)) == []


def test_without_a_gold_label_nothing_can_agree() -> None:
    plan = replace(PLAN, num_samples=2, until_agrees=9)
    assert list(Answers().rounds(plan, replace(ROW, label=None))) == [[0, 1]]


def test_a_second_start_goes_on_where_the_first_ended() -> None:
    answers, plan = Answers(4), replace(PLAN, until_agrees=9)
    first = answers.rounds(plan)
    assert [next(first) for _ in range(3)] == [[0], [1], [2]]  # the third was not answered any more
    assert list(answers.rounds(plan)) == [[2], [3], [4]]


def test_an_answer_of_another_row_or_teacher_agrees_for_itself_alone() -> None:
    answers, plan = Answers(0), replace(PLAN, until_agrees=3)
    assert list(answers.rounds(plan)) == [[0]]
    answers.right = ()
    assert list(answers.rounds(plan, replace(ROW, id="r2"))) == [[0], [1], [2]]
    assert list(answers.rounds(replace(plan, teacher="U"))) == [[0], [1], [2]]


def test_further_samples_have_the_keys_that_they_would_have_among_the_first() -> None:
    plan = replace(PLAN, until_agrees=4)
    asked = [one for asked in plan.questions(ROW, {}) for one in asked]
    assert [annotation.key for annotation, _ in asked] == keys(replace(PLAN, num_samples=4))
    assert [question.sampling.seed for _, question in asked] == [40, 41, 42, 43]
