"""Both passes of an encoder-decoder student say what plain Hugging Face code says of each row alone."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, ByT5Tokenizer

from lit_distill import students
from lit_distill.batch import IGNORE_INDEX, TaskBatch, TaskInputs
from lit_distill.errors import UserError
from lit_distill.students import Student, base, seq2seq
from lit_distill.students.models import build_model
from lit_distill.students.seq2seq import PackedPass, PlainPass, Seq2SeqPass, Seq2SeqStudent
from lit_distill.students.tokens import Tokens
from tests.students import CONFIG, make_student_folder, make_tokenizer
from tests.students.plain import EOS, Rows, gradients, logits_one_by_one, mean_loss, nothing, padded, rows_of

VOCABULARY = 60

KINDS: dict[str, dict[str, Any]] = {
    "v1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "v1.1": {},
    "gated and tied": {"tie_word_embeddings": True},
    "byt5": {"vocab_size": 384, "num_layers": 3, "num_decoder_layers": 1},
    "mt5": {"model_type": "mt5"},
    "tied mt5": {"model_type": "mt5", "tie_word_embeddings": True},
}
PASSES: dict[str, type[Seq2SeqPass]] = {"packed": PackedPass, "plain": PlainPass}
EVERY = [(kind, name) for kind in KINDS for name in PASSES]


def make_student(kind: str = "v1.1", **changes: Any) -> Seq2SeqStudent:
    torch.manual_seed(3)
    model = build_model(CONFIG | {"vocab_size": VOCABULARY} | KINDS[kind] | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return Seq2SeqStudent(model, Tokens(make_tokenizer()))


ROWS: dict[str, Rows] = {
    "label": rows_of((9, 3, 12, 5), (2, 1, 4, 1), range(2, VOCABULARY)),
    "rationale": rows_of((4, 14, 7), (11, 3, 6), range(2, VOCABULARY)),
}
BATCH: TaskBatch = {task: padded(rows) for task, rows in ROWS.items()}


def alone(student: Student, source: list[int], target: list[int]) -> Any:
    """One row through the Hugging Face model."""
    model: Any = student.model
    return model(
        input_ids=torch.tensor([source]), labels=torch.tensor([target]), output_hidden_states=True, use_cache=False
    )


def plain_loss(student: Student, rows: Rows) -> Tensor:
    return mean_loss(alone, student, rows)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_losses_and_gradients(kind: str, name: str) -> None:
    student = make_student(kind)
    step = PASSES[name](student, BATCH)
    for task, rows in ROWS.items():
        close(step.loss(task), plain_loss(student, rows))
    expected = gradients(student, sum((plain_loss(student, rows) for rows in ROWS.values()), torch.tensor(0.0)))
    step = PASSES[name](student, BATCH)
    found = gradients(student, step.loss("label") + step.loss("rationale"))
    assert found.keys() == expected.keys() == {name for name, _ in student.named_parameters()}
    for parameter, gradient in found.items():
        distance = float((gradient - expected[parameter]).norm())
        assert distance <= 1e-4 * float(expected[parameter].norm()) + 1e-6, parameter


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_states_hidden_states_and_logits(kind: str, name: str) -> None:
    student = make_student(kind)
    step = PASSES[name](student, BATCH)
    for task, rows in ROWS.items():
        which = step.rows(task)
        assert step.labels(task).tolist() == [token for _, target in rows for token in target]
        assert which.tolist() == [row for row, (_, target) in enumerate(rows) for _ in target]
        encoded = {layer: iter(step.encoder(task, layer).split([len(s) for s, _ in rows])) for layer in (0, 1, -1)}
        for row, (source, target) in enumerate(rows):
            own = alone(student, source, target)
            close(step.logits(task)[which == row], own.logits[0])
            for layer in (0, 1, -1):
                close(step.hidden(task, layer)[which == row], own.decoder_hidden_states[layer][0])
                close(next(encoded[layer]), own.encoder_hidden_states[layer][0])
        assert step.logits(task) is step.logits(task)
        close(step.project(step.states(task)), step.logits(task))
        close(
            step.token_losses(task),
            torch.nn.functional.cross_entropy(step.logits(task), step.labels(task), reduction="none"),
        )


@pytest.mark.parametrize("name", PASSES)
def test_losses_of_all_that_is_read(name: str) -> None:
    """Gradients through states, hidden states, logits and the encoder, in any order, come from one forward."""
    student = make_student()

    found, expected = [], []
    for task, rows in ROWS.items():
        step = PASSES[name](student, BATCH)
        parts = [step.logits(task), step.hidden(task, 1), step.encoder(task, 1), step.encoder(task)]
        found.append(gradients(student, sum((x.square().sum() for x in parts), step.loss(task))))
        total_loss = plain_loss(student, rows)
        for row in rows:
            own = alone(student, *row)
            hidden = own.encoder_hidden_states
            parts = [own.logits, own.decoder_hidden_states[1], hidden[1], hidden[-1]]
            total_loss = sum((x.square().sum() for x in parts), total_loss)
        expected.append(gradients(student, total_loss))
    for ours, plain in zip(found, expected, strict=True):
        for parameter, gradient in ours.items():
            assert float((gradient - plain[parameter]).norm()) <= 1e-4 * float(plain[parameter].norm()) + 1e-5, (
                parameter
            )


@pytest.mark.parametrize("name", PASSES)
def test_one_forward_with_one_set_of_dropout_masks(name: str) -> None:
    student, calls = make_student(dropout_rate=0.4).train(), []
    blocks: Any = student.model.encoder.block  # type: ignore[union-attr]
    blocks[0].layer[0].SelfAttention.q.register_forward_hook(lambda *_: calls.append("encoder"))
    blocks = student.model.decoder.block  # type: ignore[union-attr]
    blocks[0].layer[0].SelfAttention.q.register_forward_hook(lambda *_: calls.append("decoder"))
    step = PASSES[name](student, BATCH)
    assert calls == []
    first = {task: step.logits(task) for task in ROWS}
    for task in ROWS:
        losses = torch.nn.functional.cross_entropy(first[task], step.labels(task), reduction="none")
        close(step.token_losses(task), losses)
        close(step.loss(task), losses.mean())
        close(step.project(step.states(task)), first[task])
        step.hidden(task, 0), step.encoder(task, 0)
    assert sorted(calls) == ["decoder", "encoder"]
    # and dropout is on
    assert not torch.allclose(PASSES[name](student, BATCH).logits("label"), first["label"])


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("ignored", [False, True])
def test_tasks_without_rows_or_targets(name: str, ignored: bool) -> None:
    """They have a loss of 0 with a gradient of 0; of a batch of nothing else each parameter has a gradient."""
    student = make_student()
    labels = torch.full_like(BATCH["rationale"]["labels"], IGNORE_INDEX)
    empty = TaskInputs(**(BATCH["rationale"] | {"labels": labels})) if ignored else nothing()
    for batch in (
        {"rationale": empty, "label": BATCH["label"]},
        {"rationale": empty, "label": nothing()},
        {"rationale": empty},
    ):
        step = PASSES[name](student, batch)
        assert step.labels("rationale").tolist() == step.rows("rationale").tolist() == []
        assert step.logits("rationale").shape == (0, VOCABULARY)
        assert step.states("rationale").shape == step.hidden("rationale", 1).shape == (0, 16)
        found = gradients(student, step.loss("rationale"))
        assert float(step.loss("rationale").detach()) == 0
        assert found.keys() == {name for name, _ in student.named_parameters()}
        assert not any(gradient.any() for gradient in found.values())
    close(
        PASSES[name](student, {"rationale": empty, "label": BATCH["label"]}).loss("label"),
        plain_loss(student, ROWS["label"]),
    )


def test_targets_with_holes_count_what_is_left() -> None:
    student = make_student()
    batch = copy.deepcopy(BATCH)
    batch["label"]["labels"][0, 0] = batch["rationale"]["labels"][1, 1] = IGNORE_INDEX
    packed, plain = PackedPass(student, batch), PlainPass(student, batch)
    for task in ROWS:
        for read in ("labels", "rows", "states", "logits", "token_losses", "loss"):
            close(getattr(packed, read)(task), getattr(plain, read)(task))
        close(packed.hidden(task, 1), plain.hidden(task, 1))


@pytest.mark.parametrize("name", PASSES)
def test_a_task_that_the_batch_does_not_hold(name: str) -> None:
    step = PASSES[name](make_student(), BATCH)
    for read in (step.labels, step.loss, step.logits, step.states, step.encoder):
        with pytest.raises(KeyError, match="no task 'lable' in this batch, which holds label, rationale"):
            read("lable")


# ------------------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize(("kind", "name"), EVERY)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation(kind: str, name: str, num_beams: int) -> None:
    # transformers' own cache has as many layers as the encoder
    student = make_student(kind, num_layers=2, num_decoder_layers=2).eval()
    model: Any = student.model
    settings: Any = {"max_new_tokens": 7, "num_beams": num_beams}

    def written(ids: list[int]) -> list[int]:
        return [token for token in ids if token != 0]

    expected = {
        task: [
            written(model.generate(input_ids=torch.tensor([source]), do_sample=False, **settings)[0, 1:].tolist())
            for source, _ in rows
        ]
        for task, rows in ROWS.items()
    }
    for read_before in (False, True):
        step = PASSES[name](student, BATCH)
        if read_before:
            with torch.no_grad():
                step.loss("label")
        for task, own in expected.items():
            assert list(map(written, step.generate(task, **settings))) == own
            assert list(map(written, step.generate(task, rows=[2, 0], **settings))) == [own[2], own[0]]
            assert step.generate(task, rows=[], **settings) == []


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_logits_one_token_at_a_time(kind: str, name: str) -> None:
    student = make_student(kind, num_layers=2, num_decoder_layers=2).eval()
    for task, rows in ROWS.items():
        found = logits_one_by_one(PASSES[name](student, BATCH), task, rows)
        close(found, torch.cat([alone(student, *row).logits[0] for row in rows]))


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_logits_are_processed_row_by_row(name: str, num_beams: int) -> None:
    student = make_student().eval()
    seen: set[tuple[int, int]] = set()

    def process(scores: Tensor, step: int, rows: Tensor) -> Tensor:
        assert scores.shape == (len(rows), VOCABULARY)
        seen.update((step, row) for row in rows.tolist())
        # row r writes 10 + r, then ends
        wanted = torch.where(torch.tensor(step > 0), EOS, 10 + rows)
        return torch.full_like(scores, -1e9).scatter(1, wanted[:, None], 0.0)

    step = PASSES[name](student, BATCH)
    found = step.generate("label", rows=[3, 1, 3], max_new_tokens=5, num_beams=num_beams, process_logits=process)
    assert found == [[10, EOS], [11, EOS], [12, EOS]]
    assert {(0, 0), (0, 1), (1, 2), (1, 1)} <= seen


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_scores_are_sums_of_log_probabilities(monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    student = make_student(kind).eval()
    choices = [("a b", "c"), (), ("yes",), ("no", "the cat is red", "a b")]
    expected: list[list[float]] = []
    for (source, _), own in zip(ROWS["label"], choices, strict=True):
        expected.append([])
        for choice in own:
            target = student.tokenizer(choice)["input_ids"]
            assert target[-1] == EOS
            logs = torch.log_softmax(alone(student, source, target).logits[0], -1)
            expected[-1].append(float(logs[range(len(target)), target].detach().sum()))
    for at_once in (256, 2):
        monkeypatch.setattr(base, "CHOICES_AT_ONCE", at_once)
        found = PASSES[name](student, BATCH).score("label", choices)
        assert [len(own) for own in found] == [2, 0, 1, 3]
        for ours, plain in zip(found, expected, strict=True):
            assert ours == pytest.approx(plain, rel=1e-4)
    assert PASSES[name](student, BATCH).score("label", [(), (), (), ()]) == [[], [], [], []]


def test_the_sources_are_encoded_once_for_losses_and_answers() -> None:
    student, calls = make_student().eval(), []
    step = PackedPass(student, BATCH)
    blocks: Any = student.model.encoder.block  # type: ignore[union-attr]
    blocks[0].layer[0].SelfAttention.q.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        step.loss("label")
    step.generate("rationale", max_new_tokens=3)
    step.score("label", [("a",)] * 4)
    assert calls == [1]


# ------------------------------------------------------------------------------------------------ the student


def test_which_pass_is_taken_and_why_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(seq2seq, "rank_zero_info", said.append)
    student = make_student()
    left = copy.deepcopy(BATCH)
    left["label"]["attention_mask"] = left["label"]["attention_mask"].flip(1)
    assert isinstance(student(BATCH), PackedPass)
    assert isinstance(make_student("mt5")(BATCH), PackedPass)
    assert said == []
    student.path = "plain"
    assert isinstance(student(BATCH), PlainPass)
    assert said == []
    student.path = "packed"
    for _ in range(2):
        assert isinstance(student(left), PlainPass)
    student.sharded = True
    assert isinstance(student(BATCH), PlainPass)
    assert [line for line in said if "padding" in line] == [
        "fast: off, for a batch, it has padding before a source's end, or a row without a source"
    ]
    assert "fast: off, the parameters are sharded" in said


@pytest.mark.parametrize(
    ("fast", "path"),
    [
        (True, "packed"),
        (False, "plain"),
        ("auto", "packed"),
        *((name, name) for name in ("packed", "plain", "compiled")),
    ],
)
def test_the_setting_is_a_path(tmp_path: Path, fast: Any, path: str) -> None:
    student: Any = students.load(make_student_folder(tmp_path / "a"), from_scratch=True, fast=fast)
    assert student.path == path


def test_a_path_that_there_is_not(tmp_path: Path) -> None:
    wrong: Any = "quick"
    with pytest.raises(UserError, match="fast must be one of True, False, auto, plain, packed, compiled, got 'quick'"):
        students.load(make_student_folder(tmp_path / "a"), from_scratch=True, fast=wrong)


def test_a_student_by_name(tmp_path: Path) -> None:
    folder = make_student_folder(tmp_path / "a", dropout_rate=0.1)
    student = students.load(folder, from_scratch=True, dropout=0.3, activation_checkpointing=True)
    assert isinstance(student, Seq2SeqStudent)
    assert student.training
    assert {m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    assert all(name.startswith("model.") for name in student.state_dict())
    network: Any = student.model
    assert network.encoder.block[0].gradient_checkpointing
    student.save(tmp_path / "b")
    again = students.load(tmp_path / "b").eval()
    with torch.no_grad():
        assert torch.equal(again(BATCH).loss("label"), student.eval()(BATCH).loss("label"))


@pytest.mark.parametrize("kind", ["mt5", "v1.0"])
def test_every_model_of_the_family_is_saved_and_kept(tmp_path: Path, kind: str) -> None:
    folder = make_student_folder(tmp_path / "a", **KINDS[kind])
    student = students.load(folder, from_scratch=True).eval()
    student.save(tmp_path / "b")
    checkpoint = {
        "lit_distill_student": student.record(),
        "state_dict": {f"student.{name}": tensor for name, tensor in student.state_dict().items()},
    }
    torch.save(checkpoint, tmp_path / "c.ckpt")
    with torch.no_grad():
        assert isinstance(student, Seq2SeqStudent)
        expected = PlainPass(student, BATCH).logits("label")
        for name in ("b", "c.ckpt"):
            again = students.load(tmp_path / name).eval()
            assert torch.equal(PlainPass(again, BATCH).logits("label"), expected)  # type: ignore[arg-type]
        plain = Seq2SeqStudent(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "b"), student.tokens)
        close(PlainPass(plain, BATCH).logits("label"), expected)
    assert json.loads((tmp_path / "b/config.json").read_text())["model_type"] == student.model.config.model_type


def test_a_students_bytes_are_tokens(tmp_path: Path) -> None:
    folder = make_student_folder(tmp_path / "a", vocab_size=384)
    ByT5Tokenizer().save_pretrained(folder)
    student = students.load(folder, from_scratch=True)
    tokens = student.tokens
    # bytes come after three special tokens
    assert tokens.targets(["cat"], 9).ids == [[99 + 3, 97 + 3, 116 + 3, EOS]]
    assert tokens.sources(["cat"], 3).ids == [[102, 100, EOS]]
    assert tokens.decode([[102, 100, 119, EOS, 0, IGNORE_INDEX]]) == ["cat"]
    student.save(tmp_path / "b")
    assert students.load_tokens(tmp_path / "b").fingerprint == tokens.fingerprint


def test_a_tokenizer_beyond_the_vocabulary(tmp_path: Path) -> None:
    folder = make_student_folder(tmp_path, vocab_size=9)
    with pytest.raises(UserError, match=r"^student: the tokenizer of .* has 64 tokens, .* vocab_size is 9$"):
        students.load(folder, from_scratch=True)


def test_a_tokenizer_without_padding(tmp_path: Path) -> None:
    folder = make_student_folder(tmp_path)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))
    with pytest.raises(UserError, match=r"^tokenizer: .* has no padding token"):
        students.load(folder, from_scratch=True)
