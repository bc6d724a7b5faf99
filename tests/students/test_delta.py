"""Deltas: against numpy's decomposition, the bytes on disk, and the student that they give back."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_distill.errors import UserError
from lit_distill.students import load
from lit_distill.students.delta import FILE, allot, compress, restore, size_of, weights_hash, write_delta
from tests.students import add_weights, make_causal_folder, make_causal_tokenizer, make_student_folder


def matrix(rows: int, columns: int) -> Tensor:
    """Of singular values that fall fast."""
    generator = torch.Generator().manual_seed(rows)
    found = torch.randn(rows, columns, generator=generator)
    u, s, vh = torch.linalg.svd(found, full_matrices=False)
    made: Tensor = 1e-3 * (u * s * 0.9 ** torch.arange(len(s))) @ vh
    return made


@pytest.mark.parametrize("shape", [(70, 70), (64, 200), (300, 64)])
def test_what_is_not_rounded_is_the_decomposition(shape: tuple[int, int]) -> None:
    delta = matrix(*shape)
    u, s, vh = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    for rank in (1, 7, min(shape)):
        kept = restore(*compress(delta, {32: rank}), shape, {32: rank})
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert np.abs(kept.double().numpy() - expected).max() < 1e-9
    torch.testing.assert_close(kept, delta, rtol=0, atol=1e-9)


def test_rounding_loses_what_its_bits_say() -> None:
    delta = matrix(128, 256)
    errors = {}
    for bits in (2, 3, 8):
        kept = restore(*compress(delta, {bits: 128}), (128, 256), {bits: 128})
        errors[bits] = float((kept - delta).norm() / delta.norm())
    # of a Gaussian the best levels lose 0.345 and 0.193 of a vector's norm, here of both
    assert 0.3 < errors[2] < 0.6
    assert 0.15 < errors[3] < 0.35
    assert errors[8] < 0.02
    mixed = {8: 2, 3: 32, 2: 94}
    kept = restore(*compress(delta, mixed), (128, 256), mixed)
    assert errors[8] < float((kept - delta).norm() / delta.norm()) < errors[3]


@given(st.integers(64, 900), st.integers(64, 900), st.floats(0.1, 16))
def test_a_budget_is_kept_and_used(rows: int, columns: int, bits: float) -> None:
    ranks = allot((rows, columns), bits)
    assert all(rank >= 0 for rank in ranks.values())
    assert sum(ranks.values()) <= min(rows, columns)
    spent, budget = 8 * size_of((rows, columns), ranks), bits * rows * columns
    # of up to three groups, each side ends at a byte
    assert spent <= budget + 6 * 7
    pair = {each: each * (rows + columns) + 16 * (-(-rows // 128) + -(-columns // 128)) for each in (2, 3, 8)}
    if ranks[8] < min(rows, columns):
        assert budget - spent < pair[8]


def test_the_paper_s_numbers() -> None:
    found = allot((4096, 4096), 1.0)
    # 968 without the steps, which are 1/8 of two bits
    assert (found[8], found[3], found[2]) == (2, 32, (2**24 - 2 * 8 * 8192 - 32 * 3 * 8192 - 34 * 1024) // (17 * 1024))
    assert (2**24 - 2 * 8 * 8192 - 32 * 3 * 8192) // (2 * 8192) == 968


def pair(folder: Path, family: str, *, tied: bool = False) -> tuple[Path, Any]:
    """A base's folder, and a student that was finetuned from it."""
    if family == "t5":
        base = add_weights(make_student_folder(folder / "t5", d_model=64, d_ff=128, tie_word_embeddings=tied))
    else:
        sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": tied}
        base = add_weights(make_causal_folder(folder / "llama", **sizes), make_causal_tokenizer())
    student = load(base)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in student.network.named_parameters():
            if "layer.0" not in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return base, student


def write(folder: Path, base: Path, student: Any, bits: float) -> dict[str, Any]:
    folder.mkdir()
    return write_delta(student.network, student.tokenizer, load(base).network, str(base), folder, bits)


