"""The elementwise functions against autograd of the plain expressions, and dropout against its own definition."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lit_distill.students.fast.functions import add_dropped, dropout, dropout_mask, rms_norm

LANES = 65536


def mask_of(shape: tuple[int, ...], p: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What dropout of this seed keeps, times its factor, seen from outside."""
    torch.manual_seed(seed)
    return dropout(torch.ones(shape, dtype=dtype), p)


# ------------------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_the_share_that_is_dropped(p: float) -> None:
    number = 400_000
    torch.manual_seed(1)
    mask, factor = dropout_mask(torch.empty(number), p)
    assert mask.dtype == torch.bool
    # a draw of 16 bits: p to the next 65536th
    rounded = round(p * LANES) / LANES
    assert abs(rounded - p) <= 0.5 / LANES
    assert factor == LANES / (LANES - round(p * LANES))
    error = (number * rounded * (1 - rounded)) ** 0.5
    assert abs(int((~mask).sum()) - number * rounded) < 4.5 * error
    # the mean of what is kept stays
    assert abs(float((mask.double() * factor).mean()) - 1) < 4.5 * error * factor / number


@pytest.mark.parametrize("p", [1e-6, 7e-6])
def test_a_tiny_probability_drops_nothing(p: float) -> None:
    mask, factor = dropout_mask(torch.empty(100_000), p)
    assert bool(mask.all())
    assert factor == 1.0


def test_the_smallest_probability_that_drops() -> None:
    number = 2_000_000
    torch.manual_seed(1)
    mask, factor = dropout_mask(torch.empty(number), 1 / LANES)
    assert factor == LANES / (LANES - 1)
    # Poisson of mean 30.5
    assert 8 < int((~mask).sum()) < 62


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("distance", [1, 2, 3, 4, 64])
def test_elements_are_independent(p: float, distance: int) -> None:
    number = 400_000
    torch.manual_seed(2)
    mask = dropout_mask(torch.empty(number + distance), p)[0].double()
    mask = mask - mask.mean()
    correlation = float((mask[:-distance] * mask[distance:]).mean() / mask.square().mean())
    assert abs(correlation) < 4.5 / number**0.5


@pytest.mark.parametrize("lane", range(4))
def test_each_lane_of_a_draw_drops_as_much(lane: int) -> None:
    torch.manual_seed(3)
    own = dropout_mask(torch.empty(400_000), 0.1)[0][lane::4]
    assert abs(float((~own).double().mean()) - 0.1) < 4.5 * (0.1 * 0.9 / len(own)) ** 0.5


def test_the_seed_decides() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return dropout_mask(torch.empty(33, 7), 0.5)[0]

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    torch.manual_seed(5)
    first, second = (dropout_mask(torch.empty(33, 7), 0.5)[0] for _ in range(2))
    assert not torch.equal(first, second), "the generator has moved on"


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3,), (5,), (3, 7), (2, 3, 5), (0,), (0, 4)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    mask, factor = dropout_mask(torch.empty(shape), 0.5)
    assert mask.shape == shape
    assert factor == 2.0
    x = torch.randn(shape, requires_grad=True)
    assert dropout(x, 0.5).shape == shape
    dropout(x, 0.5).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


# ------------------------------------------------------------------------------------------------ with dropout


SHAPE = (7, 9)
P = 0.3


def test_dropout_and_its_gradient_use_one_mask() -> None:
    factor = LANES / (LANES - round(P * LANES))
    x = torch.randn(SHAPE, requires_grad=True)
    torch.manual_seed(4)
    out = dropout(x, P)
    weights = torch.randn(SHAPE)
    (grad,) = torch.autograd.grad(out, x, weights)
    scale = mask_of(SHAPE, P, 4)
    assert {round(value, 5) for value in scale.flatten().tolist()} == {0.0, round(factor, 5)}
    torch.testing.assert_close(out, x * scale)
    torch.testing.assert_close(grad, weights * scale)


def test_a_dropped_sum_is_the_plain_expression() -> None:
    a, b = (torch.randn(SHAPE, requires_grad=True) for _ in range(2))
    weights = torch.randn(SHAPE)
    torch.manual_seed(4)
    out = add_dropped(a, b, P)
    plain = a + b * mask_of(SHAPE, P, 4)
    torch.testing.assert_close(out, plain)
    found = torch.autograd.grad(out, (a, b), weights)
    torch.testing.assert_close(found, torch.autograd.grad(plain, (a, b), weights))


