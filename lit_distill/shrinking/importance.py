"""How much a student's units, heads and channels matter, by its weights or by what unlabelled rows make of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_distill.batch import TaskBatch, TaskInputs, pad_targets, take
from lit_distill.errors import UserError
from lit_distill.shrinking.structure import OUTPUTS, VALUES, Structure, owner
from lit_distill.students import Student

Importance = Literal["magnitude", "features"]

RATE = 0.01
"""Masking ends when its coefficients' sum changes by less than this part."""

ROUNDS = 100
"""Maximum updates of a masking."""

LONGEST = 32
"""Maximum tokens of a text that the student writes to be scored on."""


@dataclass(frozen=True)
class Scores:
    """Higher is more important; each layer has a scale of its own."""

    units: Mapping[str, Tensor] = field(default_factory=dict)  # of each feed-forward layer, `(d_ff,)`
    heads: Mapping[str, Tensor] = field(default_factory=dict)  # of each attention, `(heads of keys,)`
    d_model: Tensor | None = None  # `(d_model,)`


def magnitude(structure: Structure) -> Scores:
    """Products of the norms of the matrices that a signal goes through; 0 where it cannot get through.

    A unit's are those of its rows in each matrix into it and of its column in the one out of it; a head's of its values
    and its outputs, as its attention weights sum to 1; a channel's of all that writes it and of all that reads it.
    Biases of what goes in count as weights.
    """
    units: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    embedding, head = (structure.network.get_input_embeddings(), structure.network.get_output_embeddings())
    written, read = (module.weight.detach().float().cpu().square().sum(dim=0) for module in (embedding, head))
    for name, value in structure.weights.items():
        axes, module, matrix = structure.axes(name), owner(name), value.detach().float().cpu()
        if len(axes) != 2 or "vocabulary" in axes or None in axes:
            continue
        place, last, at = owner(module), module.rpartition(".")[2], axes.index("d_model")
        if axes[1 - at] == "unit":
            units[place] = units.get(place, torch.ones(())) * _norms(matrix, 1 - at, structure, module)
        elif last in VALUES or last in OUTPUTS:
            parts = _norms(matrix, 1 - at, structure, module).reshape(structure.groups, -1).norm(dim=1)
            heads[place] = heads.get(place, torch.ones(())) * parts
        squares = matrix.square().sum(dim=1 - at)
        written, read = (written + squares, read) if at == 0 else (written, read + squares)
    return Scores(units, heads, (written * read).sqrt())


def _norms(matrix: Tensor, axis: int, structure: Structure, module: str) -> Tensor:
    squares, bias = matrix.square().sum(dim=1 - axis), structure.weights.get(f"{module}.bias")
    # that of an output projection belongs to no unit or head
    return (squares if axis == 1 or bias is None else squares + bias.float().cpu().square()).sqrt()


