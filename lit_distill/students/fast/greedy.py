"""Greedy decoding from packed sources, without waiting for an accelerator at each token."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.students.fast.attention import FewQueries, causal_bias, projects_plainly
from lit_distill.students.fast.packing import Packing
from lit_distill.students.fast.products import linear
from lit_distill.students.fast.t5 import Encoded, dtype_of, feed_forward, into_head, norm
from lit_distill.students.tokens import end_tokens, until

FIRST_CAPACITY = 4
"""Positions of the first cache; it doubles when it is full, so that a step has one of few shapes."""

WORTH_LEAVING = 0.75
"""On the CPU ended rows are taken out of the cache once no more than this share of it is still decoding."""

STEPS_BEHIND = 8
"""The host waits for what an accelerator has found where that is more than so many steps behind."""


@torch.no_grad()
def greedy(
    model: Any,
    encoded: Encoded,
    rows: Sequence[int],
    max_new_tokens: int,
    process_logits: Callable[[Tensor, int, Tensor], Tensor] | None = None,
) -> list[list[int]]:
    """The tokens that ``model.generate`` gives in evaluation mode for these source rows, up to each end-of-sequence.

    An accelerator decodes all rows until the host has heard that each has ended, and is never waited for at its last
    steps; on the CPU ended rows leave.

    ``process_logits`` is ``(scores (rows, vocabulary), step, row numbers (rows,)) -> scores``.
    """
    settings, device = model.generation_config, model.device
    stops = end_tokens(settings)
    ends = torch.tensor(sorted(stops), dtype=torch.long, device=device)
    tokens = torch.zeros(len(rows), max_new_tokens, dtype=torch.long, device=device)
    numbers = torch.arange(len(rows), device=device)
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    ids = torch.full((len(rows),), settings.decoder_start_token_id, device=device)
    decoder = Decoder(model.decoder, encoded, rows)
    looks: deque[HostCopy] = deque()
    for step in range(max_new_tokens):
        scores = linear(model.lm_head, into_head(model, decoder.step(ids))).float()
        if process_logits is not None:
            scores = process_logits(scores, step, numbers)
        ids = scores.argmax(dim=-1)
        tokens[numbers, step] = ids
        alive = alive & (ids[:, None] != ends).all(1)
        looks.append(HostCopy(alive))
        left = len(rows)
        while looks and (looks[0].arrived() or len(looks) > STEPS_BEHIND):
            going = looks.popleft().wait()
            left = int(going.sum())
        if left == 0:
            break
        if device.type == "cpu" and left <= WORTH_LEAVING * len(alive):
            stay = alive.nonzero().squeeze(1)
            ids, numbers, alive = ids[stay], numbers[stay], alive[stay]
            decoder.keep(stay)
    return [until(stops, row) for row in HostCopy(tokens).wait().tolist()]


class HostCopy:
    """A tensor's copy on the host, which an accelerator makes once it has computed the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=tensor.is_cuda)
        self._event: Any = None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def arrived(self) -> bool:
        """Whether `wait` returns at once."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> Tensor:
        """The copy, when it is complete."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy


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
        # keys and values of the sources are made once where they are more than a product with a weight (LoRA, say), or
        # where a kernel costs more than a product
        layers = [block.layer[1].EncDecAttention for block in stack.block]
        self._projected = [
            None
            if states.device.type == "cpu" and projects_plainly(block)
            else (linear(layer.k, states), linear(layer.v, states))
            for block, layer in zip(stack.block, layers, strict=True)
        ]
        self._dtype = dtype_of(states)
        self._take_sources()
        # keys and values of each layer, `(2, rows, capacity, heads * d_kv)`
        shape = 2, len(rows), 0, stack.config.num_heads * stack.config.d_kv
        self._caches = [states.new_zeros(shape, dtype=self._dtype) for _ in layers]
        self._steps = 0
        self._position = torch.zeros(1, dtype=torch.long, device=states.device)

    def _grow(self, capacity: int) -> None:
        """Make room for so many positions."""
        for number, cache in enumerate(self._caches):
            self._caches[number] = F.pad(cache, (0, 0, 0, capacity - cache.shape[2]))
        self._bias = causal_bias(self._stack, capacity, self._position.device, self._dtype)

    def _take_sources(self) -> None:
        queries = Packing([1] * len(self._packing.lengths), self._states.device)
        rows = range(len(self._packing.lengths))
        self._few = FewQueries(queries, self._packing, rows, self._stack.config.num_heads, self._states)
        self._mask = self._few.mask[:, None].to(self._dtype)
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

    def step(self, ids: Tensor) -> Tensor:
        """The decoder's states ``(rows, d_model)`` at its next position, for its token ids ``(rows,)``."""
        capacity = self._caches[0].shape[2]
        if self._steps == capacity:
            self._grow(2 * capacity or FIRST_CAPACITY)
        states = self._step(ids)
        self._position += 1
        self._steps += 1
        return states

    def _step(self, ids: Tensor) -> Tensor:
        """One step, of few shapes: the position is a tensor, so that this can be compiled or captured in a graph."""
        bias = self._bias.index_select(2, self._position).expand(len(ids), -1, -1, -1)
        x: Tensor = self._stack.embed_tokens(ids)
        for block, cache, sources in zip(self._stack.block, self._caches, self._sources, strict=True):
            own, cross, feed = block.layer
            x = x + self._attend_to_targets(own.SelfAttention, norm(own.layer_norm, x), cache, bias)
            x = x + self._attend_to_sources(cross.EncDecAttention, norm(cross.layer_norm, x), sources)
            x = x + feed_forward(feed.DenseReluDense, norm(feed.layer_norm, x))
        return norm(self._stack.final_layer_norm, x)

    def _attend_to_targets(self, layer: Any, x: Tensor, cache: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (linear(own, x).unsqueeze(1) for own in (layer.q, layer.k, layer.v))
        cache[0].index_copy_(1, self._position, key)
        cache[1].index_copy_(1, self._position, value)
        query, keys, values = (
            own.unflatten(2, (self._few.heads, -1)).transpose(1, 2) for own in (query, cache[0], cache[1])
        )
        found = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=1.0)
        return linear(layer.o, found.reshape(len(x), -1))

    def _attend_to_sources(self, layer: Any, x: Tensor, sources: tuple[Tensor, Tensor] | None) -> Tensor:
        query = linear(layer.q, x)
        if sources is None:
            found = self._few.attend(layer, query, 0.0)
        else:
            by_head = query.view(len(x), self._few.heads, 1, -1)
            found = F.scaled_dot_product_attention(by_head, *sources, attn_mask=self._mask, scale=1.0)
        return linear(layer.o, found.reshape(len(x), -1))
