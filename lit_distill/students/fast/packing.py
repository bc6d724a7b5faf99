"""Which positions are real: rows laid end to end without padding, and how those of similar length attend together.

Everything here is settled on the host from the rows' lengths, so that nothing waits for an accelerator.
"""

import copy
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

FILLED = 0.75
"""Rows attend together as long as this share of their padded rectangle is real: fewer kernels against less padding."""


class Packing:
    """Rows laid end to end: token ``t`` of row ``r`` is packed token ``starts[r] + t``.

    Made of the real tokens of each row; index tensors go to ``device``.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.lengths = tuple(lengths)
        self.device = torch.device(device)
        *starts, self.tokens = accumulate(self.lengths, initial=0)
        self.starts = tuple(starts)

    def rows(self, chosen: Sequence[int]) -> "Packing":
        """These rows of the same tokens, in this order; a row may be chosen several times, or not at all."""
        found = copy.copy(self)
        found.lengths = tuple(self.lengths[row] for row in chosen)
        found.starts = tuple(self.starts[row] for row in chosen)
        return found

    def compact(self) -> tuple[Tensor, "Packing"]:
        """The tokens of these rows alone, each once, ``(tokens,)``, and the rows among them."""
        first: dict[int, int] = {}
        taken, tokens = [], 0
        for start, length in zip(self.starts, self.lengths, strict=True):
            if start not in first:
                first[start] = tokens
                taken.append(torch.arange(start, start + length))
                tokens += length
        found = copy.copy(self)
        found.starts, found.tokens = tuple(first[start] for start in self.starts), tokens
        return torch.cat(taken).to(self.device, non_blocking=True), found

    def padded(self, width: int) -> tuple[Tensor, Tensor]:
        """The packed token at each padded position, 0 at padding, and which are real; ``(rows, width)`` on the host."""
        position = torch.arange(width)
        real = position < torch.tensor(self.lengths)[:, None]
        return (torch.tensor(self.starts)[:, None] + position).masked_fill_(~real, 0), real

    def positions(self, width: int) -> Tensor:
        """Where the packed tokens lie in a padded ``(rows, width)`` tensor that is flattened, ``(tokens,)``."""
        _, real = self.padded(width)
        return real.flatten().nonzero().squeeze(1).to(self.device, non_blocking=True)


class Slots:
    """The padded positions of groups of rows behind each other: their tokens, and where each token went.

    Heads are spread as well: a group's part of the flat buffer is ``(rows, heads, positions)``, where the positions are
    those of its longest row.
    """

    def __init__(self, packing: Packing, groups: Sequence[Sequence[int]], heads: int) -> None:
        self.tokens, self.heads = packing.tokens, heads
        self.shapes = [(len(rows), max(packing.lengths[row] for row in rows)) for rows in groups]
        token_of_slot, empty, first, head = [], [], 0, torch.arange(heads)[:, None]
        slot_of_token = torch.full((packing.tokens * heads,), -1)
        starts, lengths = torch.tensor(packing.starts), torch.tensor(packing.lengths)
        for rows, (_, width) in zip(groups, self.shapes, strict=True):
            chosen, position = torch.tensor(rows)[:, None, None], torch.arange(width)
            token = (starts[chosen] + position) * heads + head  # (rows, heads, width)
            real = (position < lengths[chosen]).expand_as(token)
            slot = torch.arange(first, first + token.numel()).view_as(token)
            slot_of_token[token[real]] = slot[real]
            empty.append(slot[~real])
            token_of_slot.append(token.masked_fill(~real, 0).flatten())
            first += token.numel()
        # an empty slot holds the first token, which the mask or `clear` takes out again
        self.token_of_slot = torch.cat(token_of_slot).to(packing.device, non_blocking=True)
        self.slot_of_token = slot_of_token.to(packing.device, non_blocking=True)
        self.empty = torch.cat(empty).to(packing.device, non_blocking=True)
        # a token has one slot, but where rows were chosen several times, or not at all
        self._one_to_one = first - len(self.empty) == len(slot_of_token) and bool((slot_of_token >= 0).all())

    def spread(self, packed: Tensor) -> Tensor:
        """``(tokens, heads * size)`` to ``(slots, size)``; what empty slots hold is of no meaning."""
        return packed.reshape(len(self.slot_of_token), -1).index_select(0, self.token_of_slot)

    def groups(self, flat: Tensor) -> list[Tensor]:
        """Views of each group's part of ``(slots, size)``, ``(rows * heads, positions, size)``."""
        parts = flat.split([rows * self.heads * width for rows, width in self.shapes])
        return [part.view(-1, width, flat.shape[1]) for part, (_, width) in zip(parts, self.shapes, strict=True)]

    def clear(self, flat: Tensor) -> Tensor:
        """Zeros in the empty slots, in place."""
        return flat.index_fill_(0, self.empty, 0.0)

    def gather(self, flat: Tensor) -> Tensor:
        """``(slots, size)`` back to ``(tokens, heads * size)``, summed over the slots of a token."""
        if self._one_to_one:
            return flat.index_select(0, self.slot_of_token).view(self.tokens, -1)
        summed = flat.new_zeros(len(self.slot_of_token), flat.shape[1])
        return summed.index_add_(0, self.token_of_slot, self.clear(flat)).view(self.tokens, -1)


class AttentionPlan:
    """How packed queries attend to packed keys, row by row; ``causal``: no position attends to later ones.

    ``bias`` is that of the longest rows' positions, ``(1, heads, queries, keys)``, or of each row's, ``(rows, ...)``,
    which then has no gradient. ``offsets`` are added to the scores of each group of rows,
    ``(rows * heads, queries, keys)``: the bias, and -inf where a query does not attend to a key.
    """

    def __init__(
        self,
        queries: Packing,
        keys: Packing,
        heads: int,
        *,
        causal: bool = False,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.heads, self.bias = heads, bias
        groups = groups_of(queries.lengths, keys.lengths)
        self.queries = Slots(queries, groups, heads)
        self.keys = self.queries if queries is keys else Slots(keys, groups, heads)
        self.offsets = []
        for rows, (_, q), (_, k) in zip(groups, self.queries.shapes, self.keys.shapes, strict=True):
            if causal:
                hidden = torch.ones(q, k, dtype=torch.bool).triu(1).view(1, 1, q, k)
            else:
                lengths = torch.tensor([keys.lengths[row] for row in rows])
                hidden = (torch.arange(k) >= lengths[:, None]).view(len(rows), 1, 1, k)
            added = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            added = added.to(queries.device, non_blocking=True).expand(len(rows), heads, q, k)
            if bias is not None:
                own = bias if len(bias) == 1 else bias[rows]
                added = added + own.detach()[:, :, :q, :k]
            self.offsets.append(added.to(dtype).reshape(-1, q, k))


def groups_of(queries: Sequence[int], keys: Sequence[int], filled: float = FILLED) -> list[list[int]]:
    """Row numbers in groups of similar lengths, in each at least the share ``filled`` of the padded rectangle real."""
    order = sorted(range(len(queries)), key=lambda row: (queries[row], keys[row]), reverse=True)
    groups: list[list[int]] = []
    real = longest_query = longest_key = 0
    for row in order:
        area = queries[row] * keys[row]
        wide_query, wide_key = max(longest_query, queries[row]), max(longest_key, keys[row])
        if groups and real + area >= filled * (len(groups[-1]) + 1) * wide_query * wide_key:
            groups[-1].append(row)
            real, longest_query, longest_key = real + area, wide_query, wide_key
        else:
            groups.append([row])
            real, longest_query, longest_key = area, queries[row], keys[row]
    return groups
