"""Decoder-only students say what plain Hugging Face code says, row by row, without padding."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lit_distill.batch import IGNORE_INDEX, TaskBatch
from lit_distill.errors import UserError
from lit_distill.students import Student, base, causal, load_tokens
from lit_distill.students.causal import CausalStudent
from lit_distill.students.tokens import CausalTokens
from tests.students import CAUSAL_CONFIGS, CAUSAL_WORDS, causal_config, make_causal_folder, make_causal_tokenizer
from tests.students.plain import EOS, Rows, gradients, logits_one_by_one, mean_loss, nothing, padded, rows_of

KINDS = [
    *((kind, {}) for kind in CAUSAL_CONFIGS),
    # these change what their head gives
    ("llama", {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.5, "pad_token_id": 1}),
    ("llama", {"model_type": "cohere", "pad_token_id": 1}),
    ("llama", {"model_type": "granite", "logits_scaling": 3.0}),
    # prompts leave a state, which cannot be continued row by row
    ("llama", {"model_type": "mamba", "state_size": 4, "pad_token_id": 1}),
]


def make_student(kind: str = "llama", **changes: Any) -> CausalStudent:
    torch.manual_seed(1)
    content = causal_config(kind, **changes)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return CausalStudent(model, CausalTokens(make_causal_tokenizer())).train()


ROWS: dict[str, Rows] = {
    "label": rows_of((3, 7, 5, 2), (2, 1, 4, 1), range(4, len(CAUSAL_WORDS))),
    "rationale": rows_of((4, 9), (11, 3), range(4, len(CAUSAL_WORDS))),
}


def batch_of(rows: dict[str, Rows]) -> TaskBatch:
    # padded with what the tokenizer pads with, which is the end-of-sequence token
    return {task: padded(own, EOS) for task, own in rows.items()}


BATCH = batch_of(ROWS)


def alone(student: Student, source: list[int], target: list[int]) -> Any:
    """One row through the Hugging Face model, with the prompt masked in the labels."""
    labels = [IGNORE_INDEX] * len(source) + target
    return student.network(
        input_ids=torch.tensor([source + target]), labels=torch.tensor([labels]), output_hidden_states=True
    )


def plain_loss(student: Student, rows: Rows) -> Tensor:
    return mean_loss(alone, student, rows)


@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=str)
def test_losses_and_gradients(kind: str, changes: dict[str, Any]) -> None:
    student = make_student(kind, **changes)
    step = student(BATCH)
    for task, rows in ROWS.items():
        torch.testing.assert_close(step.loss(task), plain_loss(student, rows))
    expected = gradients(student, sum((plain_loss(student, rows) for rows in ROWS.values()), torch.tensor(0.0)))
    step = student(BATCH)
    found = gradients(student, step.loss("label") + step.loss("rationale"))
    assert found.keys() == expected.keys() == {name for name, _ in student.named_parameters()}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=str)
def test_states_hidden_states_and_logits_are_those_of_each_row_alone(kind: str, changes: dict[str, Any]) -> None:
    student = make_student(kind, **changes)
    step = student(BATCH)
    for task, rows in ROWS.items():
        which = step.rows(task)
        assert step.labels(task).tolist() == [token for _, target in rows for token in target]
        prompts = iter(step.encoder(task, 1).split([len(source) for source, _ in rows]))
        for number, (source, target) in enumerate(rows):
            own, predicting = alone(student, source, target), slice(len(source) - 1, -1)
            torch.testing.assert_close(step.logits(task)[which == number], own.logits[0, predicting])
            for layer in (0, 1, 2, -1):
                torch.testing.assert_close(
                    step.hidden(task, layer)[which == number], own.hidden_states[layer][0, predicting]
                )
            torch.testing.assert_close(next(prompts), own.hidden_states[1][0, : len(source)])
        assert step.states(task).equal(step.hidden(task, -1))
        assert step.logits(task) is step.logits(task)
        expected = F.cross_entropy(step.logits(task), step.labels(task), reduction="none")
        torch.testing.assert_close(step.token_losses(task), expected)


def test_one_forward_for_all_tasks_and_readers() -> None:
    student, calls = make_student(), []
    student.network.base_model.register_forward_hook(lambda *_: calls.append(1))
    heads: list[int] = []
    student.network.get_output_embeddings().register_forward_hook(lambda _, given, __: heads.append(len(given[0])))
    step = student(BATCH)
    assert not calls
    step.loss("label") + step.loss("rationale")
    step.hidden("rationale", 1)
    step.encoder("label")
    assert calls == [1]
    # the head never sees a prompt
    assert heads == [len(step.labels(task)) for task in ROWS]


def test_chunks_of_the_loss_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student("qwen2")
    whole = student(BATCH).loss("rationale")
    expected = gradients(student, whole)
    # three tokens at a time
    monkeypatch.setattr(causal, "_CHUNK_BYTES", 3 * 4 * len(CAUSAL_WORDS))
    chunked = student(BATCH).loss("rationale")
    torch.testing.assert_close(chunked, whole)
    for name, gradient in gradients(student, chunked).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("others", [True, False])
def test_a_task_without_rows_takes_part(others: bool) -> None:
    student = make_student()
    calls: list[int] = []
    student.network.base_model.register_forward_hook(lambda *_: calls.append(1))
    step = student(BATCH | {"rationale": nothing()} if others else {"label": nothing(), "rationale": nothing()})
    losses = step.loss("label") + step.loss("rationale")
    assert float(step.loss("rationale").detach()) == 0
    found = gradients(student, losses)
    assert len(calls) == 1
    assert found.keys() == {name for name, _ in student.named_parameters()}
    if not others:
        assert not any(gradient.any() for gradient in found.values())


def test_a_row_without_a_target_and_one_without_a_source() -> None:
    student = make_student()
    rows: Rows = [([4, 5], []), ([], [6, EOS]), ([7], [EOS])]
    step = student({"label": padded(rows, EOS)})
    assert step.rows("label").tolist() == [1, 1, 2]
    assert step.labels("label").tolist() == [6, EOS, EOS]
    with pytest.raises(KeyError, match="which holds label"):
        step.loss("rationale")
    # no source at all, and so no column of one
    alone = student({"label": padded([([], [6, EOS])], EOS)})
    torch.testing.assert_close(alone.token_losses("label"), step.token_losses("label")[:2])


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=str)
def test_generation_is_that_of_each_row_alone(kind: str, changes: dict[str, Any], num_beams: int) -> None:
    student = make_student(kind, **changes).eval()
    step = student(BATCH)
    found = step.generate("label", max_new_tokens=7, num_beams=num_beams)
    lengths = set()
    for (source, _), new in zip(ROWS["label"], found, strict=True):
        whole = student.network.generate(  # type: ignore[operator]
            input_ids=torch.tensor([source]), max_new_tokens=7, num_beams=num_beams, do_sample=False
        )
        expected = whole[0, len(source) :].tolist()
        lengths.add(len(expected))
        assert new == expected
    assert step.generate("label", rows=[2, 0], max_new_tokens=7, num_beams=num_beams)[0][:3] == found[2][:3]
    assert step.generate("label", rows=[], max_new_tokens=7) == []


@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=str)
def test_logits_one_token_at_a_time(kind: str, changes: dict[str, Any]) -> None:
    student = make_student(kind, **changes).eval()
    if changes.get("model_type") == "mamba":
        with pytest.raises(UserError, match=r"^student: a mamba cannot be decoded one token at a time"):
            student(BATCH).stepper("label")
        return
    for task, rows in ROWS.items():
        expected = [alone(student, *row).logits[0, len(row[0]) - 1 : -1] for row in rows]
        torch.testing.assert_close(logits_one_by_one(student(BATCH), task, rows), torch.cat(expected))


def test_scores_of_the_next_token_can_be_changed() -> None:
    student = make_student().eval()
    asked: list[tuple[int, list[int]]] = []

    def only(scores: Tensor, step: int, rows: Tensor) -> Tensor:
        asked.append((step, rows.tolist()))
        wanted = torch.full_like(scores, float("-inf"))
        wanted[torch.arange(len(rows)), 10 * (rows + 1) + step] = 0.0
        return wanted

    found = student(BATCH).generate("label", rows=[3, 1], max_new_tokens=2, process_logits=only)
    assert found == [[10, 11], [20, 21]]
    assert asked == [(0, [0, 1]), (1, [0, 1])]
    asked.clear()
    student(BATCH).generate("label", rows=[3, 1], max_new_tokens=1, num_beams=2, process_logits=only)
    assert asked == [(0, [0, 0, 1, 1])]


@pytest.mark.parametrize("at_once", [2, 256])
@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=str)
def test_choices(kind: str, changes: dict[str, Any], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CHOICES_AT_ONCE", at_once)
    student = make_student(kind, **changes).eval()
    # one more column, for ranks that make as many forwards
    student.sharded = at_once == 2
    choices = [("cat", "the red dog"), ("", "a b c d e"), (), ("yes", "no", "no", "because")]
    with torch.no_grad():
        found = student(BATCH).score("label", choices)
        for (source, _), own, scores in zip(ROWS["label"], choices, found, strict=True):
            for choice, score in zip(own, scores, strict=True):
                target = [*(CAUSAL_WORDS.index(word) for word in choice.split()), EOS]
                assert score == pytest.approx(-float(alone(student, source, target).loss) * len(target), rel=1e-4)
    assert student(BATCH).score("label", [()] * 4) == [[]] * 4


def test_the_end_of_a_target_is_learned() -> None:
    student = make_student()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        student(BATCH).loss("label").backward()
        optimizer.step()
    found = student.eval()(BATCH).generate("label", max_new_tokens=10)
    # the end, which is the padding token as well, is written and not only put there
    assert [row[: len(target)] for row, (_, target) in zip(found, ROWS["label"], strict=True)] == [
        target for _, target in ROWS["label"]
    ]
    assert student.tokens.decode(found) == [
        " ".join(CAUSAL_WORDS[token] for token in target[:-1]) for _, target in ROWS["label"]
    ]


def test_more_tokens_than_positions() -> None:
    student = make_student("gpt2", n_positions=8)
    with pytest.raises(UserError, match="a prompt and its target have 16 tokens, the model has 8 positions"):
        student(BATCH).loss("label")
    # what is generated ends where the positions do
    found = student.eval()({"label": padded([([4, 5, 6, 7, 8], [])], EOS)}).generate("label", max_new_tokens=9)
    assert len(found[0]) <= 3
    # a long prompt and a long choice, but not of one row
    step = student({"label": padded([([4, 5, 6, 7, 8], []), ([4], [])], EOS)})
    assert [len(scores) for scores in step.score("label", [("cat",), ("a b c d e",)])] == [1, 1]


# ---------------------------------------------------------------------- tokens


def test_prompts_and_targets() -> None:
    tokens = CausalTokens(make_causal_tokenizer())
    found = tokens.sources(["the cat", "", "a b c d"], 5)
    assert [[CAUSAL_WORDS[i] for i in row] for row in found.ids] == [
        ["<s>", "the", "cat", "\n"],
        ["<s>", "\n"],
        # cut before its ending
        ["<s>", "a", "b", "c", "\n"],
    ]
    assert found.lengths == [4, 2, 6]
    answers = tokens.targets(["cat", "", "a b c d"], 3)
    assert [[CAUSAL_WORDS[i] for i in row] for row in answers.ids] == [["cat", "</s>"], ["</s>"], ["a", "b", "</s>"]]
    assert tokens.tokenizer.pad_token == "</s>"  # noqa: S105
    assert tokens.sources([], 5).ids == tokens.targets([], 5).ids == []
    assert tokens.decode([[17, EOS, EOS], [EOS]]) == [CAUSAL_WORDS[17], ""]


TEMPLATE = (
    "{% for message in messages %}<s> Answer {{ message.content }} . {% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n' }}Rationale:{% endif %}"
)


def test_chat_template() -> None:
    tokenizer = make_causal_tokenizer()
    plain = CausalTokens(tokenizer).fingerprint
    tokenizer.chat_template = TEMPLATE
    tokens = CausalTokens(tokenizer)
    assert [[CAUSAL_WORDS[i] for i in row] for row in tokens.sources(["the cat", "a b c d"], 7).ids] == [
        ["<s>", "Answer", "the", "cat", ".", "\n", "Rationale:"],
        ["<s>", "Answer", "a", "b", ".", "\n", "Rationale:"],
    ]
    assert [CAUSAL_WORDS[i] for i in tokens.targets(["cat"], 5).ids[0]] == ["cat", "</s>"]
    assert tokens.fingerprint != plain


def test_a_chat_template_that_fails(tmp_path: Path) -> None:
    make_causal_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no user here') }}")
    with pytest.raises(UserError, match=r"^tokenizer: cannot write a prompt with .*no user here"):
        load_tokens(tmp_path)


def test_a_tokenizer_that_ends_every_text() -> None:
    tokenizer = make_causal_tokenizer()
    tokenizer.backend_tokenizer.post_processor = type(tokenizer.backend_tokenizer.post_processor)(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokens = CausalTokens(tokenizer)
    assert [CAUSAL_WORDS[i] for i in tokens.sources(["cat"], 9).ids[0]] == ["<s>", "cat", "\n"]
    assert [CAUSAL_WORDS[i] for i in tokens.targets(["cat"], 9).ids[0]] == ["cat", "</s>"]
