"""Weights of loss terms that are trained with the student."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

WeightingName = Literal["fixed", "uncertainty"]

LEARNING_RATE = 0.01
"""Peak learning rate of log-variances: at a student's 5e-5, AdamW would move them by 0.25 in 10,000 steps."""


class UncertaintyWeighting(nn.Module):
    r"""Each term :math:`L_i` with fixed weight :math:`w_i` counts as :math:`w_i (e^{-s_i} L_i + s_i / 2)`.

    Kendall, Gal and Cipolla (arXiv 1705.07115) Eq. 10 for a classification, :math:`L / \sigma^2 + \log \sigma`, with
    the log-variance :math:`s = \log \sigma^2` as the trained parameter, 0 at first. The authors' example has
    :math:`e^{-s} L + s` and LibMTL :math:`(e^{-s} L + s) / 2`, which are multiples of Eq. 7 for a regression. Of all
    three the smallest value is where the weight is inverse to the loss, here :math:`e^{-s} = 1 / (2 L)`.

    The paper has no :math:`w_i`. As a factor of the loss alone it would be trained away; so it says how much a term's
    share counts, and 0 still leaves the term out. Terms below 0 would let s fall without end.
    """

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(terms))

    def weights(self, fixed: Mapping[str, float]) -> dict[str, Tensor]:
        """The factor of each term, given the fixed weights of all."""
        factors = (-self.log_variances).exp()
        return {name: weight * factor for (name, weight), factor in zip(fixed.items(), factors, strict=True)}

    def penalty(self, fixed: Mapping[str, float], present: Mapping[str, Tensor]) -> Tensor:
        """The sum of :math:`w_i s_i / 2`, without the terms that ``present`` says an optimizer step lacks."""
        parts = zip(fixed.items(), self.log_variances, strict=True)
        return torch.stack([weight * s / 2 * present.get(name, 1.0) for (name, weight), s in parts]).sum()
