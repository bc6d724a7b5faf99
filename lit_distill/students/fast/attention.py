r"""T5's attention :math:`\text{dropout}(\text{softmax}(Q K^T + B)) V` (not scaled) of packed rows."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lit_distill.batch import pad
from lit_distill.students.fast.casts import Casts, Shared, is_plain, project
from lit_distill.students.fast.functions import apply, dropout, dropout_mask, masked
from lit_distill.students.fast.packing import AttentionPlan, Packing

WORTH = 0.5
"""Rows attend without keys and values where that costs no more than this share of the ordinary way."""


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, plan: AttentionPlan, p: float
    ) -> Tensor:
        flat_q, flat_k, flat_v = plan.queries.spread(q), plan.keys.spread(k), plan.keys.spread(v)
        flat_out = torch.empty_like(flat_q)
        saved, factor = [], 1.0
        of_queries = zip(plan.queries.groups(flat_q), plan.queries.groups(flat_out), strict=True)
        of_keys = zip(plan.keys.groups(flat_k), plan.keys.groups(flat_v), strict=True)
        for (queries, out), (keys, values), added in zip(of_queries, of_keys, plan.offsets, strict=True):
            weights = torch.baddbmm(added, queries, keys.transpose(1, 2))
            weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
            saved.append(weights)
            if p:
                mask, factor = dropout_mask(weights, p)
                saved.append(mask)
                weights = masked(weights, mask)
            torch.baddbmm(out, weights, values, beta=0, alpha=factor, out=out)
        ctx.plan, ctx.p, ctx.factor = plan, p, factor
        ctx.save_for_backward(flat_q, flat_k, flat_v, *saved)
        return plan.queries.gather(flat_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat_q, flat_k, flat_v, *saved = ctx.saved_tensors
        plan: AttentionPlan = ctx.plan
        flat_grad = plan.queries.clear(plan.queries.spread(grad))
        grad_q, grad_k, grad_v = torch.empty_like(flat_q), torch.empty_like(flat_k), torch.empty_like(flat_v)
        bias_grad = None if plan.bias is None else flat_q.new_zeros(plan.bias.shape)
        of_queries = zip(*map(plan.queries.groups, (flat_q, flat_grad, grad_q)), strict=True)
        of_keys = zip(*map(plan.keys.groups, (flat_k, flat_v, grad_k, grad_v)), strict=True)
        parts, wide = iter(saved), torch.promote_types(flat_q.dtype, torch.float32)
        for (queries, out_grad, into_q), (keys, values, into_k, into_v) in zip(of_queries, of_keys, strict=True):
            weights = next(parts)
            dropped = masked(weights, next(parts)) if ctx.p else weights
            torch.baddbmm(into_v, dropped.transpose(1, 2), out_grad, beta=0, alpha=ctx.factor, out=into_v)
            scores_grad = torch.baddbmm(weights, out_grad, values.transpose(1, 2), beta=0, alpha=ctx.factor)
            # P_ij (dP_ij - sum_k P_ik dP_ik), whose two terms may be almost equal
            scores_grad = scores_grad.to(wide).mul_(dropped)
            scores_grad.addcmul_(weights, scores_grad.sum(-1, keepdim=True), value=-1.0)
            scores_grad = scores_grad.to(weights.dtype)
            torch.bmm(scores_grad, keys, out=into_q)
            torch.bmm(scores_grad.transpose(1, 2), queries, out=into_k)
            if bias_grad is not None:
                rows = scores_grad.unflatten(0, (-1, plan.heads))
                bias_grad[:, :, : rows.shape[2], : rows.shape[3]] += rows.sum(0, keepdim=True)
        gathered = plan.queries.gather(grad_q), plan.keys.gather(grad_k), plan.keys.gather(grad_v)
        return *gathered, bias_grad, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, p: float) -> Tensor:
    """The attention of packed queries ``(query tokens, heads * d_kv)`` to packed keys; ``p`` is the dropout rate."""
    return apply(_Attention, q, k, v, plan.bias, plan, p)


class SelfAttention:
    """Tokens attend to those of their own row; one for all layers of a stack.

    The first layer's attention has the stack's relative position bias. ``positions`` are those of the tokens in their
    rows, ``(rows, length)`` on the host, if they are not 0, 1, 2, ...
    """

    def __init__(
        self, stack: Any, packing: Packing, dtype: torch.dtype, *, causal: bool, positions: Tensor | None = None
    ) -> None:
        longest = max(packing.lengths) if positions is None else int(positions.max()) + 1
        bias = stack.block[0].layer[0].SelfAttention.compute_bias(longest, longest, device=packing.device)
        if positions is not None:
            places = positions.to(packing.device)
            bias = bias.detach()[0][:, places[:, :, None], places[:, None]].transpose(0, 1)
        self._plan = AttentionPlan(packing, packing, stack.config.num_heads, causal=causal, bias=bias, dtype=dtype)

    def __call__(self, layer: Any, x: Tensor, casts: Casts | None) -> Tensor:
        """A layer's attention, ``(tokens, d_model)``."""
        q, k, v = project((layer.q, layer.k, layer.v), x, casts)
        return project((layer.o,), attention(q, k, v, self._plan, _rate(layer)), casts)[0]

    @torch.no_grad()
    def received(self, layer: Any, x: Tensor, casts: Casts | None) -> Tensor:
        """The attention that each token receives of those of its row, summed over them and the heads, ``(tokens,)``.

        ``x`` is the layer's normed input. A row's sum is the number of its tokens times that of the heads.
        """
        slots = self._plan.queries
        flat_q, flat_k = map(slots.spread, project((layer.q, layer.k), x, casts))
        real = slots.clear(torch.ones(len(flat_q), 1, device=x.device))
        total = torch.empty_like(real)
        parts = zip(*map(slots.groups, (flat_q, flat_k, real, total)), self._plan.offsets, strict=True)
        for queries, keys, ones, into, added in parts:
            scores = torch.baddbmm(added, queries, keys.transpose(1, 2))
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
            torch.bmm(weights.transpose(1, 2), ones, out=into)
        return slots.gather(total).sum(1)


