"""Loss terms as pure functions of tensors."""

import torch.nn.functional as F
from torch import Tensor

from lit_distill.batch import IGNORE_INDEX


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross-entropy averaged over the target tokens that count: the paper's CE of Eq. 3 and 4.

    .. math:: L = -\frac{1}{N} \sum_{i,t:\, y_{it} \ne \text{ignore}} \log p(y_{it} \mid y_{i,<t}, x_i)

    with N the number of target positions that are not ``IGNORE_INDEX``. Without any such position the loss is 0 (and
    its gradient too), not NaN. It is computed in float32 whatever the precision of the logits.

    Args:
        logits: ``(batch, target_len, vocabulary)``.
        labels: ``(batch, target_len)``, ``IGNORE_INDEX`` where a position does not count.

    Returns:
        Scalar.
    """
    total = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def sequence_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Log-likelihood of each whole target, :math:`\sum_t \log p(y_t \mid y_{<t}, x)`.

    Args:
        logits: ``(batch, target_len, vocabulary)``.
        labels: ``(batch, target_len)``, ``IGNORE_INDEX`` where a position does not count.

    Returns:
        ``(batch,)``, in nats.
    """
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")
    return -losses.sum(dim=1)
