from collections import Counter
from pathlib import Path

import pytest

from lit_distill.data import ToyDataModule
from lit_distill.data.toy import ITEMS, KINDS, TEXT_WORDS, toy_example
from lit_distill.errors import UserError
from lit_distill.students import load_tokenizer
from lit_distill.tasks import Row

ROOT = Path(__file__).parents[2]
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}


def words_of(example: Row) -> list[str]:
    return example.input.removeprefix("which one does not belong : ").removesuffix(" ?").split(" , ")


@pytest.mark.parametrize("position", range(50))
def test_label_is_the_odd_one(position: int) -> None:
    example = toy_example(3, "train", position)
    words = words_of(example)
    kinds = Counter(KIND_OF[word] for word in words)
    assert sorted(kinds.values()) == [1, ITEMS - 1]
    assert example.label is not None
    assert kinds[KIND_OF[example.label]] == 1
    assert example.choices == tuple(words)


def test_rationale_holds_steps_and_not_the_answer() -> None:
    example = toy_example(0, "train", 0)
    assert example.rationale is not None
    steps = [step.split(" : ") for step in example.rationale.removesuffix(" .").split(" . ")]
    assert [(KIND_OF[word], word) for word in words_of(example)] == [tuple(step) for step in steps]
    assert example.rationale != example.label


def test_words_are_of_one_kind() -> None:
    assert len(KIND_OF) == sum(len(words) for words in KINDS.values())


def test_rows_depend_on_seed_split_and_position_alone() -> None:
    assert toy_example(1, "train", 5) == toy_example(1, "train", 5)
    others = [toy_example(2, "train", 5), toy_example(1, "test", 5), toy_example(1, "train", 6)]
    assert all(other.input != toy_example(1, "train", 5).input for other in others)


def test_sizes_and_base_arguments(tmp_path: Path) -> None:
    data = ToyDataModule(
        train_size=40,
        val_size=6,
        test_size=5,
        train_fraction=0.25,
        tokenizer=ROOT / "configs" / "students" / "toy-t5",
        tasks=("label", "rationale"),
        batch_size=4,
    )
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert [len(data.used_rows(split).rows) for split in ("train", "val", "test")] == [10, 6, 5]
    batch = next(iter(data.train_dataloader()))
    assert batch["rationale"]["labels"].shape[0] == 4
    assert data.answer_key("test").choices is not None


def test_students_tokenizer_knows_every_word() -> None:
    tokenizer = load_tokenizer(ROOT / "configs" / "students" / "toy-t5")
    for word in (*TEXT_WORDS, *KIND_OF, *KINDS):
        ids = tokenizer(word)["input_ids"]
        assert len(ids) == 2
        assert tokenizer.unk_token_id not in ids
    for task, prefix in (("label", "predict: "), ("rationale", "explain: ")):
        assert tokenizer.unk_token_id not in tokenizer(prefix)["input_ids"], task


@pytest.mark.parametrize("name", ["train_size", "val_size", "test_size"])
def test_sizes_are_checked(name: str) -> None:
    with pytest.raises(UserError, match=name):
        ToyDataModule(**{name: 0})  # type: ignore[arg-type]  # a name that mypy cannot know


def test_variety() -> None:
    rows = [toy_example(0, "train", position, variety=True) for position in range(400)]
    plain = [toy_example(0, "train", position) for position in range(400)]
    assert [(row.input, row.label, row.outputs[:1]) for row in rows] == [(o.input, o.label, o.outputs) for o in plain]
    wrong = 0
    for row in rows:
        first, second, third, brief, against = row.outputs
        assert (first.label, second.label, brief.label) == (row.label,) * 3
        wrong += third.label != row.label
        assert against.label in (row.choices or ())
        assert against.label != row.label
        assert (brief.teacher, against.kind) == ("brief", "counterfactual")
        for output in (first, second, third, against):
            # the one word whose kind is named once is the output's label
            kinds = {word: kind for kind, _, word, _ in zip(*[iter(str(output.text).split())] * 4, strict=True)}
            assert sorted(kinds) == sorted(row.choices or ())
            assert [w for w, kind in kinds.items() if list(kinds.values()).count(kind) == 1] == [output.label]
    assert 70 < wrong < 130
