import math

import pytest
import torch

from lit_distill.losses import sequence_log_likelihood, token_cross_entropy


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> list[list[float]]:
    """Minus log-softmax of each target that counts, position by position in Python floats."""
    rows = []
    for row_logits, row_labels in zip(logits.tolist(), labels.tolist(), strict=True):
        losses = []
        for scores, label in zip(row_logits, row_labels, strict=True):
            if label != -100:
                losses.append(math.log(sum(math.exp(score) for score in scores)) - scores[label])
        rows.append(losses)
    return rows


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 4, 7, generator=generator)
    labels = torch.tensor([[1, 2, -100, -100], [0, 6, 3, 5], [-100, -100, -100, -100]])
    return logits, labels


def test_the_loss_is_the_mean_over_tokens_not_over_rows() -> None:
    logits, labels = example()
    losses = by_hand(logits, labels)
    flat = [loss for row in losses for loss in row]
    assert len(flat) == 6
    assert float(token_cross_entropy(logits, labels)) == pytest.approx(sum(flat) / 6, rel=1e-6)
    of_rows = [sum(row) / len(row) for row in losses if row]
    assert float(token_cross_entropy(logits, labels)) != pytest.approx(sum(of_rows) / 2, rel=1e-3)


def test_two_equal_logits_cost_ln_2() -> None:
    assert float(token_cross_entropy(torch.zeros(1, 1, 2), torch.tensor([[1]]))) == pytest.approx(0.6931472)


@pytest.mark.parametrize("shape", [(2, 3), (0, 1), (1, 1)])
def test_without_targets_loss_and_gradient_are_0(shape: tuple[int, int]) -> None:
    logits = torch.randn(*shape, 7, requires_grad=True)
    loss = token_cross_entropy(logits, torch.full(shape, -100))
    assert loss.item() == 0.0
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_half_precision_logits_are_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    # many tokens: a bfloat16 sum of so many would be off by per cents
    logits = torch.randn(4, 700, 11, generator=generator).bfloat16()
    labels = torch.randint(0, 11, (4, 700), generator=generator)
    loss = token_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    flat = [value for row in by_hand(logits, labels) for value in row]
    assert float(loss) == pytest.approx(sum(flat) / len(flat), rel=1e-5)


def test_gradient_is_softmax_minus_one_hot_over_the_tokens() -> None:
    logits, labels = example()
    logits.requires_grad_()
    token_cross_entropy(logits, labels).backward()
    expected = torch.zeros_like(logits)
    for row in range(3):
        for position in range(4):
            label = int(labels[row, position])
            if label != -100:
                expected[row, position] = logits[row, position].detach().exp() / logits[row, position].exp().sum()
                expected[row, position, label] -= 1
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected.detach() / 6)


def test_log_likelihoods_are_sums_a_row() -> None:
    logits, labels = example()
    expected = [-sum(row) for row in by_hand(logits, labels)]
    found = sequence_log_likelihood(logits, labels).tolist()
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[2] == 0


def test_log_likelihoods_of_half_precision_logits() -> None:
    logits, labels = example()
    found = sequence_log_likelihood(logits.bfloat16(), labels)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([-sum(row) for row in by_hand(logits.bfloat16(), labels)], rel=1e-5)