def causal_bias(stack: Any, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A stack's position bias, and -inf where a position would attend to later ones, ``(1, heads, length, length)``."""
    bias: Tensor = stack.block[0].layer[0].SelfAttention.compute_bias(length, length, device=device)
    later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    return bias.masked_fill(later, float("-inf")).to(dtype)


class PrefixAttention:
    """A decoder's self-attention for targets that share what they begin with, whose tokens are there once.

    ``paths`` are each target's tokens among the packed ones.
    """

    def __init__(self, decoder: Any, paths: Sequence[Sequence[int]], packing: Packing, dtype: torch.dtype) -> None:
        padded, device = pad(paths, -1), packing.device
        self._shape = *padded.shape, decoder.config.num_heads
        self._mask = causal_bias(decoder, padded.shape[1], device, dtype).expand(len(paths), -1, -1, -1)
        self._tokens = padded.clamp(min=0).flatten().to(device, non_blocking=True)
        real = (padded.flatten() >= 0).nonzero().squeeze(1)
        # a token's is the same on each of its paths
        places = torch.zeros(packing.tokens, dtype=torch.long)
        places[padded.flatten()[real]] = real
        self._places = places.to(device, non_blocking=True)

    def __call__(self, layer: Any, x: Tensor, casts: Casts | None) -> Tensor:
        """A layer's attention, ``(tokens, d_model)``."""
        q, k, v = (
            own.index_select(0, self._tokens)
            .unflatten(1, (self._shape[2], -1))
            .unflatten(0, self._shape[:2])
            .transpose(1, 2)
            for own in project((layer.q, layer.k, layer.v), x, casts)
        )
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask, dropout_p=_rate(layer), scale=1.0)
        packed = found.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, self._places)
        return project((layer.o,), packed, casts)[0]


class CrossAttention:
    """Targets attend to their sources, those of `few_queries` through `FewQueries`; one for all layers of a decoder.

    ``encoded`` are the encoder's states ``(source tokens, d_model)``.
    """

    def __init__(self, decoder: Any, targets: Packing, sources: Packing, encoded: Tensor, dtype: torch.dtype) -> None:
        config = decoder.config
        few: list[int] = []
        if all(projects_plainly(block) for block in decoder.block):
            few = few_queries(targets, sources, heads=config.num_heads, d_model=config.d_model, d_kv=config.d_kv)
        many = sorted(set(range(len(targets.lengths))) - set(few))
        self._parts: list[_ManyQueries | FewQueries] = []
        if many:
            self._parts.append(_ManyQueries(targets, sources, many, config.num_heads, encoded, dtype))
        if few:
            self._parts.append(FewQueries(targets, sources, few, config.num_heads, encoded))
        self._order = torch.cat([part.tokens for part in self._parts]).argsort() if many and few else None

    def __call__(self, layer: Any, x: Tensor, casts: Casts | None) -> Tensor:
        """A layer's attention, ``(target tokens, d_model)``."""
        (q,) = project((layer.q,), x, casts)
        found = [part.attend(layer, q, _rate(layer), casts) for part in self._parts]
        out = found[0] if self._order is None else torch.cat(found).index_select(0, self._order)
        return project((layer.o,), out, casts)[0]


