"""The feed-forward sublayer in chunks, against the plain layer and against finite differences."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5LayerFF

from lit_distill.students import build_model
from lit_distill.students.fast import feed_forward
from lit_distill.students.fast.feed_forward import chunks_well, feed_forward_sublayer
from lit_distill.students.fast.functions import apply
from tests.students.fast.examples import target_losses


def make_layer(**changes: object) -> T5LayerFF:
    torch.manual_seed(0)
    settings = {"d_model": 12, "d_ff": 20, "num_heads": 2, "d_kv": 4, "feed_forward_proj": "gated-gelu"}
    layer = T5LayerFF(T5Config.from_dict(settings | {"dropout_rate": 0.0} | changes))
    with torch.no_grad():
        layer.layer_norm.weight.normal_(1.0, 0.3)
    return layer


@pytest.mark.parametrize("chunk", [1, 4, 9, 10, 100])
def test_value_and_gradients_are_the_layer_s(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(feed_forward, "CHUNK", chunk)
    layer = make_layer()
    found = []
    for run in (feed_forward_sublayer, lambda layer, x: layer(x)):
        layer.zero_grad()
        torch.manual_seed(1)
        x = torch.randn(10, 12, requires_grad=True)
        out = run(layer, x)
        (out * torch.randn(10, 12)).sum().backward()
        assert x.grad is not None
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        assert len(gradients) == 4
        found.append([out.detach(), x.grad, *gradients])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("p_inner", "p_out"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.4, 0.2)])
def test_gradients_under_dropout_are_finite_differences(
    monkeypatch: pytest.MonkeyPatch, p_inner: float, p_out: float
) -> None:
    monkeypatch.setattr(feed_forward, "CHUNK", 3)
    torch.manual_seed(2)
    inputs = [torch.randn(*shape, dtype=torch.double) for shape in ((5, 4), (4,), (6, 4), (6, 4), (4, 6))]

    def run(*given: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same masks each time
        return apply(feed_forward._FeedForward, *given, 1e-6, p_inner, p_out)

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in inputs])


def test_dropout_keeps_the_mean() -> None:
    layer = make_layer(dropout_rate=0.25)
    x = torch.randn(6, 12)
    with torch.no_grad():
        plain = layer.eval()(x)
        layer.train()
        # the inner dropout acts before a linear map and the outer one after it: both leave the mean as it is
        runs = torch.stack([feed_forward_sublayer(layer, x) for _ in range(4000)])
    error = (runs.mean(0) - plain) / (runs.std(0) / 4000**0.5).clamp(min=1e-6)
    assert error.abs().max() < 5
    assert not torch.equal(runs[0], runs[1])


def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    x = torch.randn(8, 12)
    assert not chunks_well(layer, x)
    monkeypatch.setattr(feed_forward, "WORTH", 8)
    assert chunks_well(layer, x)
    assert not chunks_well(layer, x[:7])
    assert not chunks_well(layer, x.bfloat16())
    assert not chunks_well(make_layer(feed_forward_proj="gated-silu", dense_act_fn="silu"), x)
    assert not chunks_well(make_layer(feed_forward_proj="relu", dense_act_fn="relu", is_gated_act=False), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not chunks_well(layer, x)
    layer.DenseReluDense.wi_0 = torch.nn.Sequential(layer.DenseReluDense.wi_0)  # type: ignore[assignment]
    assert not chunks_well(layer, x)


def test_a_student_that_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, "WORTH", 1)
    monkeypatch.setattr(feed_forward, "CHUNK", 5)
    torch.manual_seed(4)
    student = build_model(
        {"model_type": "t5", "vocab_size": 40, "d_model": 16, "d_ff": 24, "num_heads": 2, "d_kv": 8, "num_layers": 2,
         "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
         "decoder_start_token_id": 0, "pad_token_id": 0, "dropout_rate": 0.0}
    )  # fmt: skip
    ids, labels = torch.randint(2, 40, (3, 9)), torch.randint(2, 40, (3, 5))
    mask = torch.ones_like(ids)
    (losses,) = target_losses(student, [{"input_ids": ids, "attention_mask": mask, "labels": labels}])
    losses.mean().backward()
    ours = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    plain = student(input_ids=ids, attention_mask=mask, labels=labels).loss
    plain.backward()
    assert float(losses.mean().detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
    assert len(ours) == len(list(student.parameters()))
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        assert float((ours[name] - parameter.grad).norm()) < 1e-5 * float(parameter.grad.norm()), name


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "hook": lambda linear: linear.register_forward_hook(lambda module, given, out: out * 0.5),
    "own forward": lambda linear: setattr(linear, "forward", lambda x: nn.functional.linear(x, linear.weight) * 0.5),
    "normed weight": lambda linear: nn.utils.parametrizations.weight_norm(linear),
    "old normed weight": lambda linear: nn.utils.weight_norm(linear),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["wi_0", "wi_1", "wo"])
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_matrices_that_are_listened_to_or_changed(monkeypatch: pytest.MonkeyPatch, change: str, name: str) -> None:
    monkeypatch.setattr(feed_forward, "WORTH", 1)
    layer = make_layer()
    x = torch.randn(3, 12)
    assert chunks_well(layer, x)
    CHANGES[change](getattr(layer.DenseReluDense, name))
    assert not chunks_well(layer, x)
