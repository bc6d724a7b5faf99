"""Greedy decoding from packed sources: rows that have ended leave, and the cache holds no more than is used."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Block

from lit_distill.students.fast.few_queries import FewQueries
from lit_distill.students.fast.looks import projects_plainly
from lit_distill.students.fast.packed import Encoded
from lit_distill.students.fast.packing import Packing
from lit_distill.students.fast.t5 import feed_forward, into_head, norm

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
    settings, device = student.generation_config, student.device
    start, eos = settings.decoder_start_token_id, settings.eos_token_id
    ends = torch.tensor([] if eos is None else eos, device=device).view(-1)
    if len(set(rows)) < len(encoded.packing.lengths):
        present, packing = encoded.packing.rows(rows).compact()
        encoded, rows = Encoded([encoded.states.index_select(0, present)], packing), range(len(rows))
    found: list[list[int]] = [[] for _ in rows]
    numbers = torch.arange(len(rows), device=device)
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    ids = torch.full((len(rows),), start, device=device)
    blocks: Any = student.decoder.block
    sources = _Sources(student, encoded, rows)
    layers = [_Layer(block, encoded.states, sources) for block in blocks]
    bias = layers[0].bias()
    for step in range(max_new_tokens):
        if step == bias.shape[-1]:
            for layer in layers:
                layer.grow()
            bias = layers[0].bias()
        x = student.decoder.embed_tokens(ids)
        for layer in layers:
            x = layer.step(x, step, bias[:, :, step : step + 1, : step + 1])
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
                layer.take(stay, sources)
    return found


class _Sources:
    """The encoder's states that the rows still decoding look at.

    Args:
        student: the student.
        encoded: the states of all sources.
        rows: the source rows.
    """

    def __init__(self, student: T5ForConditionalGeneration, encoded: Encoded, rows: Sequence[int]) -> None:
        self.rows = len(rows)
        queries = Packing([1] * self.rows, encoded.states.device)
        self._look = FewQueries(queries, encoded.packing.rows(rows), range(len(rows)), student.config.num_heads)
        self._states = self._look.spread(encoded.states)

    def spread(self, packed: Tensor) -> Tensor:
        """Keys or values ``(source tokens, heads * d_kv)`` by row, ``(rows, heads, source_len, d_kv)``."""
        spread = self._look.spread(packed)
        return spread.view(*spread.shape[:2], self._look.heads, -1).transpose(1, 2)

    def look(self, q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one query a row, ``(rows, heads * d_kv)``; `FewQueries.attend` says what the arguments are."""
        return self._look.attend(q, self._states, key, value, 0.0)

    def look_at(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Likewise, at keys and values that were `spread`."""
        query, hidden = q.view(len(q), self._look.heads, 1, -1), self._look.hidden[:, None].to(q.dtype)
        found = F.scaled_dot_product_attention(query, keys, values, attn_mask=hidden, scale=1.0)
        return found.reshape(len(q), -1)


class _Layer:
    """A decoder layer with the keys and values of what was decoded.

    Args:
        block: the layer.
        states: the encoder's states.
        sources: those that the rows look at.
    """

    def __init__(self, block: T5Block, states: Tensor, sources: _Sources) -> None:
        layers: Any = block.layer
        self._own, self._cross, self._feed = layers
        attend = self._cross.EncDecAttention
        # where keys and values of the sources are more than a product with a weight (LoRA, say), they are made once
        self._projected = None if projects_plainly(block) else (attend.k(states), attend.v(states))
        self._turn_to(sources)
        config = attend.config
        empty = states.new_zeros(sources.rows, config.num_heads, FIRST_CAPACITY, config.d_kv)
        self._keys, self._values = empty, torch.zeros_like(empty)

    def bias(self) -> Tensor:
        """The position bias of all positions that there is room for, ``(1, heads, capacity, capacity)``."""
        capacity = self._keys.shape[2]
        bias: Tensor = self._own.SelfAttention.compute_bias(capacity, capacity, device=self._keys.device)
        return bias

    def _turn_to(self, sources: _Sources) -> None:
        self._sources = sources
        self._spread = None if self._projected is None else tuple(map(sources.spread, self._projected))

    def take(self, rows: Tensor, sources: _Sources) -> None:
        """Only these rows stay, and these are their sources."""
        self._turn_to(sources)
        self._keys, self._values = self._keys[rows], self._values[rows]

    def grow(self) -> None:
        """Twice the room."""
        self._keys, self._values = (F.pad(x, (0, 0, 0, x.shape[2])) for x in (self._keys, self._values))

    def step(self, x: Tensor, step: int, bias: Tensor) -> Tensor:
        """The layer at one position.

        Args:
            x: ``(rows, d_model)``.
            step: the position.
            bias: its position bias, ``(1, heads, 1, step + 1)``.
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
        query = attend.q(normed)
        if self._spread is None:
            found = self._sources.look(query, attend.k.weight, attend.v.weight)
        else:
            found = self._sources.look_at(query, *self._spread)
        x = x + attend.o(found)
        return x + feed_forward(self._feed.DenseReluDense, norm(self._feed.layer_norm, x))