def _rate(layer: Any) -> float:
    return float(layer.dropout) if layer.training else 0.0


def projects_plainly(block: Any) -> bool:
    """Whether keys and values of the encoder's states are nothing but a matrix product with a weight."""
    layer = block.layer[1].EncDecAttention
    return is_plain(layer.k) and is_plain(layer.v)


def few_queries(queries: Packing, keys: Packing, *, heads: int, d_model: int, d_kv: int) -> list[int]:
    """The rows whose targets are so short that `FewQueries` costs less, by the number of multiplications."""

    def pays(n: int, s: int) -> bool:
        return heads * d_model * n * (d_kv + s) <= WORTH * heads * d_kv * s * (d_model + n)

    return [row for row, (n, s) in enumerate(zip(queries.lengths, keys.lengths, strict=True)) if pays(n, s)]


class _ManyQueries:
    """Attention of some rows' queries to keys and values of the encoder's states."""

    def __init__(
        self, queries: Packing, keys: Packing, rows: Sequence[int], heads: int, encoded: Tensor, dtype: torch.dtype
    ) -> None:
        self.tokens, own = queries.rows(rows).compact()
        present, sources = keys.rows(rows).compact()
        self._encoded = Shared(encoded.index_select(0, present))
        self._plan = AttentionPlan(own, sources, heads, dtype=dtype)

    def attend(self, layer: Any, q: Tensor, p: float, casts: Casts | None) -> Tensor:
        """As `FewQueries.attend`."""
        own = q if len(q) == len(self.tokens) else q.index_select(0, self.tokens)
        k, v = project((layer.k, layer.v), self._encoded.read(casts), casts)
        return attention(own, k, v, self._plan, p)


class FewQueries:
    r"""Attention of some rows' few queries to the encoder's states themselves, without keys or values.

    A row of n queries and s source tokens needs :math:`QK^T = Q_h (E W_k)^T = (Q_h W_k^T) E^T` for each head. The keys
    cost s projections, the right-hand side n of them, and a label has n of about 3 where s is about 50. So do values.
    """

    def __init__(self, queries: Packing, keys: Packing, rows: Sequence[int], heads: int, encoded: Tensor) -> None:
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
        self._encoded = Shared(self.spread(encoded))

    def spread(self, packed: Tensor) -> Tensor:
        """What belongs to packed source tokens, such as their states, ``(rows, source_len, size)``; see `mask`."""
        return packed.index_select(0, self._source).view(self._shape[0], self._shape[2], -1)

    def attend(self, layer: Any, q: Tensor, p: float, casts: Casts | None = None) -> Tensor:
        """A layer's attention at `tokens`, ``(tokens, heads * d_kv)``, before its output projection.

        ``q`` are the queries of all targets' tokens, ``(all tokens, heads * d_kv)``; ``p`` is the dropout rate.
        """
        rows, length, _ = self._shape
        encoded = self._encoded.read(casts)
        d_model = encoded.shape[-1]
        own = q.index_select(0, self._query).view(rows * length, self.heads, -1).transpose(0, 1)
        weights = [linear.weight if casts is None else casts.of(linear.weight) for linear in (layer.k, layer.v)]
        key, value = (weight.view(self.heads, -1, d_model) for weight in weights)
        projected = torch.bmm(own, key).view(self.heads, rows, length, d_model)
        by_row = projected.transpose(0, 1).reshape(rows, self.heads * length, d_model)
        scores = torch.bmm(by_row, encoded.transpose(1, 2))
        shares = torch.softmax(scores + self.mask, dim=-1, dtype=torch.float32).to(scores.dtype)
        found = torch.bmm(dropout(shares, p), encoded).view(rows, self.heads, length, d_model)
        by_head = found.transpose(0, 1).reshape(self.heads, rows * length, d_model)
        out = torch.bmm(by_head, value.transpose(1, 2))
        return out.transpose(0, 1).reshape(rows * length, -1).index_select(0, self._real)
