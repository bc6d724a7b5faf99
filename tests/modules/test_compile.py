"""``compile``: few graphs for many shapes, the plain loss and gradients, and evaluation beside it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

from lit_distill.modules import StepByStepModule
from tests.modules.batches import collate, random_rows
from tests.modules.running import difference, gradients_of

COMPILED: list[Any] = []


def backend(graph: Any, _: Any) -> Any:
    """Runs a graph as it was captured, without minutes of code generation; transformers keeps it in the student."""
    COMPILED.append(graph)
    return graph


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that were compiled."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: original(model, backend=backend, **options))
    torch._dynamo.reset()
    COMPILED.clear()
    return COMPILED


def test_one_graph_serves_all_shapes(student_folder: Path, graphs: list[Any]) -> None:
    torch.manual_seed(3)
    module = StepByStepModule(student_folder, from_scratch=True, compile=True, dropout=0.0)
    plain = StepByStepModule(student_folder, from_scratch=True, fast=False, dropout=0.0)
    plain.load_state_dict(module.state_dict())
    for rows in (5, 3, 8, 2, 6):
        found = []
        for one in (module, plain):
            batch = collate(random_rows(rows, seed=rows), one.tasks)
            loss = one.total_loss(one.loss_terms(one.step(batch)))
            loss.backward()
            found.append((float(loss.detach()), gradients_of(one.student.model)))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
        assert difference(found[0][1], found[1][1]) < 1e-5
    assert len(graphs) == 1


def test_evaluation_is_not_compiled(student_folder: Path, graphs: list[Any]) -> None:
    module = StepByStepModule(student_folder, from_scratch=True, compile=True).eval()
    with torch.no_grad():
        module.loss_terms(module.step(collate(random_rows(3, seed=1), module.tasks)))
    assert graphs == []


def test_a_copy_compiles_its_own_student(student_folder: Path, graphs: list[Any]) -> None:
    module = StepByStepModule(student_folder, from_scratch=True, compile=True, dropout=0.0)
    batch = collate(random_rows(3, seed=1), module.tasks)
    module.loss_terms(module.step(batch))
    names = list(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301 - made here
        assert list(other.state_dict()) == names
        with torch.no_grad():
            other.student.model.lm_head.weight.zero_()
        terms = other.loss_terms(other.step(batch))
        assert float(terms["label"].detach()) == pytest.approx(
            float(torch.tensor(module.student.model.config.vocab_size).log())
        )
