r"""A finetuned student as a small difference to its base, in mixed precision (Delta-CoMe, arXiv 2406.08903).

The difference of each matrix :math:`\Delta W = W - W_b = U \Sigma V^T` is kept by its largest singular values: the
first 2 pairs of singular vectors in 8 bits, the next 32 in 3 bits, and as many as a budget of bits a weight allows in 2
bits. For the 7B models of the paper these are its own numbers (2, 32 and 968 of 4096 x 4096 at one bit a weight).
Other than there vectors are rounded to the nearest level of a step that fits each block of 128 numbers best, in place
of GPTQ, which needs inputs to calibrate on; embeddings are compressed as any matrix; and what is no matrix is kept as
it is.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_distill.errors import UserError
from lit_distill.students.models import save_description, true_config

FILE = "delta.safetensors"
FORMAT = "lit_distill delta 1"
BASE = "base"
"""In a delta's folder: the base, or a link to it, in place of where it was."""

FIRST, NEXT = 2, 32
"""Pairs of vectors in 8 and in 3 bits."""

BLOCK = 128
"""Numbers that share a step."""

SMALLEST = 64
"""Matrices with fewer rows or columns are kept as they are: the position biases, above all."""

_CLIPS = torch.linspace(0.3, 1.0, 15).tolist()

Ranks = dict[int, int]
"""Bits -> how many pairs of singular vectors have them, the largest first; 32 are not rounded."""


def _pair_bits(shape: tuple[int, int], bits: int) -> int:
    """Bits of a pair of vectors, with their steps."""
    return sum(bits * size + (0 if bits == 32 else 16 * math.ceil(size / BLOCK)) for size in shape)


