"""Greedy decoding from packed sources: rows that have ended leave, and the cache holds no more than is used."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.students.fast.attention import FewQueries, projects_plainly
from lit_distill.students.fast.packing import Packing
from lit_distill.students.fast.products import linear
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
    """The tokens that ``model.generate`` gives in evaluation mode for these source rows, up to each end-of-sequence.

    ``process_logits`` is ``(scores (rows, vocabulary), step, row numbers (rows,)) -> scores``.
    """
    settings, device = model.generation_config, model.device
    eos = settings.eos_token_id
    ends = torch.tensor([] if eos is None else eos, device=device).view(-1)
    found: list[list[int]] = [[] for _ in rows]
    numbers = torch.arange(len(rows), device=device)
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    ids = torch.full((len(rows),), settings.decoder_start_token_id, device=device)
    decoder = Decoder(model.decoder, encoded, rows)
    for step in range(max_new_tokens):
        scores = linear(model.lm_head, into_head(model, decoder.step(ids, step))).float()
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
            decoder.keep(stay)
    return found


class Decoder:
    """A decoder with its cache, for the rows that are still decoding."""

    def __init__(self, stack: Any, encoded: Encoded, rows: Sequence[int]) -> None:
        self._stack = stack
        states, self._packing = encoded.states, encoded.packing.rows(rows)
        if len(set(rows)) < len(encoded.packing.lengths):
            # states that no row needs are not projected
            present, self._packing = self._packing.compact()
            states = states.index_select(0, present)
        self._states = states
        # where keys and values of the sources are more than a product with a weight (LoRA, say), they are made once
        layers = [block.layer[1].EncDecAttention for block in stack.block]
        self._projected = [
            None if projects_plainly(block) else (linear(layer.k, states), linear(layer.v, states))
            for block, layer in zip(stack.block, layers, strict=True)
        ]
        self._take_sources()
        # keys and values of each layer, `(2, rows, heads, capacity, d_kv)`
        shape = 2, len(rows), stack.config.num_heads, FIRST_CAPACITY, stack.config.d_kv
        self._caches = [states.new_zeros(shape) for _ in layers]
        self._bias = self._position_bias(FIRST_CAPACITY)

    def _position_bias(self, capacity: int) -> Tensor:
        """Of all positions that there is room for, ``(1, heads, capacity, capacity)``; the first layer has it."""
        first = self._stack.block[0].layer[0].SelfAttention
        bias: Tensor = first.compute_bias(capacity, capacity, device=self._states.device)
        return bias

    def _take_sources(self) -> None:
        queries = Packing([1] * len(self._packing.lengths), self._states.device)
        rows = range(len(self._packing.lengths))
        self._few = FewQueries(queries, self._packing, rows, self._stack.config.num_heads, self._states)
        self._sources = [pair and (self._by_head(pair[0]), self._by_head(pair[1])) for pair in self._projected]

    def _by_head(self, packed: Tensor) -> Tensor:
        """Keys or values ``(source tokens, heads * d_kv)`` as ``(rows, heads, source_len, d_kv)``."""
        spread = self._few.spread(packed)
        return spread.view(*spread.shape[:2], self._few.heads, -1).transpose(1, 2)

    def keep(self, rows: Tensor) -> None:
        """Keep only these of the rows."""
        self._packing = self._packing.rows(rows.tolist())
        self._take_sources()
        for number, cache in enumerate(self._caches):
            self._caches[number] = cache[:, rows]

    def step(self, ids: Tensor, position: int) -> Tensor:
        """The decoder's states ``(rows, d_model)`` at a position, for its token ids ``(rows,)``."""
        capacity = self._bias.shape[-1]
        if position == capacity:
            for number, cache in enumerate(self._caches):
                self._caches[number] = F.pad(cache, (0, 0, 0, capacity))
            self._bias = self._position_bias(2 * capacity)
        x: Tensor = self._stack.embed_tokens(ids)
        for block, cache, sources in zip(self._stack.block, self._caches, self._sources, strict=True):
            own, cross, feed = block.layer
            x = x + self._attend_to_targets(own.SelfAttention, norm(own.layer_norm, x), cache, position)
            x = x + self._attend_to_sources(cross.EncDecAttention, norm(cross.layer_norm, x), sources)
            x = x + feed_forward(feed.DenseReluDense, norm(feed.layer_norm, x))
        return norm(self._stack.final_layer_norm, x)

    def _attend_to_targets(self, layer: Any, x: Tensor, cache: Tensor, position: int) -> Tensor:
        heads = len(x), self._few.heads, -1
        cache[0, :, :, position], cache[1, :, :, position] = (
            linear(layer.k, x).view(heads),
            linear(layer.v, x).view(heads),
        )
        query = linear(layer.q, x).view(heads).unsqueeze(2)
        keys, values = cache[:, :, :, : position + 1].to(query.dtype)
        bias = self._bias[:, :, position : position + 1, : position + 1].to(query.dtype).expand(len(x), -1, -1, -1)
        found = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=1.0)
        out: Tensor = linear(layer.o, found.reshape(len(x), -1))
        return out

    def _attend_to_sources(self, layer: Any, x: Tensor, sources: tuple[Tensor, Tensor] | None) -> Tensor:
        query = linear(layer.q, x)
        if sources is None:
            found = self._few.attend(layer, query, 0.0)
        else:
            mask, (keys, values) = self._few.mask[:, None].to(query.dtype), sources
            by_head = query.view(len(x), self._few.heads, 1, -1)
            found = F.scaled_dot_product_attention(by_head, keys, values, attn_mask=mask, scale=1.0)
        out: Tensor = linear(layer.o, found.reshape(len(x), -1))
        return out
