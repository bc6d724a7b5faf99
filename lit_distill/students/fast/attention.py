r"""T5's attention :math:`\text{dropout}(\text{softmax}(Q K^T + B)) V` (not scaled) of packed rows."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lit_distill.students.fast.functions import apply, dropout, dropout_mask
from lit_distill.students.fast.packing import AttentionPlan, Packing

WORTH = 0.5
"""Rows attend without keys and values where that costs no more than this share of the ordinary way."""


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        offsets: list[Tensor],
        plan: AttentionPlan,
        p: float,
    ) -> Tensor:
        flat_q, flat_k, flat_v = plan.query_slots.spread(q), plan.key_slots.spread(k), plan.key_slots.spread(v)
        flat_out = torch.empty_like(flat_q)
        saved, factor = [], 1.0
        for group, added in zip(plan.groups, offsets, strict=True):
            queries, keys, values = group.queries_of(flat_q), group.keys_of(flat_k), group.keys_of(flat_v)
            weights = torch.baddbmm(added, queries, keys.transpose(1, 2))
            weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
            saved.append(weights)
            if p:
                mask, factor = dropout_mask(weights, p)
                saved.append(mask)
                weights = mask.to(weights.dtype).mul_(weights)
            out = group.queries_of(flat_out)
            torch.baddbmm(out, weights, values, beta=0, alpha=factor, out=out)
        ctx.plan, ctx.p, ctx.factor = plan, p, factor
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.save_for_backward(flat_q, flat_k, flat_v, flat_out, *saved)
        return plan.query_slots.gather(flat_out, plan.queries.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat_q, flat_k, flat_v, flat_out, *saved = ctx.saved_tensors
        plan: AttentionPlan = ctx.plan
        flat_grad = plan.query_slots.clear(plan.query_slots.spread(grad))
        # sum_j P_ij dP_ij of the softmax's backward pass, without its dropout: dO_i . O_i
        along = (flat_grad * flat_out).sum(-1, keepdim=True)
        grad_q, grad_k, grad_v = torch.empty_like(flat_q), torch.empty_like(flat_k), torch.empty_like(flat_v)
        bias_grad = None if ctx.bias_shape is None else flat_q.new_zeros(ctx.bias_shape)
        parts = iter(saved)
        for group in plan.groups:
            weights = next(parts)
            dropped = next(parts).to(weights.dtype).mul_(weights) if ctx.p else weights
            out_grad, into_v = group.queries_of(flat_grad), group.keys_of(grad_v)
            torch.baddbmm(into_v, dropped.transpose(1, 2), out_grad, beta=0, alpha=ctx.factor, out=into_v)
            values = group.keys_of(flat_v)
            scores_grad = torch.baddbmm(weights, out_grad, values.transpose(1, 2), beta=0, alpha=ctx.factor)
            scores_grad.mul_(dropped).addcmul_(weights, group.queries_of(along), value=-1.0)
            torch.bmm(scores_grad, group.keys_of(flat_k), out=group.queries_of(grad_q))
            torch.bmm(scores_grad.transpose(1, 2), group.queries_of(flat_q), out=group.keys_of(grad_k))
            if bias_grad is not None:
                rows = scores_grad.view(group.rows, plan.heads, group.queries, group.keys)
                bias_grad[:, :, : group.queries, : group.keys] += rows.sum(0, keepdim=True)
        q_grad = plan.query_slots.gather(grad_q, plan.queries.tokens)
        k_grad, v_grad = (plan.key_slots.gather(x, plan.keys.tokens) for x in (grad_k, grad_v))
        return q_grad, k_grad, v_grad, bias_grad, None, None, None


def score_offsets(plan: AttentionPlan, bias: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """What is added to the scores of each group, ``(rows * heads, queries, keys)``: mask and position bias.

    The bias is that of the longest rows, ``(1, heads, queries, keys)``; cross-attention has none.
    """
    offsets = []
    for group in plan.groups:
        added = group.mask.expand(group.rows, plan.heads, group.queries, group.keys)
        if bias is not None:
            added = added + bias.detach()[:, :, : group.queries, : group.keys]
        offsets.append(added.to(dtype).reshape(-1, group.queries, group.keys))
    return offsets


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, offsets: list[Tensor], plan: AttentionPlan, p: float
) -> Tensor:
    """The attention of packed queries ``(query tokens, heads * d_kv)`` to packed keys; ``p`` is the dropout rate.

    ``offsets`` are the `score_offsets` of ``bias``, which gets its gradient here.
    """
    return apply(_Attention, q, k, v, bias, offsets, plan, p)


class SelfAttention:
    """Tokens attend to those of their own row; one for all layers of a stack.

    ``first`` is the first layer's attention, which has the stack's relative position bias.
    """

    def __init__(self, plan: AttentionPlan, first: Any, dtype: torch.dtype) -> None:
        self._plan = plan
        self._bias: Tensor = first.compute_bias(*plan.longest, device=plan.queries.device)
        self._offsets = score_offsets(plan, self._bias, dtype)

    def __call__(self, layer: Any, x: Tensor) -> Tensor:
        """A layer's attention, ``(tokens, d_model)``."""
        q, k, v = layer.q(x), layer.k(x), layer.v(x)
        return cast(Tensor, layer.o(attention(q, k, v, self._bias, self._offsets, self._plan, attention_rate(layer))))


