"""Several texts of a student that vote on the answer to a row."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare  # type: ignore[import-untyped]
from torch import Tensor

from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Answer, VotePath, answer_row, summarise
from lit_distill.evaluation.metrics import equations_agree, exact_match
from lit_distill.modules import DistillModule, SingleTaskModule, StandardModule, StepByStepModule, voting
from lit_distill.modules.voting import Vote
from tests.modules.running import make_trainer
from tests.modules.test_evaluation import ITEMS, ItemData, ids, item_key
from tests.students import WORDS, make_causal_folder


@pytest.fixture(scope="session")
def causal_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_causal_folder(tmp_path_factory.mktemp("causal"), "llama")


@pytest.fixture(params=["seq2seq", "causal"])
def folder(request: pytest.FixtureRequest, student_folder: Path, causal_folder: Path) -> Path:
    return student_folder if request.param == "seq2seq" else causal_folder


def make(folder: Path, kind: Any = StandardModule, **settings: Any) -> Any:
    torch.manual_seed(5)
    module = kind(folder, **({"from_scratch": True, "max_label_length": 4} | settings)).eval()
    with torch.no_grad():
        # far from uniform
        module.student.network.get_output_embeddings().weight.mul_(
            10.0 if module.student.tokens.family == "causal" else 3.0
        )
    return module


def answers_of_test(module: DistillModule, batch_size: int = 2) -> list[Answer]:
    """The answers of a test."""
    make_trainer().test(module, datamodule=ItemData(module, batch_size), verbose=False)
    assert module.evaluation is not None
    return list(module.evaluation.answers)


def predicted(module: DistillModule, batch_size: int = 2) -> list[Answer]:
    predictions: Any = make_trainer().predict(module, datamodule=ItemData(module, batch_size))
    return [answer for batch in predictions for answer in batch]


def paths_of(answers: Sequence[Answer]) -> list[list[VotePath]]:
    return [answer.paths or [] for answer in answers]


def logits(module: DistillModule, source: Sequence[int], written: Sequence[int]) -> Tensor:
    """The scores of the token after these, ``(vocabulary,)`` float64, by the plain model."""
    with torch.no_grad():
        if module.student.tokens.family == "causal":
            given = {"input_ids": torch.tensor([[*source, *written]])}
        else:
            given = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[0, *written]])}
        scores: Tensor = module.student.network(**given).logits[0, -1]
        return scores.double()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids that are generated from here on, one path after another."""
    found: list[list[int]] = []
    plain = DistillModule.generate_ids

    def spy(self: DistillModule, *rest: Any) -> list[list[int]]:
        found.extend(new := plain(self, *rest))
        return new

    monkeypatch.setattr(DistillModule, "generate_ids", spy)
    return found


# ------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_tokens_are_drawn_as_often_as_they_are_likely(folder: Path, drawn: list[list[int]], temperature: float) -> None:
    module = make(folder, max_label_length=2, vote=Vote(samples=10_000, temperature=temperature))
    data = ItemData(module, 1)
    batch = next(iter(data.val_dataloader()))
    source = data.rows[0]["label"][0]
    with torch.no_grad():
        voting.vote_paths(module, module.step(batch), data.answer_key("test"), module.vote)
    assert len(drawn) == 10_000
    # of both tokens together, and of the second alone after the most frequent first
    first = (logits(module, source, []) / temperature).softmax(-1).numpy()
    check(Counter(own[0] for own in drawn), first)
    most = next(one for one, _ in Counter(own[0] for own in drawn).most_common() if one != 1)
    second = (logits(module, source, [most]) / temperature).softmax(-1).numpy()
    check(Counter(own[1] for own in drawn if own[0] == most), second)


def check(counts: Counter[int], probabilities: Any) -> None:
    """A chi-square test, with all that is too rare for one as one."""
    number = counts.total()
    assert number > 100
    frequent = [i for i, p in enumerate(probabilities) if p * number >= 5]
    assert len(frequent) >= 4
    observed = [counts[i] for i in frequent]
    expected = [probabilities[i] * number for i in frequent]
    if number - sum(expected) >= 5:
        observed, expected = [*observed, number - sum(observed)], [*expected, number - sum(expected)]
    expected = np.array(expected) * sum(observed) / sum(expected)
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("fast", ["plain", "packed"])
def test_without_temperature_all_samples_are_greedy(folder: Path, fast: Any) -> None:
    module = make(folder, fast=fast, vote=Vote(samples=3, temperature=1e-6))
    for answer, paths in zip(predicted(module), paths_of(predicted(module)), strict=True):
        assert [path["text"] for path in paths] == [answer.text] * 3
        assert [path["tokens"] for path in paths] == [answer.tokens] * 3
        assert (answer.vote, answer.vote_tokens) == (answer.prediction, 3 * answer.tokens)


