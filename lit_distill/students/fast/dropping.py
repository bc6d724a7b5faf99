"""Shorter inputs at inference: tokens that receive little attention leave the encoder."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_distill.students.fast.packing import Packing


@dataclass(frozen=True)
class Dropping:
    """Where tokens are dropped, and how many stay."""

    after: int  # layer of the encoder, from 1
    share: float  # of each row's tokens, rounded up


def most_attended(received: Tensor, lengths: Tensor, share: float) -> Tensor:
    r"""Which tokens stay: of each row the share that receives the most attention, ``(rows, source_len)``.

    PoWER-BERT (arXiv 2001.08950) ranks tokens by the attention that they receive, summed over heads and queries:
    :math:`Sig(w) = \sum_h \sum_{w'} A_h[w', w]`. Length-Adaptive Transformer (2010.07003), Dynamic-TinyBERT
    (2111.09645) and QuaLA-MiniLM (2210.17114) train for any length, drop some tokens at each layer before its
    feed-forward network, and keep [CLS]. Here tokens leave after one whole layer, whatever the student was trained for,
    and none is exempt.

    Args:
        received: of each token of padded rows, ``(rows, source_len)``.
        lengths: of the rows, ``(rows,)``.
        share: of a row's tokens, rounded up; of equal ones the first stay.
    """
    # 0.7 of 10 is 7, whatever the product rounds to
    counts = (lengths * share - 1e-6).ceil()
    padding = torch.arange(received.shape[1]) >= lengths[:, None]
    order = received.masked_fill(padding, -1.0).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1) < counts[:, None]


def drop(received: Tensor, packing: Packing, share: float) -> tuple[Tensor, Packing, Tensor]:
    """Drop tokens of packed rows.

    Args:
        received: the attention that each token receives, ``(tokens,)``.
        packing: of the tokens.
        share: see `most_attended`.

    Returns:
        The tokens that stay, ``(kept tokens,)``, their packing, and the position that each had in its row,
        ``(rows, length)`` on the host.
    """
    token, real = packing.padded(max(packing.lengths))
    # an accelerator is waited for once a batch: lengths and positions are settled on the host
    stays = most_attended(received.float().cpu()[token], real.sum(1), share) & real
    kept = Packing(stays.sum(1).tolist(), packing.device)
    # those that stay first, in their order
    positions = stays.int().argsort(dim=1, descending=True, stable=True)[:, : max(kept.lengths)]
    return token[stays].to(packing.device, non_blocking=True), kept, positions