def test_backward_leaves_the_incoming_gradient_alone() -> None:
    a, b = (torch.randn(SHAPE, requires_grad=True) for _ in range(2))
    weights = torch.randn(SHAPE)
    before = weights.clone()
    for out in (add_dropped(a, b, P), dropout(a, P), rms_norm(a, torch.ones(9), 1e-6)):
        out.backward(weights)
        assert torch.equal(weights, before)


@pytest.mark.parametrize("p", [0.1, 0.3])
def test_dropout_in_bfloat16_keeps_the_mean(p: float) -> None:
    # to half of bfloat16's spacing: the factor is rounded, as PyTorch's own dropout does on the CPU
    x = torch.rand(400_000).add(1).bfloat16()
    for out in (dropout(x, p), add_dropped(torch.zeros_like(x), x, p)):
        kept_part = out != 0
        found = out[kept_part].double().mean() / x[kept_part].double().mean()
        assert float(found) == pytest.approx(LANES / (LANES - round(p * LANES)), rel=2**-8)


def test_without_dropout_nothing_is_drawn() -> None:
    a, b = (torch.randn(SHAPE) for _ in range(2))
    state = torch.get_rng_state()
    assert torch.equal(dropout(a, 0.0), a)
    assert torch.equal(add_dropped(a, b, 0.0), a + b)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["dropout", "add_dropped"])
def test_numerical_gradients(name: str) -> None:
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "dropout": lambda a, b: dropout(a, P) + 0 * b,
        "add_dropped": lambda a, b: add_dropped(a, b, P),
    }

    def seeded(a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(3)
        found: Tensor = functions[name](a, b)
        return found

    a, b = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(seeded, (a, b))


def test_bfloat16_beside_float32() -> None:
    # as under autocast: the residual stays in float32
    residual = torch.randn(SHAPE, requires_grad=True)
    x = torch.randn(SHAPE, dtype=torch.bfloat16, requires_grad=True)
    torch.manual_seed(4)
    out = add_dropped(residual, x, P)
    assert out.dtype == torch.float32
    scale = mask_of(SHAPE, P, 4)
    torch.testing.assert_close(out, residual + x.float() * scale, rtol=1e-2, atol=1e-2)
    found = torch.autograd.grad(out, (residual, x), torch.ones(SHAPE))
    assert [gradient.dtype for gradient in found] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(found[1].float(), scale, rtol=1e-2, atol=0)


# ------------------------------------------------------------------------------------------------ the norm


def norms(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Value and gradients, ours and Hugging Face's."""
    plain = T5LayerNorm(x.shape[-1], eps)
    plain.weight.data = weight.clone()
    found = []
    torch.manual_seed(8)
    towards = torch.randn(x.shape)
    for own in (False, True):
        inputs = x.clone().requires_grad_()
        scale = weight.clone().requires_grad_()
        if own:
            out = rms_norm(inputs, scale, eps)
        else:
            plain.weight = torch.nn.Parameter(scale)
            out, scale = plain(inputs), plain.weight
        found.append((out.detach(), *torch.autograd.grad(out, (inputs, scale), towards.to(out.dtype))))
    return found[1], found[0]


ROWS = {
    "usual": (1.0, 1.0, 1.0),
    "one row": (1.0,),
    "zeros": (0.0, 0.0),
    "large": (1e4, 1e4, 1e6),
    "near eps": (1e-4, 1e-3),
    "mixed": (0.0, 1e6, 1.0, 1e-6),
}


@pytest.mark.parametrize("sizes", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_norm_in_float32(sizes: tuple[float, ...], eps: float) -> None:
    rows = torch.randn(len(sizes), 16) * torch.tensor(sizes)[:, None]
    ours, plain = norms(rows, torch.randn(16), eps)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=1e-6)
    # a gradient that cancels to little is measured by what cancels
    scales = plain[1].abs().amax(1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(ours[1] / scales, plain[1] / scales, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[2], plain[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("of_x", "of_weight"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_norm_in_bfloat16(of_x: torch.dtype, of_weight: torch.dtype) -> None:
    ours, plain = norms(torch.randn(6, 16).to(of_x), torch.randn(16).to(of_weight))
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    for found, expected in zip(ours, plain, strict=True):
        # two units in the last place of 8 bits, of the largest element where sums cancel
        size = float(expected.abs().amax())
        torch.testing.assert_close(found.float(), expected.float(), rtol=2**-6, atol=2**-6 * size)


def test_norm_by_hand() -> None:
    # mean square of (3, 4) is 12.5
    out = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, -2.0]), 0.0)
    torch.testing.assert_close(out, torch.tensor([[3 / 12.5**0.5, -8 / 12.5**0.5]]))