class CrossAttention:
    """Targets attend to their sources, those of `few_queries` through `FewQueries`; one for all layers of a decoder.

    ``encoded`` are the encoder's states ``(source tokens, d_model)``.
    """

    def __init__(
        self,
        decoder: Any,
        targets: Packing,
        sources: Packing,
        encoded: Tensor,
        dtype: torch.dtype,
    ) -> None:
        config = decoder.config
        few: list[int] = []
        if all(projects_plainly(block) for block in decoder.block):
            few = few_queries(targets, sources, heads=config.num_heads, d_model=config.d_model, d_kv=config.d_kv)
        rest = sorted(set(range(len(targets.lengths))) - set(few))
        self._few: FewQueries | None = None
        if few:
            self._few = FewQueries(targets, sources, few, config.num_heads)
            self._few_sources = self._few.spread(encoded)
        self._rest: AttentionPlan | None = None
        if rest:
            self._tokens, queries = targets.rows(rest).compact()
            present, keys = sources.rows(rest).compact()
            self._rest = AttentionPlan(queries, keys, config.num_heads)
            self._rest_sources = encoded.index_select(0, present)
            self._offsets = score_offsets(self._rest, None, dtype)
        if self._few is not None and self._rest is not None:
            self._order = torch.cat([self._tokens, self._few.tokens]).argsort()

    def __call__(self, layer: Any, x: Tensor) -> Tensor:
        """A layer's attention, ``(target tokens, d_model)``."""
        q, rate = layer.q(x), attention_rate(layer)
        parts = []
        if self._rest is not None:
            own = q if self._few is None else q.index_select(0, self._tokens)
            k, v = layer.k(self._rest_sources), layer.v(self._rest_sources)
            parts.append(attention(own, k, v, None, self._offsets, self._rest, rate))
        if self._few is not None:
            parts.append(self._few.attend(q, self._few_sources, layer.k.weight, layer.v.weight, rate))
        out = parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, self._order)
        return cast(Tensor, layer.o(out))


def attention_rate(layer: Any) -> float:
    """The dropout rate of a layer's attention weights now."""
    return float(layer.dropout) if layer.training else 0.0


def projects_plainly(block: Any) -> bool:
    """Whether keys and values of the encoder's states are nothing but a matrix product with a weight."""
    layer = block.layer[1].EncDecAttention
    return all(type(linear) is nn.Linear and linear.bias is None for linear in (layer.k, layer.v))


def few_queries(queries: Packing, keys: Packing, *, heads: int, d_model: int, d_kv: int) -> list[int]:
    """The rows whose targets are so short that `FewQueries` costs less, by the number of multiplications."""

    def pays(n: int, s: int) -> bool:
        return heads * d_model * n * (d_kv + s) <= WORTH * heads * d_kv * s * (d_model + n)

    return [row for row, (n, s) in enumerate(zip(queries.lengths, keys.lengths, strict=True)) if pays(n, s)]


class FewQueries:
    r"""Attention of some rows' few queries to the encoder's states themselves, without keys or values.

    A row of n queries and s source tokens needs :math:`QK^T = Q_h (E W_k)^T = (Q_h W_k^T) E^T` for each head. The keys
    cost s projections, the right-hand side n of them, and a label has n of about 3 where s is about 50. So do values.
    """

    def __init__(self, queries: Packing, keys: Packing, rows: Sequence[int], heads: int) -> None:
        self.heads = heads
        own, sources = queries.rows(rows), keys.rows(rows)
        self._shape = len(rows), max(own.lengths), max(sources.lengths)
        query, real = own.padded(self._shape[1])
        source, present = sources.padded(self._shape[2])
        device = queries.device
        self.tokens = query[real].to(device, non_blocking=True)
        """The rows' tokens among all targets', ``(tokens,)``."""
        self._query = query.flatten().to(device, non_blocking=True)
        self._source = source.flatten().to(device, non_blocking=True)
        self._real = own.positions(self._shape[1])
        mask = torch.zeros(present.shape).masked_fill_(~present, float("-inf"))
        self.mask = mask[:, None].to(device, non_blocking=True)
        """0 at the sources' tokens and -inf at their padding, ``(rows, 1, source_len)``."""

    def spread(self, encoded: Tensor) -> Tensor:
        """What belongs to packed source tokens, such as their states, ``(rows, source_len, size)``; see `mask`."""
        return encoded.index_select(0, self._source).view(self._shape[0], self._shape[2], -1)

    def attend(self, q: Tensor, sources: Tensor, key: Tensor, value: Tensor, p: float) -> Tensor:
        """The attention's output at `tokens`, ``(tokens, heads * d_kv)``.

        Args:
            q: queries of all targets' tokens, ``(all tokens, heads * d_kv)``.
            sources: the encoder's states, `spread`.
            key: weight of the projection to keys, ``(heads * d_kv, d_model)``.
            value: weight of the projection to values.
            p: dropout rate of the attention weights.
        """
        rows, length, _ = self._shape
        d_model = sources.shape[-1]
        own = q.index_select(0, self._query).view(rows * length, self.heads, -1).transpose(0, 1)
        projected = torch.bmm(own, key.view(self.heads, -1, d_model)).view(self.heads, rows, length, d_model)
        by_row = projected.transpose(0, 1).reshape(rows, self.heads * length, d_model)
        scores = torch.bmm(by_row, sources.transpose(1, 2))
        weights = torch.softmax(scores + self.mask, dim=-1, dtype=torch.float32).to(scores.dtype)
        found = torch.bmm(dropout(weights, p), sources).view(rows, self.heads, length, d_model)
        by_head = found.transpose(0, 1).reshape(self.heads, rows * length, d_model)
        out = torch.bmm(by_head, value.view(self.heads, -1, d_model).transpose(1, 2))
        return out.transpose(0, 1).reshape(rows * length, -1).index_select(0, self._real)
