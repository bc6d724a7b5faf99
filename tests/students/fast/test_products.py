"""Matrix products by either library, against the same in float64."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_distill.students.fast import products
from lit_distill.students.fast.products import linear, onednn_is_faster, product
from tests.students.fast.examples import TASKS, fast_losses, gradients, make_student

NEEDS_ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture(params=[False, pytest.param(True, marks=NEEDS_ONEDNN)], ids=["blas", "onednn"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    return bool(request.param)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each product by oneDNN."""
    found: list[int] = []
    plain = products._onednn

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        found.append(len(x))
        return plain(x, weight)

    monkeypatch.setattr(products, "_onednn", counted)
    return found


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 3, 5), (7, 16, 4), (130, 64, 33)])
def test_products_of_any_strides(rows: int, inputs: int, outputs: int) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    expected = (x.double() @ weight.double().t()).float()
    for a in (x, x.t().contiguous().t()):
        for b in (weight, weight.t().contiguous().t()):
            torch.testing.assert_close(product(a, b), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product(x, weight[:, ::1][::2]), expected[:, ::2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [None, "x", "weight"])
def test_gradients_of_a_layer(onednn: bool, seen: list[int], frozen: str | None) -> None:
    layer, x, towards = nn.Linear(12, 20, bias=False), torch.randn(9, 12), torch.randn(9, 20)
    x.requires_grad_(frozen != "x")
    layer.weight.requires_grad_(frozen != "weight")
    out = linear(layer, x)
    out.backward(towards)
    wide, given = layer.weight.detach().double(), x.detach().double()
    torch.testing.assert_close(out, (given @ wide.t()).float(), rtol=1e-5, atol=1e-5)
    expected = {
        "x": (x.grad, towards.double() @ wide),
        "weight": (layer.weight.grad, towards.double().t() @ given),
    }
    for name, (gradient, right) in expected.items():
        if name == frozen:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, right.float(), rtol=1e-5, atol=1e-5)
    assert len(seen) == (0 if not onednn else 3 if frozen is None else 2)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@NEEDS_ONEDNN
@pytest.mark.parametrize("kind", ["bias", "subclass", "hook", "bfloat16", "autocast", "float64"])
def test_other_layers_are_called(monkeypatch: pytest.MonkeyPatch, seen: list[int], kind: str) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    layer = (Doubled if kind == "subclass" else nn.Linear)(12, 20, bias=kind == "bias")
    layer.to({"bfloat16": torch.bfloat16, "float64": torch.float64}.get(kind, torch.float32))
    if kind == "hook":
        layer.register_forward_hook(lambda module, given, out: out + 1)
    x = torch.randn(9, 12, dtype=layer.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        assert torch.equal(linear(layer, x), layer(x))
    assert not seen


@NEEDS_ONEDNN
def test_a_student_by_both_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[Any, Any]] = []
    for choice in (False, True):
        monkeypatch.setattr(products, "onednn_is_faster", lambda choice=choice: choice)
        student = make_student(1).eval()
        losses = fast_losses(student, TASKS)
        found.append(([float(loss.detach()) for loss in losses], gradients(student, losses)))
    (losses, slopes), (other, others) = found
    assert losses == pytest.approx(other, rel=1e-5)
    for name, slope in slopes.items():
        torch.testing.assert_close(slope, others[name], rtol=1e-4, atol=1e-6, msg=name)


ZEN_5 = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n"


@pytest.fixture
def on_zen_5(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The file that tells the processor."""
    info = tmp_path / "cpuinfo"
    info.write_text(ZEN_5)
    monkeypatch.setattr(products, "CPU_INFO", info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    onednn_is_faster.cache_clear()
    yield info
    onednn_is_faster.cache_clear()


@NEEDS_ONEDNN
def test_onednn_is_taken_on_zen_5(on_zen_5: Path) -> None:
    assert onednn_is_faster()


@pytest.mark.parametrize(
    ("old", "new"),
    [("26", "25"), ("AuthenticAMD", "GenuineIntel"), ("cpu family", "CPU part")],
    ids=["zen 4", "intel", "arm"],
)
def test_other_processors_keep_the_blas(on_zen_5: Path, old: str, new: str) -> None:
    on_zen_5.write_text(ZEN_5.replace(old, new))
    assert not onednn_is_faster()


@pytest.mark.parametrize("lacks", ["onednn", "avx512", "file"])
def test_where_there_is_no_choice(on_zen_5: Path, monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    if lacks == "onednn":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif lacks == "avx512":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    else:
        on_zen_5.unlink()
    assert not onednn_is_faster()