@pytest.mark.parametrize("vote", [Vote(samples=3), Vote(tasks=["label", "rationale_label"])], ids=["samples", "tasks"])
def test_log_probabilities_are_those_of_a_plain_forward(folder: Path, drawn: list[list[int]], vote: Vote) -> None:
    tasks = {"rationale_label": {"prefix": "explain: "}}
    module = make(folder, tasks=tasks, vote=vote, max_rationale_length=3)
    with torch.no_grad():
        # so that texts of several lengths end
        weight = module.student.network.get_output_embeddings().weight
        weight[1] = weight[4:9].sum(0)
    data = ItemData(module, 5)
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        found = voting.vote_paths(module, module.step(batch), data.answer_key("test"), vote)
    assert [path["task"] for paths in found for path in paths] == (vote.tasks or ["label"] * 3) * 5
    # of one row after another, for each task if there are several
    order = found if vote.samples else list(zip(*found, strict=True))
    for path, own in zip((path for paths in order for path in paths), drawn, strict=True):
        row = next(row for row, paths in enumerate(found) if any(path is one for one in paths))
        source = data.rows[row][path["task"]][0]
        steps = [logits(module, source, own[:i]).log_softmax(-1)[one] for i, one in enumerate(own)]
        assert path["log_probability"] == pytest.approx(float(sum(steps)), abs=2e-5)
        assert path["tokens"] == len(own)
    lengths = {len(own) for own in drawn}
    assert len(lengths) > 1


def test_a_path_is_the_answer_with_the_rationale_that_it_follows(student_folder: Path, drawn: list[list[int]]) -> None:
    tasks = {"label": {"input": "{input} because {rationale}", "after": "rationale"}}
    vote = Vote(samples=2, temperature=1.5)
    module = make(student_folder, StepByStepModule, tasks=tasks, vote=vote, max_rationale_length=3)
    data = ItemData(module, 5)
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        found = voting.vote_paths(module, module.step(batch), data.answer_key("test"), vote)
    decode = module.student.tokens.decode
    for number, path in enumerate(path for paths in found for path in paths):
        first, last = drawn[number], drawn[10 + number]
        assert [path["rationale"], path["text"]] == decode([first, last])
        sources = f"explain: {ITEMS[number // 2][0]}", f"predict: {ITEMS[number // 2][0]} because {path['rationale']}"
        steps = [
            logits(module, ids(source), own[:i]).log_softmax(-1)[one]
            for source, own in zip(sources, (first, last), strict=True)
            for i, one in enumerate(own)
        ]
        assert path["log_probability"] == pytest.approx(float(sum(steps)), abs=2e-5)
        assert path["tokens"] == len(first) + len(last)
    assert len({path["rationale"] for paths in found for path in paths}) > 5


