"""What the tests of the fast path share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Numbers that a test draws without a seed of its own are the same in each run."""
    torch.manual_seed(20)
