"""Greedy decoding from packed sources: rows that have ended leave, and the cache holds no more than is used."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.students.fast.attention import FewQueries, projects_plainly
from lit_distill.students.fast.packing import Packing
from lit_distill.students.fast.t5 import Encoded, feed_forward, into_head, norm

FIRST_CAPACITY = 16
"""Positions of the first cache; it doubles when it is full."""

WORTH_LEAVING = 0.75
"""Ended rows are taken out of the cache once no more than this share of it is still decoding."""


@torch.no_grad()
def greedy(
    model: Any,
    encoded: Encoded,
    rows: Sequence[int],
    max_new_tokens: int,
    process_logits: Callable[[Tensor, int, Tensor], Tensor] | None = None,
) -> list[list[int]]:
    """Greedy decoding until each row's end-of-sequence token: the tokens of ``model.generate``.

    Args:
        model: in evaluation mode.
        encoded: the sources' states.
        rows: the source rows to decode for.
        max_new_tokens: maximum tokens of a target, including end-of-sequence.
        process_logits: ``(scores (rows, vocabulary), step, row numbers (rows,)) -> scores``.

    Returns:
        The tokens of each row, with end-of-sequence if it was reached.
    """
    settings, device = model.generation_config, model.device
    eos = settings.eos_token_id
    ends = torch.tensor([] if eos is None else eos, device=device).view(-1)
    if len(set(rows)) < len(encoded.packing.lengths):
        present, packing = encoded.packing.rows(rows).compact()
        encoded, rows = Encoded([encoded.states.index_select(0, present)], packing), range(len(rows))
    found: list[list[int]] = [[] for _ in rows]
    numbers = torch.arange(len(rows), device=device)
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    ids = torch.full((len(rows),), settings.decoder_start_token_id, device=device)
    sources = _Sources(model, encoded, rows)
    layers = [_Layer(block, encoded.states, sources) for block in model.decoder.block]
    bias = layers[0].bias()
    for step in range(max_new_tokens):
        if step == bias.shape[-1]:
            for layer in layers:
                layer.grow()
            bias = layers[0].bias()
        x = model.decoder.embed_tokens(ids)
        for layer in layers:
            x = layer.step(x, step, bias[:, :, step : step + 1, : step + 1])
        scores = model.lm_head(into_head(model, norm(model.decoder.final_layer_norm, x))).float()
        if process_logits is not None:
            scores = process_logits(scores, step, numbers)
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
            sources = _Sources(model, encoded, [rows[number] for number in numbers.tolist()])
            for layer in layers:
                layer.take(stay, sources)
    return found


class _Sources:
    """The encoder states of the rows that are still decoding."""

    def __init__(self, model: Any, encoded: Encoded, rows: Sequence[int]) -> None:
        self.rows = len(rows)
        queries = Packing([1] * self.rows, encoded.states.device)
        self._few = FewQueries(queries, encoded.packing.rows(rows), range(len(rows)), model.config.num_heads)
        self._states = self._few.spread(encoded.states)

    def spread(self, packed: Tensor) -> Tensor:
        """Keys or values ``(source tokens, heads * d_kv)`` by row, ``(rows, heads, source_len, d_kv)``."""
        spread = self._few.spread(packed)
        return spread.view(*spread.shape[:2], self._few.heads, -1).transpose(1, 2)

    def attend(self, layer: Any, q: Tensor) -> Tensor:
        """Attention of one query a row to the states, ``(rows, heads * d_kv)``."""
        return self._few.attend(q, self._states, layer.k.weight, layer.v.weight, 0.0)

    def attend_to(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same to keys and values that were `spread`."""
        query, mask = q.view(len(q), self._few.heads, 1, -1), self._few.mask[:, None].to(q.dtype)
        found = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1.0)
        return found.reshape(len(q), -1)


class _Layer:
    """A decoder layer with its cache of keys and values."""

    def __init__(self, block: Any, states: Tensor, sources: _Sources) -> None:
        self._own, self._cross, self._feed = block.layer
        layer = self._cross.EncDecAttention
        # where keys and values of the sources are more than a product with a weight (LoRA, say), they are made once
        self._projected = None if projects_plainly(block) else (layer.k(states), layer.v(states))
        self._turn_to(sources)
        config = layer.config
        self._keys = states.new_zeros(sources.rows, config.num_heads, FIRST_CAPACITY, config.d_kv)
        self._values = torch.zeros_like(self._keys)

    def bias(self) -> Tensor:
        """The position bias of all positions that there is room for, ``(1, heads, capacity, capacity)``."""
        capacity = self._keys.shape[2]
        bias: Tensor = self._own.SelfAttention.compute_bias(capacity, capacity, device=self._keys.device)
        return bias

    def _turn_to(self, sources: _Sources) -> None:
        self._sources = sources
        self._spread = None if self._projected is None else tuple(map(sources.spread, self._projected))

    def take(self, rows: Tensor, sources: _Sources) -> None:
        """Keep only these rows, with their sources."""
        self._turn_to(sources)
        self._keys, self._values = self._keys[rows], self._values[rows]

    def grow(self) -> None:
        """Double the capacity."""
        self._keys, self._values = (F.pad(x, (0, 0, 0, x.shape[2])) for x in (self._keys, self._values))

    def step(self, x: Tensor, step: int, bias: Tensor) -> Tensor:
        """The layer at one position: ``x`` is ``(rows, d_model)``, the position's bias ``(1, heads, 1, step + 1)``."""
        layer, normed = self._own.SelfAttention, norm(self._own.layer_norm, x)
        one = len(x), self._keys.shape[1], 1, -1
        self._keys[:, :, step] = layer.k(normed).view(one).squeeze(2)
        self._values[:, :, step] = layer.v(normed).view(one).squeeze(2)
        query = layer.q(normed).view(one)
        keys, values = self._keys[:, :, : step + 1].to(query.dtype), self._values[:, :, : step + 1].to(query.dtype)
        offsets = bias.to(query.dtype).expand(len(x), -1, -1, -1)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=offsets, scale=1.0)
        x = x + layer.o(out.reshape(len(x), -1))
        layer, normed = self._cross.EncDecAttention, norm(self._cross.layer_norm, x)
        query = layer.q(normed)
        if self._spread is None:
            found = self._sources.attend(layer, query)
        else:
            found = self._sources.attend_to(query, *self._spread)
        x = x + layer.o(found)
        return x + feed_forward(self._feed.DenseReluDense, norm(self._feed.layer_norm, x))
