"""What the machine gives at most: the student's own matrix products, and nothing in between."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from measure import seconds_of
from operations import Shape, Tokens, linears
from options import Settings
from torch import Tensor
from workers import Turn

from lit_distill.students.fast.products import product

REPEATS = 2
"""The best of so many counts: a ceiling is not an average."""
ENOUGH_ROWS = 2048
"""A CPU multiplies more rows no faster."""


def ceiling_process(turn: Turn, settings: Settings, backward: bool) -> None:
    """Measure each time when told; a process of its own, as these matrices would count in a side's peak memory.

    Args:
        turn: is told a student's shape and tokens a batch once, and answers operations a second from then on.
        settings: the benchmark's.
        backward: also the two products of each layer's backward pass.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    shape, tokens = turn.wait()
    while True:
        turn.answer(measure_ceiling(shape, tokens, dtype=dtype, device=settings.device, backward=backward))
        turn.wait()


def measure_ceiling(
    shape: Shape,
    tokens: Mapping[Tokens, int],
    *,
    dtype: torch.dtype,
    device: str,
    backward: bool,
) -> float:
    """Operations a second of the student's own matrix products.

    Args:
        shape: the student's.
        tokens: source and target tokens in a batch, without padding.
        dtype: what is multiplied.
        device: ``cpu`` or ``cuda``.
        backward: also the two products of each layer's backward pass.
    """
    operations, seconds = 0.0, 0.0
    for linear, count in linears(shape).items():
        whole = max(tokens[linear.tokens], 1)
        rows = min(whole, ENOUGH_ROWS) if device == "cpu" else whole
        x, weight, y = (
            torch.randn(*size, dtype=dtype, device=device)
            for size in ((rows, linear.inputs), (linear.outputs, linear.inputs), (rows, linear.outputs))
        )
        products = [(x, weight.T, torch.empty_like(y))]
        if backward:
            products += [(y, weight, torch.empty_like(x)), (y.T, x, torch.empty_like(weight))]
        for left, right, out in products:
            operations += 2.0 * whole * linear.inputs * linear.outputs * count
            seconds += _best(left, right, out, device) * count * whole / rows
    return operations / seconds


def _best(left: Tensor, right: Tensor, out: Tensor, device: str) -> float:
    """Seconds of one product, by the BLAS into memory that is there already, or by oneDNN where the student uses it."""
    ways: list[Callable[[], Tensor]] = [lambda: torch.mm(left, right, out=out), lambda: product(left, right.t())]
    with as_run():
        for way in ways:
            way()
        return min(seconds_of(way, device) for way in ways for _ in range(REPEATS))


@contextmanager
def as_run() -> Iterator[None]:
    """The precision of matrix products that the command line sets before it runs a trainer, while it runs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
