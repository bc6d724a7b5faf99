"""How a layer looks at tokens: at those of its own row, or at the encoder's states. Made once for all layers."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Attention, T5Block, T5Stack

from lit_distill.students.fast.few_queries import FewQueries, few_queries
from lit_distill.students.fast.functions import attention, score_offsets
from lit_distill.students.fast.packing import AttentionPlan, Packing


def _rate(attend: T5Attention) -> float:
    return float(attend.dropout) if attend.training else 0.0


class SelfLook:
    """Tokens look at those of their own row.

    Args:
        plan: who looks at whom.
        holder: the layer that has the stack's relative position bias.
        dtype: of the scores.
    """

    def __init__(self, plan: AttentionPlan, holder: T5Attention, dtype: torch.dtype) -> None:
        self._plan = plan
        self._bias: Tensor = holder.compute_bias(*plan.longest, device=plan.queries.device)
        self._offsets = score_offsets(plan, self._bias, dtype)

    def __call__(self, attend: T5Attention, x: Tensor) -> Tensor:
        """A layer's attention, ``(tokens, d_model)``."""
        q, k, v = attend.q(x), attend.k(x), attend.v(x)
        return cast(Tensor, attend.o(attention(q, k, v, self._bias, self._offsets, self._plan, _rate(attend))))


class CrossLook:
    """Targets look at their sources: those of few queries in their own way, the others at keys and values.

    Args:
        stack: the decoder.
        targets: the targets.
        sources: the source of each.
        encoded: the encoder's states ``(source tokens, d_model)``.
        dtype: of the scores.
    """

    def __init__(self, stack: T5Stack, targets: Packing, sources: Packing, encoded: Tensor, dtype: torch.dtype) -> None:
        heads = stack.config.num_heads
        few: list[int] = []
        blocks: Any = stack.block
        if all(map(projects_plainly, blocks)):
            few = few_queries(targets, sources, heads=heads, d_model=stack.config.d_model, d_kv=stack.config.d_kv)
        rest = sorted(set(range(len(targets.lengths))) - set(few))
        self._few: FewQueries | None = None
        if few:
            self._few = FewQueries(targets, sources, few, heads)
            self._few_sources = self._few.spread(encoded)
        self._rest: AttentionPlan | None = None
        if rest:
            self._tokens, asking = targets.rows(rest).compact()
            present, asked = sources.rows(rest).compact()
            self._rest = AttentionPlan(asking, asked, heads)
            self._rest_sources = encoded.index_select(0, present)
            self._offsets = score_offsets(self._rest, None, dtype)
        if self._few is not None and self._rest is not None:
            self._order = torch.cat([self._tokens, self._few.tokens]).argsort()

    def __call__(self, attend: T5Attention, x: Tensor) -> Tensor:
        """A layer's attention, ``(target tokens, d_model)``."""
        q, rate = attend.q(x), _rate(attend)
        parts = []
        if self._rest is not None:
            own = q if self._few is None else q.index_select(0, self._tokens)
            k, v = attend.k(self._rest_sources), attend.v(self._rest_sources)
            parts.append(attention(own, k, v, None, self._offsets, self._rest, rate))
        if self._few is not None:
            key, value = attend.k.weight, attend.v.weight
            parts.append(self._few.attend(q, self._few_sources, key, value, rate))
        out = parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, self._order)
        return cast(Tensor, attend.o(out))


def projects_plainly(block: T5Block) -> bool:
    """Whether keys and values of the encoder's states are nothing but a matrix product with a weight."""
    layers: Any = block.layer
    attend = layers[1].EncDecAttention
    return all(type(linear) is nn.Linear and linear.bias is None for linear in (attend.k, attend.v))
