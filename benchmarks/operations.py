"""What batches hold, and how many floating-point operations they need at least: arithmetic, without any library."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Batches = list[list[int]]
"""Row positions of each batch."""

Lengths = tuple[int, int, int | None, int | None]
"""Tokens of a row: source and target of the label task, then of the rationale task (``None`` without a rationale)."""

Texts = list[tuple[str, ...]]
"""The generated texts of each row, label first."""

Tokens = Literal["source", "target"]


@dataclass(frozen=True)
class Content:
    """What batches hold."""

    examples: int
    """Rows (of the label task)."""
    real: int
    """Source and target positions with a token of the data."""
    positions: int
    """All of them, padding included."""

    @property
    def padding(self) -> float:
        """The share of positions that are padding."""
        return 1 - self.real / self.positions

    def __add__(self, other: "Content") -> "Content":
        return Content(self.examples + other.examples, self.real + other.real, self.positions + other.positions)


NOTHING = Content(0, 0, 0)


@dataclass(frozen=True)
class Shape:
    """A T5's sizes, under the names that its configuration has for them."""

    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    vocab_size: int
    is_gated_act: bool


def shape_of(config: Any) -> Shape:
    """A configuration's sizes, which another process understands without transformers."""
    return Shape(**{name: getattr(config, name) for name in Shape.__dataclass_fields__})


@dataclass(frozen=True)
class Linear:
    """A shape of linear layer, and which tokens pass through it."""

    tokens: Tokens
    inputs: int
    outputs: int


def linears(shape: Shape) -> Counter[Linear]:
    """How often a T5 has each shape of linear layer.

    The keys and values of cross-attention are made of source tokens; the output head sees target tokens alone.
    """
    model, inner, hidden = shape.d_model, shape.num_heads * shape.d_kv, shape.d_ff
    rising = 2 if shape.is_gated_act else 1
    found: Counter[Linear] = Counter()
    stacks: tuple[tuple[Tokens, int, int], ...] = (
        ("source", shape.num_layers, 1),
        ("target", shape.num_decoder_layers, 2),
    )
    for tokens, layers, attentions in stacks:
        # query, key and value in; the second attention of a decoder layer has its query alone from the target
        found[Linear(tokens, model, inner)] += layers * (3 if attentions == 1 else 4)
        found[Linear(tokens, inner, model)] += layers * attentions
        found[Linear(tokens, model, hidden)] += layers * rising
        found[Linear(tokens, hidden, model)] += layers
    found[Linear("source", model, inner)] += shape.num_decoder_layers * 2
    found[Linear("target", model, shape.vocab_size)] += 1
    return found


def forward_flops(shape: Shape, pairs: Sequence[tuple[int, int]]) -> int:
    """Operations of a forward pass over (source, target) lengths without padding: all linear layers, and attention.

    A product of (n, k) and (k, m) counts 2 n k m. Attention is two products a layer over the pairs of positions that
    see each other: source with source, target with source, and target with itself and what is before it.
    """
    tokens = {"source": sum(source for source, _ in pairs), "target": sum(target for _, target in pairs)}
    products = sum(2 * tokens[s.tokens] * s.inputs * s.outputs * count for s, count in linears(shape).items())
    inner = shape.num_heads * shape.d_kv
    seen = sum(
        shape.num_layers * source * source + shape.num_decoder_layers * (target * (target + 1) // 2 + target * source)
        for source, target in pairs
    )
    return products + 2 * 2 * inner * seen


def decoding_flops(shape: Shape, pairs: Sequence[tuple[int, int]]) -> int:
    """Operations of generating targets of these lengths, one token after the other.

    Encoder states and the cross-attention's keys and values are taken as given: a forward pass over the same sources
    has made them.
    """
    whole, sources = forward_flops(shape, pairs), forward_flops(shape, [(source, 0) for source, _ in pairs])
    return whole - sources


def task_pairs(lengths: Sequence[Lengths]) -> list[tuple[int, int]]:
    """The (source, target) lengths of all that is passed through the student for these rows."""
    pairs: list[tuple[int, int]] = []
    for source, target, rationale_source, rationale_target in lengths:
        pairs.append((source, target))
        if rationale_source is not None and rationale_target is not None:
            pairs.append((rationale_source, rationale_target))
    return pairs


def tokens_a_batch(lengths: Sequence[Lengths], batches: int) -> dict[Tokens, int]:
    """Source and target tokens of one of so many batches, on average and without padding."""
    pairs = task_pairs(lengths)
    return {"source": sum(s for s, _ in pairs) // batches, "target": sum(t for _, t in pairs) // batches}


def training_flops(shape: Shape, lengths: Sequence[Lengths]) -> int:
    """Operations of training on rows: each product of the forward pass has two of its size in the backward pass."""
    return 3 * forward_flops(shape, task_pairs(lengths))


def evaluation_flops(shape: Shape, lengths: Sequence[Lengths], *, rationales: bool) -> int:
    """Operations of evaluating rows: both losses, and a target of the gold one's length written for each row."""
    written = [(source, target) for source, target, _, _ in lengths]
    if rationales:
        written += [(s, t) for _, _, s, t in lengths if s is not None and t is not None]
    return forward_flops(shape, task_pairs(lengths)) + decoding_flops(shape, written)
