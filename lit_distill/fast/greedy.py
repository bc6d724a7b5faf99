"""Greedy decoding from packed sources: rows that have ended leave, and the cache holds no more than is used."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Block

from lit_distill.fast.few_queries import FewQueries
from lit_distill.fast.packing import Packing
from lit_distill.fast.student import Encoded
from lit_distill.fast.t5 import feed_forward, into_head, norm

Shape = Callable[[Tensor, int, Tensor], Tensor]
"""``(scores (rows, vocabulary), step, row numbers (rows,)) -> scores``: changes the scores of the next token."""

FIRST_CAPACITY = 16
"""Positions of the first cache; it doubles when it is full."""

WORTH_LEAVING = 0.75
"""Ended rows are taken out of the cache once no more than this share of it is still decoding."""


@torch.no_grad()
def greedy(
    student: T5ForConditionalGeneration,
    encoded: Encoded,
    rows: Sequence[int],
    max_new_tokens: int,
    shape: Shape | None = None,
) -> list[list[int]]:
    """The likeliest next token, again and again, until a row's end-of-sequence token.

    Gives the tokens of ``student.generate`` with one beam and no sampling.

    Args:
        student: the student, in evaluation mode.
        encoded: the sources' states.
        rows: the source rows to decode for.
        max_new_tokens: tokens of a target at most, the end-of-sequence token included.
        shape: changes the scores before the choice.

    Returns:
        For each row its tokens, with the end-of-sequence token where it was reached.
    """
    if not rows:
        return []
    settings = student.generation_config
    eos, device = settings.eos_token_id, student.device
    ends = torch.tensor([] if eos is None else [eos] if isinstance(eos, int) else list(eos), device=device)
    found: list[list[int]] = [[] for _ in rows]
    numbers = torch.arange(len(rows), device=device)
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    ids = torch.full((len(rows),), int(cast(int, settings.decoder_start_token_id)), device=device)
    blocks: Any = student.decoder.block
    layers = [_Layer(block, len(rows), encoded.states) for block in blocks]
    sources = _Sources(student, encoded, rows)
    bias = layers[0].bias()
    for step in range(max_new_tokens):
        if step == bias.shape[-1]:
            for layer in layers:
                layer.grow()
            bias = layers[0].bias()
        x = student.decoder.embed_tokens(ids)
        for layer in layers:
            x = layer.step(x, step, bias[:, :, step : step + 1, : step + 1], sources)
        x = norm(student.decoder.final_layer_norm, x)
        scores = student.lm_head(into_head(student, x)).float()
        if shape is not None:
            scores = shape(scores, step, numbers)
        ids = scores.argmax(dim=-1)
        for row, token, going in zip(numbers.tolist(), ids.tolist(), alive.tolist(), strict=True):
            if going:
                found[row].append(token)
        alive = alive & ~torch.isin(ids, ends)
        left = int(alive.sum())
        if left == 0:
            break
        if left <= WORTH_LEAVING * len(alive):
            stay = alive.nonzero().squeeze(1)
            ids, numbers, alive = ids[stay], numbers[stay], alive[stay]
            sources = _Sources(student, encoded, [rows[number] for number in numbers.tolist()])
            for layer in layers:
                layer.take(stay)
    return found


class _Sources:
    """The encoder's states that the rows still decoding look at.

    Args:
        student: the student.
        encoded: the states of all sources.
        rows: the source rows.
    """

    def __init__(self, student: T5ForConditionalGeneration, encoded: Encoded, rows: Sequence[int]) -> None:
        queries = Packing([1] * len(rows), encoded.states.device)
        self._look = FewQueries(queries, encoded.packing.rows(rows), range(len(rows)), student.config.num_heads)
        self._states = self._look.spread(encoded.states)

    def look(self, q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one query a row, ``(rows, heads * d_kv)``; `FewQueries.attend` says what the arguments are."""
        return self._look.attend(q, self._states, key, value, 0.0)


class _Layer:
    """A decoder layer with the keys and values of what was decoded.

    Args:
        block: the layer.
        rows: rows that are decoded.
        states: the encoder's states, for their type.
    """

    def __init__(self, block: T5Block, rows: int, states: Tensor) -> None:
        layers: Any = block.layer
        self._own, self._cross, self._feed = layers
        attend = self._cross.EncDecAttention
        # whatever stands there (LoRA, say) is linear: what it makes of the unit vectors is its weight
        unit = torch.eye(states.shape[-1], device=states.device, dtype=states.dtype)
        self._key, self._value = (
            linear.weight if type(linear) is nn.Linear else linear(unit).t() for linear in (attend.k, attend.v)
        )
        config = attend.config
        empty = states.new_zeros(rows, config.num_heads, FIRST_CAPACITY, config.d_kv)
        self._keys, self._values = empty, torch.zeros_like(empty)

    def bias(self) -> Tensor:
        """The position bias of all positions that there is room for, ``(1, heads, capacity, capacity)``."""
        capacity = self._keys.shape[2]
        bias: Tensor = self._own.SelfAttention.compute_bias(capacity, capacity, device=self._keys.device)
        return bias

    def take(self, rows: Tensor) -> None:
        """Only these rows stay."""
        self._keys, self._values = self._keys[rows], self._values[rows]

    def grow(self) -> None:
        """Twice the room."""
        self._keys, self._values = (F.pad(x, (0, 0, 0, x.shape[2])) for x in (self._keys, self._values))

    def step(self, x: Tensor, step: int, bias: Tensor, sources: _Sources) -> Tensor:
        """The layer at one position.

        Args:
            x: ``(rows, d_model)``.
            step: the position.
            bias: its position bias, ``(1, heads, 1, step + 1)``.
            sources: what the rows look at.
        """
        attend, normed = self._own.SelfAttention, norm(self._own.layer_norm, x)
        one = len(x), self._keys.shape[1], 1, -1
        self._keys[:, :, step] = attend.k(normed).view(one).squeeze(2)
        self._values[:, :, step] = attend.v(normed).view(one).squeeze(2)
        query = attend.q(normed).view(one)
        keys, values = self._keys[:, :, : step + 1].to(query.dtype), self._values[:, :, : step + 1].to(query.dtype)
        offsets = bias.to(query.dtype).expand(len(x), -1, -1, -1)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=offsets, scale=1.0)
        x = x + attend.o(out.reshape(len(x), -1))
        attend, normed = self._cross.EncDecAttention, norm(self._cross.layer_norm, x)
        x = x + attend.o(sources.look(attend.q(normed), self._key, self._value))
        return x + feed_forward(self._feed.DenseReluDense, norm(self._feed.layer_norm, x))