@pytest.mark.parametrize(("family", "tied"), [("t5", False), ("t5", True), ("llama", False), ("llama", True)])
def test_a_student_comes_back(family: str, tied: bool, tmp_path: Path) -> None:
    base, student = pair(tmp_path, family, tied=tied)
    before = load(base).state_dict()
    told = write(tmp_path / "small", base, student, 16.0)
    found, expected = load(tmp_path / "small"), student.state_dict()
    assert found.state_dict().keys() == expected.keys()
    largest = 0.0
    for name, weight in found.state_dict().items():
        if torch.equal(expected[name], before[name]) or weight.dim() == 1 or min(weight.shape) < 64:
            assert torch.equal(weight, expected[name])
        else:
            lost = (weight - expected[name]).norm() / (expected[name] - before[name]).norm()
            largest = max(largest, float(lost))
    assert told["largest_error"] == pytest.approx(largest, rel=1e-3)
    assert 0 < largest < 0.02
    assert told["bits_a_weight"] <= 16
    tensors = load_file(tmp_path / "small" / FILE)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    beginning = 8 + int.from_bytes((tmp_path / "small" / FILE).read_bytes()[:8], "little")
    assert told["megabytes"] * 1e6 == size + beginning


def test_fewer_bits_lose_more(tmp_path: Path) -> None:
    base, student = pair(tmp_path, "t5")
    told = [write(tmp_path / str(bits), base, student, bits) for bits in (1.0, 3.0, 12.0)]
    assert [one["megabytes"] for one in told] == sorted(one["megabytes"] for one in told)
    errors = [one["largest_error"] for one in told]
    assert errors == sorted(errors, reverse=True)
    whole = load(tmp_path / "12.0").state_dict()
    half = load(tmp_path / "12.0", dtype="bfloat16").state_dict()
    assert all(torch.equal(weight.bfloat16(), half[name]) for name, weight in whole.items())


def test_the_base_is_found_and_known_by_its_weights(tmp_path: Path) -> None:
    base, student = pair(tmp_path, "t5")
    small = tmp_path / "small"
    write(small, base, student, 2.0)
    expected = load(small).state_dict()
    # both move together
    (tmp_path / "there").mkdir()
    base = base.rename(tmp_path / "there" / "t5")
    with pytest.raises(UserError, match=r"^student: '.*small' is a delta to '.*/t5', which is not there; link it as"):
        load(small)
    small = small.rename(tmp_path / "there" / "small")
    assert weights_hash(load(small).state_dict()) == weights_hash(expected)
    (tmp_path / "there" / "t5").rename(tmp_path / "moved")
    (small / "base").symlink_to(tmp_path / "moved")
    assert weights_hash(load(small).state_dict()) == weights_hash(expected)
    add_weights(tmp_path / "moved")
    other = load(tmp_path / "moved")
    with torch.no_grad():
        other.network.shared.weight[3, 3] += 1  # type: ignore[union-attr, index, operator]
    other.save(tmp_path / "moved")
    with pytest.raises(UserError, match=r"^student: '.*small' is a delta to other weights than '.*/base' has"):
        load(small)
    (small / FILE).write_bytes(b"torn")
    with pytest.raises(UserError, match=r"^student: cannot read the delta '.*delta\.safetensors' \("):
        load(small)


def test_another_base_is_refused(tmp_path: Path) -> None:
    base, student = pair(tmp_path, "t5")
    other = add_weights(make_student_folder(tmp_path / "other", d_model=64, d_ff=96))
    with pytest.raises(UserError, match=r"^base: '.*other' has other weights: .*, the base's \(96, 64\)"):
        write(tmp_path / "a", other, student, 1.0)
    with pytest.raises(UserError, match=r"^base: '.*t5' has the student's own weights"):
        write(tmp_path / "b", base, load(base), 1.0)


def test_odd_sizes_pack_into_whole_bytes() -> None:
    delta = matrix(67, 131)
    for ranks in ({3: 5}, {2: 3, 3: 1}, {8: 0, 3: 1, 2: 0}):
        codes, steps = compress(delta, ranks)
        assert codes.numel() + 2 * steps.numel() == size_of((67, 131), ranks)
        assert steps.numel() == sum(ranks.values()) * (math.ceil(67 / 128) + math.ceil(131 / 128))
        assert restore(codes, steps, (67, 131), ranks).norm() > 0


def test_a_damaged_delta_is_refused(tmp_path: Path) -> None:
    base, student = pair(tmp_path, "t5")
    write(tmp_path / "small", base, student, 2.0)
    file = tmp_path / "small" / FILE
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors, ranks = load_file(file), json.loads(header["ranks"])
    name, whole = min(ranks), min(name for name in tensors if "norm" in name)
    damages: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
        (ranks, {name: tensors[name][:-1]}),
        (ranks, {whole: tensors[whole][:3]}),
        (ranks | {name: {"0": 5}}, {}),
        (ranks | {"absent.weight": {"8": 1}}, {}),
    ]
    for told, changed in damages:
        save_file(tensors | changed, file, header | {"ranks": json.dumps(told)})
        with pytest.raises(UserError, match=r"^student: the delta does not fit the base and the configuration in "):
            load(tmp_path / "small")
