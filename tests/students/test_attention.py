"""Attention scores are products of queries and keys, computed by hand from the weights of each row alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_distill import students
from lit_distill.batch import TaskBatch
from lit_distill.errors import UserError
from lit_distill.students import Student
from lit_distill.students.attention import Attention
from lit_distill.students.seq2seq import PackedPass
from tests.students import add_weights, make_student_folder
from tests.students import test_causal as causal
from tests.students import test_seq2seq as seq2seq
from tests.students.plain import Rows, gradients, nothing

FAMILIES: dict[str, tuple[Any, dict[str, Rows], TaskBatch]] = {
    "t5": (seq2seq.make_student, seq2seq.ROWS, seq2seq.BATCH),
    "llama": (causal.make_student, causal.ROWS, causal.BATCH),
}
KINDS: list[Attention] = ["encoder", "decoder", "cross"]
STUDENTS: list[tuple[str, str, dict[str, Any]]] = [("t5", kind, {}) for kind in ("v1.0", "v1.1", "byt5", "mt5")]
STUDENTS += [("llama", kind, {}) for kind in ("llama", "qwen2", "gpt2")]
# two heads share each key
STUDENTS += [("llama", "llama", {"num_attention_heads": 4, "num_key_value_heads": 2})]


def recording(family: str, *arguments: str, **changes: Any) -> tuple[Student, dict[str, Rows], TaskBatch]:
    make, rows, batch = FAMILIES[family]
    student = make(*arguments, **changes)
    student.record_attention("a test")
    return student, rows, batch


def split(found: Tensor, pairs: Tensor) -> list[Tensor]:
    """Scores of a task to those of each row, ``(pairs, heads)``."""
    return list(found.split(pairs.sum((1, 2)).tolist()))


def heads(states: Tensor, linear: Any, number: int) -> Tensor:
    """Projected by hand, ``(heads, tokens, d_head)``."""
    projected: Tensor = states @ linear.weight.T
    return projected.view(len(states), number, -1).transpose(0, 1)


def t5_scores(student: Any, source: list[int], target: list[int], layer: int, kind: Attention) -> Tensor:
    """Layers are from 0. ``(heads, query_len, key_len)``."""
    block = getattr(student.model, "encoder" if kind == "encoder" else "decoder").block[layer]
    module = block.layer[1].EncDecAttention if kind == "cross" else block.layer[0].SelfAttention
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0]))
    output = seq2seq.alone(student, source, target)
    hook.remove()
    keys = output.encoder_last_hidden_state[0] if kind == "cross" else seen[0]
    scores: Tensor = heads(seen[0], module.q, 2) @ heads(keys, module.k, 2).mT
    if kind == "cross":
        return scores
    first = getattr(student.model, kind).block[0].layer[0].SelfAttention
    bias: Tensor = first.compute_bias(len(keys), len(keys))[0]
    return scores + bias


def llama_scores(student: Any, source: list[int], target: list[int], layer: int) -> Tensor:
    block, config = student.model.model.layers[layer], student.model.config
    states = block.input_layernorm(causal.alone(student, source, target).hidden_states[layer][0])
    size = config.hidden_size // config.num_attention_heads
    # each pair (i, i + size / 2) of a vector's entries is turned by position / 10000^(2 i / size)
    angles = torch.arange(len(states))[:, None] / 10000 ** (torch.arange(0, size, 2) / size)

    def turned(vectors: Tensor) -> Tensor:
        left, right = vectors.chunk(2, dim=-1)
        return torch.cat(
            [left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], dim=-1
        )

    queries = turned(heads(states, block.self_attn.q_proj, config.num_attention_heads))
    # one key for both heads
    keys = turned(heads(states, block.self_attn.k_proj, 1))
    scores: Tensor = queries @ keys.mT / size**0.5
    return scores


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_t5(kind: Attention, layer: int) -> None:
    student, rows, batch = recording("t5")
    step = student(batch)
    for task in rows:
        pairs = step.pairs(task, kind)
        for (source, target), found in zip(rows[task], split(step.attention(task, layer, kind), pairs), strict=True):
            expected = t5_scores(student, source, target, layer - 1, kind)
            if kind == "decoder":
                expected = expected[:, torch.ones(len(target), len(target)).tril() > 0].T
            else:
                expected = expected.flatten(1).T
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [1, 2])
def test_llama(layer: int) -> None:
    student, rows, batch = recording("llama")
    step = student(batch)
    for task in rows:
        pairs = step.pairs(task, "decoder")
        own = split(step.attention(task, layer, "decoder"), pairs)
        for (source, target), found in zip(rows[task], own, strict=True):
            length = len(source + target)
            expected = llama_scores(student, source, target, layer - 1)[:, torch.ones(length, length).tril() > 0].T
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "kind", "changes"), STUDENTS, ids=str)
def test_their_softmax_is_what_hugging_face_returns(family: str, kind: str, changes: dict[str, Any]) -> None:
    student, rows, batch = recording(family, kind, **changes)
    step, plain = student(batch), FAMILIES[family][0](kind, **changes).network.eval()
    plain.set_attn_implementation("eager")
    for task in rows:
        for number, (source, target) in enumerate(rows[task]):
            given = {"input_ids": torch.tensor([source + target])}
            if family == "t5":
                given = {"input_ids": torch.tensor([source]), "labels": torch.tensor([target])}
            output = plain(**given, output_attentions=True)
            for which in student.attentions:
                name = "cross_attentions" if which == "cross" else f"{which}_attentions"
                for layer, weights in enumerate(output[name if family == "t5" else "attentions"], start=1):
                    pairs = step.pairs(task, which)
                    scores = torch.full_like(weights[0], -torch.inf)
                    real = pairs[number][: weights.shape[2], : weights.shape[3]]
                    scores[:, real] = split(step.attention(task, layer, which), pairs)[number].T
                    torch.testing.assert_close(scores.softmax(-1), weights[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_changes_nothing_else(family: str, tmp_path: Path) -> None:
    student, _, batch = recording(family)
    plain = FAMILIES[family][0]()
    plain.path = "plain"
    found, expected = ((each, each(batch).loss("label")) for each in (student, plain))
    assert torch.equal(found[1], expected[1])
    for left, right in zip(*(gradients(*each).values() for each in (found, expected)), strict=True):
        assert torch.equal(left, right)
    assert student(batch).generate("label", max_new_tokens=4) == plain(batch).generate("label", max_new_tokens=4)
    for name, each in (("recorded", student), ("plain", plain)):
        each.save(tmp_path / name)
    assert (tmp_path / "recorded/config.json").read_text() == (tmp_path / "plain/config.json").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_go_through_layers_that_are_computed_again(family: str) -> None:
    found = []
    for again in (False, True):
        student, _, batch = recording(family)
        if again:
            network: Any = student.network
            enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        step = student.train()(batch)
        term = sum(step.attention("label", 2, kind).square().sum() for kind in student.attentions)
        found.append(gradients(student, term))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_without_rows_has_no_scores(family: str) -> None:
    student, _, batch = recording(family)
    for tasks in (batch | {"rationale": nothing()}, {"rationale": nothing()}):
        step = student(tasks)
        for kind in student.attentions:
            scores = step.attention("rationale", 1, kind)
            assert scores.shape == (0, 2)
            scores.sum().backward(retain_graph=True)


def test_t5_says_why_it_is_not_fast(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    student, _, batch = recording("t5")
    with caplog.at_level("INFO"):
        assert not isinstance(student(batch), PackedPass)
        student(batch)
    assert [record.message for record in caplog.records] == ["fast: off, an objective reads attention scores"]


def test_a_model_that_has_none_is_refused() -> None:
    for changes, said in (
        ({"model_type": "mamba", "state_size": 4, "pad_token_id": 1}, "a MambaForCausalLM does not run on PyTorch's"),
        ({"model_type": "gemma2", "head_dim": 8, "pad_token_id": 1}, "a Gemma2ForCausalLM does not run on PyTorch's"),
        (
            {"model_type": "gemma3_text", "head_dim": 8, "pad_token_id": 1},
            "not every layer of a Gemma3ForCausalLM attends to all tokens",
        ),
    ):
        with pytest.raises(UserError, match=f"^objectives: x: no attention scores: {said}"):
            causal.make_student("llama", **changes).record_attention("objectives: x")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_recorded_on_request(family: str) -> None:
    make, _, batch = FAMILIES[family]
    with pytest.raises(RuntimeError, match="attention is not recorded"):
        make()(batch).attention("label", 1, "decoder")


def test_with_an_adapter(tmp_path: Path) -> None:
    folder = add_weights(make_student_folder(tmp_path / "tiny"))
    found = []
    for adapter in (None, {"r": 2}):
        torch.manual_seed(1)
        student = students.load(str(folder), adapter=adapter)
        student.record_attention("a test")
        found.append(student.eval()(seq2seq.BATCH).attention("label", 1, "cross"))
    # LoRA begins as no change
    torch.testing.assert_close(*found)