@torch.no_grad()
def features(structure: Structure, batches: Iterable[TaskBatch]) -> Scores:
    """Scores from unlabelled rows, without gradients, after Nova et al. 2023 (2303.04185).

    A unit's is the product of the paper's two: D2, the mean of what comes out of it over all tokens, and R2, how little
    other units of the layer can stand for it (`representative`). A head's is the mean norm of what it adds to the
    hidden states, a channel's the mean of the normalised hidden states that the layers read.

    It differs from the paper: means are of absolute values, as those of gated activations have either sign; the paper
    prunes the units of encoders alone, so that heads and channels are scored as here, and what a decoder reads is what
    the student itself writes, greedily; the kernel is as wide as the median distance, where the paper has 1; each layer
    keeps as many units as any other; and the weights that stay are not scaled up, as the student is trained afterwards.
    """
    # written before the hooks, which would see it
    rows = [row for batch in batches for task in batch for row in _with_own_text(structure.student, batch[task])]
    if not rows:
        raise UserError("importance: features need rows of train, and there are none")
    units, heads = ({name: _Mean() for name in structure.outputs(axis)} for axis in ("unit", "head"))
    channels = _Mean()
    with ExitStack() as hooks:

        def watch(name: str, mean: _Mean, of: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
            module: nn.Module = structure.network.get_submodule(name)
            handle = module.register_forward_hook(lambda own, given, found: mean.add(of(own, given[0], found)))
            hooks.callback(handle.remove)

        def added(module: nn.Linear, states: Tensor, found: Tensor) -> Tensor:
            own, weight = (part.unflatten(-1, (structure.groups, -1)) for part in (states, module.weight))
            norms: Tensor = torch.einsum("...hk,dhk->...hd", own, weight).norm(dim=-1)
            return norms

        for name, mean in units.items():
            watch(name, mean, lambda module, states, found: states)
        for name, mean in heads.items():
            watch(name, mean, added)
        for name in structure.norms():
            watch(name, channels, lambda module, states, found: found)
        for row in rows:
            # one at a time, so that no padding counts
            structure.student({"row": row}).hidden("row", -1)
    filters = {name: structure.weights[f"{name}.weight"].float().T for name in units}
    return Scores(
        {owner(name): (mean.value() * representative(filters[name])).cpu() for name, mean in units.items()},
        {owner(name): mean.value().cpu() for name, mean in heads.items()},
        channels.value().cpu(),
    )


class _Mean:
    """A mean of absolute values over tokens."""

    def __init__(self) -> None:
        self.sum: Tensor | float = 0.0
        self.tokens = 0

    def add(self, values: Tensor) -> None:
        flat = values.flatten(end_dim=-2).float().abs()
        self.sum, self.tokens = self.sum + flat.sum(dim=0), self.tokens + len(flat)

    def value(self) -> Tensor:
        return torch.as_tensor(self.sum / self.tokens)


def _with_own_text(student: Student, inputs: TaskInputs) -> Iterator[TaskInputs]:
    """Each row of a task alone, without padding, its target what the student writes."""
    for number, ids in enumerate(student({"row": inputs}).generate("row", max_new_tokens=LONGEST)):
        row = take(inputs, [number])
        length = max(int(row["attention_mask"].sum()), 1)
        yield {
            "input_ids": row["input_ids"][:, :length],
            "attention_mask": row["attention_mask"][:, :length],
            "labels": pad_targets([ids], student.device),
        }


def representative(filters: Tensor) -> Tensor:
    r"""How much of each filter others cannot give, R2 of Nova et al. 2023 (2303.04185): kernelized convex masking.

    ``c`` approximates each filter by a combination of all with coefficients that are not negative, in the space of a
    Gaussian kernel ``k_ij = exp(-|x_i - x_j|^2 / sigma^2)``. From ``c = 1 / n``, each update multiplies it by
    ``sqrt(k / (k c))``, elementwise, until its sum changes by less than `RATE`. A filter's score is ``c_ii``.

    Args:
        filters: ``(n, size)``.
    """
    distances = torch.cdist(filters, filters)
    apart = distances[~torch.eye(len(filters), dtype=torch.bool, device=filters.device)]
    # a width of the weights' own scale; all may be the same
    width = apart.median().clamp(min=1e-12) if len(apart) else torch.ones(())
    kernel = torch.exp(-(distances / width).square())
    coefficients = torch.full_like(kernel, 1 / len(filters))
    for _ in range(ROUNDS):
        before = coefficients.sum()
        coefficients = coefficients * (kernel / (kernel @ coefficients)).sqrt()
        if (coefficients.sum() - before).abs() < RATE * before:
            break
    return coefficients.diagonal()


def best(scores: Tensor, number: int) -> Tensor:
    """The positions of the highest scores, rising; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:number].sort().values


def best_heads(structure: Structure, scores: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The heads of each attention that stay.

    T5's position bias belongs to a head's number in all self-attentions of a stack, so that all keep the same heads:
    those with the highest sum of their shares of each layer's scores.
    """
    found = {name: best(own, number) for name, own in scores.items()}
    for start in structure.stacks.values() if structure.is_seq2seq else ():
        own = [name for name in scores if name.startswith(f"{start}.") and name.endswith("SelfAttention")]
        # a layer in which all heads are nothing has no shares
        total = torch.stack([scores[name] / scores[name].sum().clamp(min=1e-30) for name in own]).sum(dim=0)
        # also where the bias is, should its layer not stay
        found |= dict.fromkeys([*own, f"{start}.0.layer.0.SelfAttention"], best(total, number))
    return found
