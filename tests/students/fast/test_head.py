"""The head's losses against `F.cross_entropy` of all logits at once."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_distill.batch import IGNORE_INDEX
from lit_distill.students.fast import functions as head_module
from lit_distill.students.fast.functions import log_probabilities, token_losses

SIZE, VOCABULARY = 8, 50
CHUNKS: dict[str, tuple[int, int]] = {
    # bytes of a chunk and of what is kept, for rows of 200 bytes
    "one chunk": (24 * 2**20, 96 * 2**20),
    "a row a chunk, all kept": (200, 96 * 2**20),
    "chunks of 3, the first 2 kept": (600, 1200),
    "chunks of 3, none kept": (600, 599),
    "smaller than a row": (1, 0),
}
Case = Callable[[], tuple[nn.Linear, Tensor, Tensor]]


@pytest.fixture(params=list(CHUNKS.values()), ids=list(CHUNKS))
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    size, keep = request.param
    monkeypatch.setattr(head_module, "CHUNK_BYTES", size)
    monkeypatch.setattr(head_module, "KEPT_BYTES", keep)


def make(positions: int, ignored: tuple[int, ...] = ()) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(positions)
    labels = torch.randint(0, VOCABULARY, (positions,))
    labels[list(ignored)] = IGNORE_INDEX
    return nn.Linear(SIZE, VOCABULARY, bias=False), torch.randn(positions, SIZE, requires_grad=True), labels


def plain(head: nn.Linear, states: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(states), labels, ignore_index=IGNORE_INDEX, reduction="none")


@pytest.mark.parametrize(
    ("positions", "ignored"), [(1, ()), (1, (0,)), (7, ()), (10, (0, 3, 4, 9)), (6, tuple(range(6)))], ids=str
)
@pytest.mark.usefixtures("chunked")
def test_losses_and_gradients(positions: int, ignored: tuple[int, ...]) -> None:
    head, states, labels = make(positions, ignored)
    found, expected = token_losses(head, states, labels), plain(head, states, labels)
    assert found.shape == (positions,)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert bool((found[list(ignored)] == 0).all())
    # each position's loss is weighed by its own number
    towards = torch.randn(positions)
    wanted = (states, head.weight)
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, towards),
        torch.autograd.grad(expected, wanted, towards),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.usefixtures("chunked")
def test_what_is_frozen_has_no_gradient() -> None:
    head, states, labels = make(10, (2,))
    expected = torch.autograd.grad(plain(head, states, labels).sum(), (states, head.weight))
    head.weight.requires_grad_(False)
    token_losses(head, states, labels).sum().backward()
    assert head.weight.grad is None
    torch.testing.assert_close(states.grad, expected[0])
    head.weight.requires_grad_(True)
    token_losses(head, states.detach(), labels).sum().backward()
    torch.testing.assert_close(head.weight.grad, expected[1])


def test_without_gradients() -> None:
    head, states, labels = make(10, (2,))
    with torch.inference_mode():
        found = token_losses(head, states.detach(), labels)
    torch.testing.assert_close(found, plain(head, states, labels).detach())


def test_backward_twice() -> None:
    head, states, labels = make(10, (2,))
    losses = token_losses(head, states, labels).sum()
    first = torch.autograd.grad(losses, (states, head.weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(losses, (states, head.weight)), first)


def test_by_hand() -> None:
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [1.0]]))
    # logits 0 and ln 3: probabilities 1/4 and 3/4
    states = torch.full((2, 1), 3.0).log()
    found = token_losses(head, states, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.tensor([4.0, 4 / 3]).log())


@pytest.mark.usefixtures("chunked")
def test_autocast_takes_the_head_in_bfloat16() -> None:
    head, states, labels = make(12, (5,))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = token_losses(head, states, labels), plain(head, states, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    left = torch.autograd.grad(found.sum(), (states, head.weight))
    right = torch.autograd.grad(expected.sum(), (states, head.weight))
    assert [x.dtype for x in left] == [torch.float32] * 2
    for x, y in zip(left, right, strict=True):
        torch.testing.assert_close(x, y, rtol=0.03, atol=0.03)


def test_a_label_that_is_almost_sure_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    head, states, _ = make(200)
    with torch.no_grad():
        states *= 20
        labels = head(states).argmax(1)
        sure = plain(head, states, labels) < 0.02
    states, labels = states[sure].requires_grad_(), labels[sure]
    assert len(labels) > 10
    for kept in (0, 2**20):
        monkeypatch.setattr(head_module, "KEPT_BYTES", kept)
        with torch.autocast("cpu", torch.bfloat16):
            losses = token_losses(head, states, labels), plain(head, states, labels)
        found, expected = (torch.autograd.grad(own.sum(), (states, head.weight)) for own in losses)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0.01 * float(y.abs().max()))


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_more_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    positions, chunk = 64, 4
    monkeypatch.setattr(head_module, "CHUNK_BYTES", chunk * 4 * VOCABULARY)
    monkeypatch.setattr(head_module, "KEPT_BYTES", 0)
    head, states, labels = make(positions)
    limit = max(chunk * VOCABULARY, positions * SIZE, SIZE * VOCABULARY)
    assert limit < positions * VOCABULARY
    with Largest() as seen:
        token_losses(head, states, labels).sum().backward()
    assert 0 < seen.elements <= limit


@pytest.mark.parametrize("chunks_kept", [0, 1, 5, 16, 40])
def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch, chunks_kept: int) -> None:
    positions, chunk = 64, 4
    monkeypatch.setattr(head_module, "CHUNK_BYTES", chunk * 4 * VOCABULARY)
    monkeypatch.setattr(head_module, "KEPT_BYTES", chunks_kept * chunk * 4 * VOCABULARY)
    head, states, labels = make(positions)
    sizes: list[int] = []

    def record(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (VOCABULARY,):
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        token_losses(head, states, labels)
    assert sum(sizes) == min(chunks_kept, positions // chunk) * chunk * VOCABULARY


def test_log_probabilities_where_the_default_is_bfloat16() -> None:
    head, states, labels = make(5)
    head, states = head.bfloat16(), states.detach().bfloat16()
    expected = -plain(head, states, labels).float()
    # as under a trainer whose precision is bf16-true
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = log_probabilities(head, states, torch.arange(5), labels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