def test_samples_depend_on_seed_row_task_and_number_alone(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(student_folder, vote=Vote(samples=4, temperature=1.5))
    expected = paths_of(predicted(module, batch_size=2))
    texts = [[path["text"] for path in paths] for paths in expected]
    assert all(len(set(own)) > 1 for own in texts)
    assert len(set(map(tuple, texts))) == len(texts)
    # whatever ran before, and in whichever batches
    torch.rand(100)
    monkeypatch.setattr(voting, "PATHS_AT_ONCE", 6)
    assert [[path["text"] for path in paths] for paths in paths_of(predicted(module, batch_size=5))] == texts
    votes = [answer.vote for answer in predicted(module)]
    assert [answer.vote for answer in answers_of_test(module)] == votes
    # more samples are the same and others
    module.vote = Vote(samples=6, temperature=1.5)
    assert [[path["text"] for path in paths[:4]] for paths in paths_of(predicted(module))] == texts
    torch.manual_seed(6)
    assert [[path["text"] for path in paths[:4]] for paths in paths_of(predicted(module))] != texts


def test_samples_of_a_checkpoint_are_those_of_its_run(student_folder: Path, tmp_path: Path) -> None:
    settings: Any = {"vote": Vote(samples=3, temperature=1.5), "learning_rate": 1e-9}
    module = make(student_folder, **settings)
    torch.manual_seed(3)
    trainer = make_trainer(max_steps=2)
    trainer.fit(module.train(), datamodule=ItemData(module))
    expected = [answer.vote for answer in answers_of_test(module)]
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    torch.manual_seed(4)
    again = StandardModule.load_from_checkpoint(tmp_path / "some.ckpt")
    assert again.vote == settings["vote"]
    assert [answer.vote for answer in answers_of_test(again)] == expected


class OnlyOwnWord(StandardModule):
    """Row r may write word 17 + r alone, or end."""

    def process_logits(self, task: str, scores: Tensor, step: int, rows: Tensor) -> Tensor:
        allowed = torch.full_like(scores, -torch.inf)
        for at, row in enumerate(rows.tolist()):
            for one in (1, 17 + row):
                allowed[at, one] = scores[at, one]
        return allowed


@pytest.mark.parametrize("fast", ["plain", "packed"])
def test_samples_go_through_a_subclass_s_scores(student_folder: Path, fast: Any) -> None:
    module = make(student_folder, OnlyOwnWord, fast=fast, vote=Vote(samples=8, temperature=3.0))
    found = paths_of(predicted(module))
    for row, paths in enumerate(found):
        assert {word for path in paths for word in path["text"].split()} <= {WORDS[17 + row]}
    assert any(path["text"] for paths in found for path in paths)
    assert len({path["tokens"] for paths in found for path in paths}) > 1


# ------------------------------------------------------------------------------------------------ votes


def path(label: str | None, log_probability: float = -1.0, tokens: int = 2) -> VotePath:
    return VotePath(task="label", text="", label=label, rationale=None, log_probability=log_probability, tokens=tokens)


def test_majorities_by_hand() -> None:
    vote = Vote(samples=4)
    assert vote.winner([path("no"), path("yes"), path("yes"), path(None)], exact_match) == "yes"
    # the first of equally many
    assert vote.winner([path("b"), path("a"), path("a"), path("b")], exact_match) == "b"
    assert vote.winner([path(None), path(None)], exact_match) == ""
    # one without a label does not vote
    assert vote.winner([path(None), path(None), path("yes")], exact_match) == "yes"
    # the same value
    equations = [path("5 + 4"), path("( 3 * 2 )"), path("2 * 3"), path("no equation")]
    assert vote.winner(equations, equations_agree) == "( 3 * 2 )"


def test_likelihoods_by_hand() -> None:
    vote = Vote(samples=3, by="likelihood")
    # exp(-1 / 2) = 0.61 is more than exp(-4 / 2) + exp(-9 / 6) = 0.14 + 0.22
    paths = [path("no", -4.0, 2), path("no", -9.0, 6), path("yes", -1.0, 2)]
    assert vote.winner(paths, exact_match) == "yes"
    # and less than exp(-2 / 4) + exp(-9 / 6) = 0.61 + 0.22
    assert vote.winner([path("no", -2.0, 4), *paths[1:]], exact_match) == "no"
    assert vote.winner([path(None, -0.1, 9), path("yes", -9.0, 1)], exact_match) == "yes"


def test_votes_in_the_summary_by_hand() -> None:
    answers = [
        Answer(row, "yes", "yes", tokens=2, vote=vote, vote_tokens=tokens, paths=[])
        for row, (vote, tokens) in enumerate([("no", 3), ("no", 5), ("", 1), ("yes", 3), ("yes", 4)])
    ]
    found = summarise(answers, item_key(["yes", "no", "yes", None, "yes"]), rationales=False, intervals=True)
    assert found["accuracy"] == 3 / 4
    assert found["vote_accuracy"] == 2 / 4
    # as the accuracy of 2 of 4 in test_evaluation.py
    assert found["vote_accuracy_low"] == pytest.approx(0.1500, abs=5e-4)
    assert (found["tokens"], found["vote_tokens"]) == (2, 16 / 5)
    rows = [answer_row(answer, item_key(["yes", "no", "yes", None, "yes"])) for answer in answers]
    assert [row["vote_correct"] for row in rows] == [False, True, False, None, True]
    assert [row["vote"] for row in rows] == ["no", "no", "", "yes", "yes"]


def test_only_test_and_predict_vote(student_folder: Path) -> None:
    module = make(student_folder, vote=Vote(samples=2))
    (found,) = make_trainer(limit_val_batches=1.0).validate(module, datamodule=ItemData(module), verbose=False)
    assert not any("vote" in name for name in found)
    answers = answers_of_test(module)
    assert module.evaluation is not None
    assert {"vote_accuracy", "vote_accuracy_low", "vote_tokens"} <= module.evaluation.metrics.keys()
    # many texts would fill the memory
    assert {answer.paths is None for answer in answers} == {True}
    assert all(answer.paths is None and answer.vote is None for answer in predicted(make(student_folder)))


def test_texts_of_several_tasks_vote(student_folder: Path) -> None:
    module = make(
        student_folder,
        tasks={"rationale_label": {"prefix": "explain: "}, "label_rationale": {"prefix": "Answer "}},
        max_rationale_length=2,
        vote=Vote(tasks=["label", "rationale_label", "label_rationale"]),
    )
    data = ItemData(module, 5)
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        alone = {task: module.generate_texts(module.step(batch), task) for task in module.tasks}
    for row, answer in enumerate(predicted(module)):
        assert answer.paths is not None
        assert [one["text"] for one in answer.paths] == [alone[task][row] for task in module.tasks]
        assert answer.vote_tokens == sum(one["tokens"] for one in answer.paths)
        json.dumps(answer.paths)


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("kind", "vote", "more", "expected"),
    [
        (StandardModule, Vote(), {}, "vote: one greedy text is no vote; give samples of at least 1, or several tasks"),
        (StandardModule, Vote(tasks=["label"]), {}, "vote: one greedy text is no vote"),
        (StandardModule, Vote(samples=-1), {}, r"vote: samples must be an integer in \[0, 10000\]"),
        (StandardModule, Vote(samples=3, temperature=0.0), {}, "vote: temperature must be above 0"),
        (StandardModule, Vote(samples=3, temperature=float("nan")), {}, "vote: temperature must be above 0"),
        (StandardModule, Vote(samples=None), {}, r"vote: samples must be an integer in \[0, 10000\], got None"),  # type: ignore[arg-type]
        (StandardModule, Vote(samples=3, temperature=None), {}, "vote: temperature must be above 0"),  # type: ignore[arg-type]
        (StandardModule, Vote(samples=3, by="mean"), {}, "vote: by must be one of majority, likelihood"),  # type: ignore[arg-type]
        (StandardModule, Vote(samples=3), {"num_beams": 4}, "vote: .* num_beams must be 1, got 4"),
        (StandardModule, Vote(samples=3, tasks=[]), {}, "vote: tasks must be different names"),
        (StandardModule, Vote(samples=3, tasks=["label", "label"]), {}, "vote: tasks must be different names"),
        (StandardModule, Vote(samples=3, tasks=["lable"]), {}, r"vote: tasks .* must be one of label, got 'lable'"),
        (StepByStepModule, Vote(samples=3, tasks=["rationale"]), {}, r"vote: tasks .* must be one of label, got"),
    ],
)  # fmt: skip
def test_settings_without_a_meaning(
    student_folder: Path, kind: Any, vote: Vote, more: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=f"^{expected}") as raised:
        kind(student_folder, from_scratch=True, vote=vote, **more)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_without_a_vote_loads(student_folder: Path, tmp_path: Path) -> None:
    module = make(student_folder, SingleTaskModule, max_rationale_length=3)
    trainer = make_trainer(max_steps=1)
    trainer.fit(module.train(), datamodule=ItemData(module))
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    kept = torch.load(tmp_path / "some.ckpt", weights_only=True)
    del kept["hyper_parameters"]["vote"]
    torch.save(kept, tmp_path / "older.ckpt")
    assert SingleTaskModule.load_from_checkpoint(tmp_path / "older.ckpt").vote is None
    voting_now = SingleTaskModule.load_from_checkpoint(tmp_path / "older.ckpt", vote={"samples": 3})
    assert voting_now.vote == Vote(samples=3)
