"""Bytes counted of tensors without storage, against numbers by hand."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from lit_distill.planning.tracker import Tracker

FLOAT = 4


def empty(*sizes: int) -> nn.Sequential:
    with torch.device("meta"):
        layers = [nn.Linear(inner, outer, bias=False) for inner, outer in pairwise(sizes)]
        return nn.Sequential(*layers)


def tracked(model: nn.Module) -> Tracker:
    tracker = Tracker(vocabulary=50)
    tracker.give(model, "weights")
    return tracker


def test_weights_and_activations() -> None:
    tracker = tracked(model := empty(8, 16, 4))
    with tracker:
        out = model(torch.randn(10, 8))
    assert tracker.living("weights") == FLOAT * (8 * 16 + 16 * 4)
    assert tracker.living("activations") == FLOAT * 10 * (8 + 16 + 4)
    del out
    assert tracker.living("activations") == 0
    assert tracker.peaks["pass"] == {"weights": FLOAT * 192, "activations": FLOAT * 280}


def test_gradients_and_operations() -> None:
    tracker = tracked(model := empty(8, 16, 4))
    with tracker:
        model(torch.randn(10, 8)).sum().backward()
        tracker.hold([parameter.grad for parameter in model.parameters() if parameter.grad is not None], "gradients")
    assert tracker.living("gradients") == FLOAT * 192
    assert tracker.living("activations") == tracker.living("temporary") == 0
    # two products forward; backward two of weights, and one of the inner activations
    assert tracker.flops == 2 * 10 * (2 * (8 * 16 + 16 * 4) + 16 * 4)


def test_logits_are_as_wide_as_the_vocabulary() -> None:
    tracker = tracked(model := empty(8, 50))
    with tracker:
        logits = model(torch.randn(3, 8))
    assert tracker.living("logits") == FLOAT * 3 * 50
    del logits


def test_activations_of_a_teacher() -> None:
    teacher, tracker = empty(8, 16), Tracker(vocabulary=50)
    tracker.give(teacher, "teacher")
    with tracker, torch.no_grad():
        found = teacher(F.embedding(torch.arange(5), teacher.get_parameter("0.weight")))
    # the embeddings of five tokens went with what they entered
    assert tracker.living("teacher") == FLOAT * (8 * 16 + 5 * 16)
    assert tracker.peaks["pass"]["teacher"] == FLOAT * (8 * 16 + 5 * 8 + 5 * 16)
    del found


def test_tied_weights_count_once() -> None:
    model = empty(8, 8, 8)
    model[1].weight = model[0].weight
    assert tracked(model).living("weights") == FLOAT * 64
    assert model[1].weight is model[0].weight


def test_a_checkpoint_keeps_its_input_alone() -> None:
    tracker = tracked(model := empty(8, 64, 64, 8))
    with tracker:
        out = checkpoint(model, torch.randn(10, 8).requires_grad_(), use_reentrant=False)
    assert tracker.living("activations") == FLOAT * 10 * (8 + 8)
    assert tracker.peaks["pass"]["activations"] >= FLOAT * 10 * (8 + 64 + 64)
    del out


def test_copies_of_autocast() -> None:
    tracker = tracked(model := empty(8, 16))
    with tracker, torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(10, 8))
        assert tracker.living("weights") == (4 + 2) * 8 * 16
    assert out.dtype == torch.bfloat16
    assert tracker.peaks["pass"]["weights"] == (4 + 2) * 8 * 16


def test_what_integers_settle_is_computed() -> None:
    tracker = tracked(model := empty(8, 4))
    ids = torch.tensor([[1, 2, 0], [3, 0, 0]])
    with tracker:
        states = model(torch.randn(2, 3, 8))
        assert ids.ne(0).sum(dim=1).tolist() == [2, 1]
        assert states[ids != 0].shape == (3, 4)
        states = states.clone()
        states[ids == 0] = 0.0
        assert float(states.sum().detach()) == 0
        assert not bool(states.isnan().any())


def test_random_numbers_are_not_drawn() -> None:
    tracker = Tracker(vocabulary=50)
    with tracker:
        draws = torch.empty(2**30, dtype=torch.int64).random_()
        assert isinstance(draws, FakeTensor)
        mask: Tensor | None = draws.view(torch.int16) >= 0
    assert tracker.living("activations") == 8 * 2**30 + 4 * 2**30
    del draws
    mask = None
    assert mask is None
    assert tracker.living("activations") == 0


def test_states_of_the_optimizer() -> None:
    tracker = tracked(model := empty(8, 16))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with tracker:
        model(torch.randn(10, 8)).sum().backward()
        tracker.phase = "update"
        optimizer.step()
        tracker.hold([value for state in optimizer.state.values() for value in state.values()], "optimizer")
    # two moments, and the number of steps
    assert tracker.living("optimizer") == FLOAT * (2 * 8 * 16 + 1)
