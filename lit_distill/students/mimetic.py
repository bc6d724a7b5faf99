"""Heads of a T5's encoder that look for like words before any training.

From random weights a T5 learns late, or never from few rows, that a word of one sentence is also in the other, and
which of the two it is in. Here the queries and keys of a head are the same matrix (after Trockman and Kolter 2023,
Mimetic Initialization of Self-Attention Layers), so that a word attends to its likes elsewhere, and the first head
looks left and the second right (after Shen et al. 2018, DiSAN).
"""

from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_distill.errors import UserError

FromScratch = bool | Literal["mimetic"]
"""Whether a student begins with random weights, and with which heads."""

LIKE = 3.0
"""The expected attention logit of two equal words."""
OWN = 3.0
"""Taken from the logit of one's own place."""
SIDE = 5.0
"""Taken from the logits of the side that a head does not look to."""


def set_heads(model: PreTrainedModel) -> None:
    """Set queries, keys and position biases of the encoder of a T5 or mT5; errors as in `attentions`."""
    with torch.no_grad():
        for attention in attentions(model):
            size = attention.key_value_proj_dim
            for head in attention.q.weight.split(size):
                # rows at right angles: the inner product of a normalised word with itself is near the head's size
                turned = torch.empty(head.shape, dtype=torch.float32, device=head.device)
                head.copy_(nn.init.orthogonal_(turned, gain=(LIKE / size) ** 0.5))
            attention.k.weight.copy_(attention.q.weight)
            if attention.has_relative_attention_bias:
                bias = attention.relative_attention_bias.weight
                # (bucket, head): one's own place and the left, then the right
                right = len(bias) // 2
                bias[0] -= OWN
                bias[right:, 0] -= SIDE
                bias[1:right, 1:2] -= SIDE


def attentions(model: PreTrainedModel) -> list[Any]:
    """The self-attentions of a T5's encoder.

    Raises:
        UserError: the model has no such encoder.
    """
    encoder: Any = model.get_encoder() if model.config.is_encoder_decoder else None
    found = [block.layer[0].SelfAttention for block in getattr(encoder, "block", [])]
    if not found:
        raise UserError(f"from_scratch: mimetic is for students like T5, not {model.config.model_type}")
    return found
