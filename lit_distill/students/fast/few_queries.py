"""Cross-attention of short targets: a label's few queries look at the encoder's states without keys or values.

A row of n queries and s source tokens needs :math:`QK^T = Q_h (E W_k)^T = (Q_h W_k^T) E^T` for each head. The keys
cost s projections, the right-hand side n of them, and a label has n of about 3 where s is about 50; the values
likewise. The projections of keys and values over the source are a sixth of the encoder's own cost, so that leaving
them out pays wherever targets are short.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_distill.students.fast.functions import dropout
from lit_distill.students.fast.packing import Packing

WORTH = 0.5
"""Rows are taken for which this way costs no more than this share of the ordinary one."""


def few_queries(queries: Packing, keys: Packing, *, heads: int, d_model: int, d_kv: int) -> list[int]:
    """The rows whose targets are so short, by multiplications.

    Args:
        queries: the targets.
        keys: their sources.
        heads: attention heads.
        d_model: width of the encoder's states.
        d_kv: width of a head.
    """

    def pays(n: int, s: int) -> bool:
        ordinary = heads * d_kv * s * (d_model + n)
        return heads * d_model * n * (d_kv + s) <= WORTH * ordinary

    return [row for row, (n, s) in enumerate(zip(queries.lengths, keys.lengths, strict=True)) if pays(n, s)]


class FewQueries:
    """How the queries of some rows look at the encoder's states.

    Args:
        queries: all targets.
        keys: their sources.
        rows: the rows.
        heads: attention heads.
    """

    def __init__(self, queries: Packing, keys: Packing, rows: Sequence[int], heads: int) -> None:
        self.heads = heads
        asking, asked = queries.rows(rows), keys.rows(rows)
        self._shape = len(rows), max(asking.lengths), max(asked.lengths)
        query, real = asking.padded(self._shape[1])
        source, present = asked.padded(self._shape[2])
        device = queries.device
        self.tokens = query[real].to(device, non_blocking=True)
        """The rows' tokens among all targets', ``(tokens,)``."""
        self._query = query.flatten().to(device, non_blocking=True)
        self._source = source.flatten().to(device, non_blocking=True)
        self._real = asking.positions(self._shape[1])
        hidden = torch.zeros(present.shape).masked_fill_(~present, float("-inf"))
        self.hidden = hidden[:, None].to(device, non_blocking=True)
        """0 at the sources' tokens and -inf at their padding, ``(rows, 1, source_len)``."""

    def spread(self, encoded: Tensor) -> Tensor:
        """What belongs to the source tokens, such as their states, ``(rows, source_len, size)``; see `hidden`."""
        return encoded.index_select(0, self._source).view(self._shape[0], self._shape[2], -1)

    def attend(self, q: Tensor, sources: Tensor, key: Tensor, value: Tensor, p: float) -> Tensor:
        """The attention's output at `tokens`, ``(tokens, heads * d_kv)``.

        Args:
            q: queries of all targets' tokens, ``(all tokens, heads * d_kv)``.
            sources: what `spread` gave.
            key: the projection's weight, ``(heads * d_kv, d_model)``.
            value: likewise.
            p: dropout rate of the attention weights.
        """
        rows, length, _ = self._shape
        d_model = sources.shape[-1]
        own = q.index_select(0, self._query).view(rows * length, self.heads, -1).transpose(0, 1)
        asking = torch.bmm(own, key.view(self.heads, -1, d_model))
        scores = torch.bmm(self._by_row(asking), sources.transpose(1, 2))
        weights = torch.softmax(scores + self.hidden, dim=-1, dtype=torch.float32).to(scores.dtype)
        found = torch.bmm(dropout(weights, p), sources)
        out = torch.bmm(self._by_head(found), value.view(self.heads, -1, d_model).transpose(1, 2))
        return out.transpose(0, 1).reshape(rows * length, -1).index_select(0, self._real)

    def _by_row(self, x: Tensor) -> Tensor:
        """``(heads, rows * length, d_model)`` to ``(rows, heads * length, d_model)``."""
        rows, length, _ = self._shape
        return x.view(self.heads, rows, length, -1).transpose(0, 1).reshape(rows, self.heads * length, -1)

    def _by_head(self, x: Tensor) -> Tensor:
        """And back."""
        rows, length, _ = self._shape
        return x.view(rows, self.heads, length, -1).transpose(0, 1).reshape(self.heads, rows * length, -1)