def allot(shape: tuple[int, int], bits: float) -> Ranks:
    """How many pairs of a matrix's singular vectors have how many bits, within a budget of ``bits`` a weight.

    With all vectors in 2 bits the rest of the budget gives the largest more of them.
    """
    left, pairs = int(bits * shape[0] * shape[1]), min(shape)
    cost = {each: _pair_bits(shape, each) for each in (8, 3, 2)}
    ranks: Ranks = {}
    for each, most in ((8, FIRST), (3, NEXT), (2, pairs)):
        ranks[each] = min(most, left // cost[each], pairs - sum(ranks.values()))
        left -= ranks[each] * cost[each]
    for low, high in ((2, 3), (3, 8)):
        moved = min(ranks[low], left // (cost[high] - cost[low]))
        ranks[low], ranks[high], left = ranks[low] - moved, ranks[high] + moved, left - moved * (cost[high] - cost[low])
    return ranks


def size_of(shape: tuple[int, int], ranks: Ranks) -> int:
    """Bytes of a compressed matrix."""
    codes = sum(math.ceil(rank * size * bits / 8) for bits, rank in ranks.items() for size in shape)
    steps = sum(rank * math.ceil(size / BLOCK) for bits, rank in ranks.items() for size in shape if bits < 32)
    return codes + 2 * steps


def compress(delta: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The codes of a difference ``(rows, columns)``, ``(bytes,)``, and their steps, ``(blocks,)``."""
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    # half of each singular value to either side, so that steps are of like size
    sides = [(u * s.sqrt()).T.float(), (vh * s.sqrt()[:, None]).float()]
    codes, steps, first = [np.empty(0, np.uint8)], [torch.empty(0, dtype=torch.bfloat16)], 0
    for bits, rank in ranks.items():
        for side in sides:
            vectors = side[first : first + rank].contiguous()
            if bits == 32:
                codes.append(np.frombuffer(vectors.numpy().tobytes(), np.uint8))
            else:
                numbers, own = _round(vectors, bits)
                codes.append(_pack(numbers, bits))
                steps.append(own.flatten())
        first += rank
    return torch.from_numpy(np.concatenate(codes)), torch.cat(steps)


def restore(codes: Tensor, steps: Tensor, shape: tuple[int, int], ranks: Ranks) -> Tensor:
    """The difference that `compress` kept, ``(rows, columns)``, float32. Raises a ``ValueError`` if it is damaged."""
    if (size := codes.nbytes + steps.nbytes) != (wanted := size_of(shape, ranks)):
        # numpy would read zeros after the end
        raise ValueError(f"a matrix of {shape} has {size} bytes, not {wanted}")
    content, found = codes.numpy(), torch.zeros(shape)
    for bits, rank in ranks.items():
        sides = []
        for size in shape:
            count, blocks = rank * size, math.ceil(size / BLOCK)
            own, content = np.split(content, [math.ceil(count * bits / 8)])
            if bits == 32:
                sides.append(torch.from_numpy(np.frombuffer(own.tobytes(), np.float32).copy()).view(rank, size))
                continue
            step, steps = steps[: rank * blocks].float(), steps[rank * blocks :]
            numbers = torch.from_numpy(_unpack(own, bits, count)).view(rank, size).float()
            widths = step.view(rank, blocks).repeat_interleave(BLOCK, dim=1)[:, :size]
            sides.append((numbers - (2**bits - 1) / 2) * widths)
        found += sides[0].T @ sides[1]
    return found


def _round(vectors: Tensor, bits: int) -> tuple[NDArray[np.uint8], Tensor]:
    """Codes ``(vectors, length)`` and steps ``(vectors, blocks)``: the step of least squared error of a few."""
    rank, size = vectors.shape
    blocks, most = math.ceil(size / BLOCK), 2**bits - 1
    x = torch.nn.functional.pad(vectors, (0, blocks * BLOCK - size)).view(rank, blocks, BLOCK)
    real = (torch.arange(blocks * BLOCK) < size).view(blocks, BLOCK)
    widest = x.abs().amax(2).clamp(min=1e-30) * 2 / (most + 1)
    best, codes = torch.full((rank, blocks), torch.inf), torch.zeros(x.shape)
    steps = torch.zeros(rank, blocks, dtype=torch.bfloat16)
    for clip in _CLIPS:
        step = (widest * clip).bfloat16()
        width = step.float()[..., None]
        own = (x / width + most / 2).round().clamp(0, most)
        error = (((own - most / 2) * width - x).square() * real).sum(2)
        better = error < best
        best, steps = error.where(better, best), step.where(better, steps)
        codes = own.where(better[..., None], codes)
    return codes.view(rank, blocks * BLOCK)[:, :size].numpy().astype(np.uint8), steps


def _pack(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    return np.packbits(np.unpackbits(numbers.reshape(-1, 1), axis=1)[:, 8 - bits :])


def _unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    spread = np.zeros((count, 8), np.uint8)
    spread[:, 8 - bits :] = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    return np.packbits(spread, axis=1).reshape(-1)


# ------------------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class Delta:
    """What a delta's folder says: the base, and what to do with its weights."""

    base: str  # as `load` takes it
    sha256: str  # of the base's weights
    ranks: dict[str, Ranks]  # of each compressed matrix
    tensors: dict[str, Tensor]

    def weights(self, base: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The student's weights that are not the base's own. Raises an error if they do not fit the base."""
        if absent := self.ranks.keys() - self.tensors.keys():
            raise KeyError(min(absent))
        for name, tensor in self.tensors.items():
            if (ranks := self.ranks.get(name)) is None:
                if not name.endswith(".steps"):
                    if tensor.shape != base[name].shape:
                        raise ValueError(f"{name} is {tuple(tensor.shape)}, the base's {tuple(base[name].shape)}")
                    yield name, tensor
                continue
            rows, columns = base[name].shape
            yield name, base[name] + restore(tensor, self.tensors[f"{name}.steps"], (rows, columns), ranks)


def is_delta(name: str) -> bool:
    """Whether a folder holds a delta."""
    return (Path(name) / FILE).is_file()


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """A hash of a model's state dict."""
    found = sha256()
    for name in sorted(weights):
        found.update(f"{name} {tuple(weights[name].shape)}".encode())
        found.update(weights[name].detach().float().contiguous().cpu().numpy().tobytes())
    return found.hexdigest()


def write_delta(
    model: Any, tokenizer: PreTrainedTokenizerBase, base_model: Any, base: str, folder: Path, bits: float
) -> dict[str, Any]:
    """Write the difference of a model to its base, with the model's configuration and tokenizer.

    Returns:
        In plain values: ``megabytes`` of the file, ``bits_a_weight`` of the compressed matrices, and ``largest_error``:
        of all of these the largest norm of what is lost, relative to that of the difference, at ``worst``.

    Raises:
        UserError: the base has other weights.
    """
    before = base_model.state_dict()
    own = dict(model.named_parameters())
    for name, weight in own.items():
        if name not in before or before[name].shape != weight.shape:
            has = tuple(before[name].shape) if name in before else "none"
            raise UserError(f"base: {base!r} has other weights: {name} is {tuple(weight.shape)}, the base's {has}")
    tensors: dict[str, Tensor] = {}
    plans: dict[str, Ranks] = {}
    errors, numbers, size = {"": 0.0}, 0, 0
    for name, weight in own.items():
        new, old = weight.detach().float().cpu(), before[name].detach().float().cpu()
        if torch.equal(new, old):
            continue
        if new.dim() != 2 or min(new.shape) < SMALLEST:
            tensors[name] = new.contiguous()
            continue
        shape, delta = (new.shape[0], new.shape[1]), new - old
        plans[name] = allot(shape, bits)
        tensors[name], tensors[f"{name}.steps"] = compress(delta, plans[name])
        kept = restore(tensors[name], tensors[f"{name}.steps"], shape, plans[name])
        errors[name] = float((delta - kept).norm() / delta.norm())
        numbers, size = numbers + delta.numel(), size + size_of(shape, plans[name])
    if not tensors:
        raise UserError(f"base: {base!r} has the student's own weights; there is no difference to write")
    local = Path(base).exists()
    header = {
        "format": FORMAT, "base": os.path.relpath(os.path.realpath(base), os.path.realpath(folder)) if local else base,
        "local": local, "sha256": weights_hash(before), "ranks": plans,
    }  # fmt: skip
    save_file(tensors, folder / FILE, {name: json.dumps(value) for name, value in header.items()})
    save_description(true_config(model), tokenizer, folder)
    worst = max(errors, key=errors.__getitem__)
    return {
        "base": base, "megabytes": (folder / FILE).stat().st_size / 1e6, "bits_a_weight": 8 * size / max(numbers, 1),
        "largest_error": errors[worst], "worst": worst,
    }  # fmt: skip


def read_delta(folder: str) -> Delta:
    """The delta of a folder. Raises a ``UserError`` if it is damaged, or its base is not where it was."""
    path = Path(folder) / FILE
    try:
        with safe_open(path, framework="pt") as file:
            header = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if header["format"] != FORMAT:
            raise KeyError(header["format"])
        ranks = {name: {int(bits): int(rank) for bits, rank in own.items()} for name, own in header["ranks"].items()}
        base, local, wanted = str(header["base"]), bool(header["local"]), str(header["sha256"])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"student: cannot read the delta {str(path)!r} ({error})") from error
    link = Path(folder) / BASE
    if link.exists():
        base = str(link)
    elif local:
        base = os.path.normpath(Path(folder).resolve() / base)
        if not Path(base).exists():
            raise UserError(f"student: {folder!r} is a delta to {base!r}, which is not there; link it as {str(link)!r}")
    return Delta(base, wanted, ranks, tensors)
