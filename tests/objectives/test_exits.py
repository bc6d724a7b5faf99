"""Exits after lower decoder layers, against the model cut there, row by row and token by token in float64."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_distill.errors import UserError
from lit_distill.modules import StepByStepModule
from lit_distill.objectives import MultiExit
from tests.modules.batches import RowsData, collate, random_rows
from tests.modules.running import make_trainer
from tests.students import (
    CAUSAL_WORDS,
    WORDS,
    add_weights,
    make_causal_folder,
    make_causal_tokenizer,
    make_student_folder,
)

ROWS = random_rows(4, seed=71, without_rationale=(2,))
TASKS = ("label", "rationale")
DEPTH = 4
UNKNOWN: Any = "all"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    llama = add_weights(make_causal_folder(folder / "llama", num_hidden_layers=DEPTH), make_causal_tokenizer())
    deep = {"num_layers": DEPTH, "num_decoder_layers": DEPTH}
    tied = make_student_folder(folder / "tied t5", tie_word_embeddings=True, **deep)
    return {"llama": llama, "t5": add_weights(make_student_folder(folder / "t5", **deep)), "tied t5": add_weights(tied)}


def make(folder: Path, objective: MultiExit, **arguments: Any) -> Any:
    torch.manual_seed(7)
    module = StepByStepModule(folder, objectives=[objective], learning_rate=1e-2, **arguments)
    objective.setup(module.student, module.teachers)
    return module


def logits_after(network: Any, layer: int, source: list[int], target: list[int]) -> Tensor:
    """The logits at each target token of the model that has no more layers."""
    stack, name = (network.decoder, "block") if hasattr(network, "decoder") else (network.model, "layers")
    whole = getattr(stack, name)
    setattr(stack, name, nn.ModuleList(list(whole)[:layer]))
    if name == "block":
        logits: Tensor = network(input_ids=torch.tensor([source]), labels=torch.tensor([target])).logits[0]
    else:
        logits = network(input_ids=torch.tensor([source + target])).logits[0, len(source) - 1 : -1]
    setattr(stack, name, whole)
    return logits


def of_token(logits: Tensor, last: Tensor, label: int, learn_from: str) -> Tensor:
    """Minus the log-probability of the label, or the sum over ids of p (log p - log q)."""
    q, p = logits.exp() / logits.exp().sum(), last.exp() / last.exp().sum()
    if learn_from == "labels":
        return -q[label].log()
    return torch.stack([p[i] * (p[i].log() - q[i].log()) for i in range(len(p))]).sum()


@pytest.mark.parametrize("learn_from", ["last", "labels"])
@pytest.mark.parametrize(("family", "fast"), [("t5", True), ("tied t5", True), ("t5", False), ("llama", True)])
def test_value_and_gradient(folders: dict[str, Path], family: str, fast: bool, learn_from: Any) -> None:
    objective = MultiExit(learn_from=learn_from, layers=[3, 1], tasks=["rationale"])
    module = make(folders[family], objective, fast=fast)
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter.normal_(std=0.3)
    network = copy.deepcopy(module.student.network).double().eval()
    batch = collate(ROWS, TASKS, extra=1)
    # the term of the last layer is a small difference, and in float32 some processors round it by more than this allows
    term = objective(module.double().step(batch))
    term.backward()
    total, number = torch.zeros((), dtype=torch.float64), 0
    for row in ROWS:
        for source, target in [row["rationale"]] if "rationale" in row else []:
            last = logits_after(network, DEPTH, source, target).detach()
            for layer in (1, 3):
                logits = logits_after(network, layer, source, target)
                for own, other, label in zip(logits, last, target, strict=True):
                    total = total + layer / DEPTH * of_token(own, other, label, learn_from)
            number += len(target)
    assert objective.counts(batch) == number
    expected = total / number
    expected.backward()
    assert float(term.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for found, wanted in zip(module.student.network.parameters(), network.parameters(), strict=True):
        if wanted.grad is None:
            assert found.grad is None or not found.grad.any(), "the last layer learns nothing here"
        else:
            torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-3, atol=1e-6)


def test_a_batch_without_targets(folders: dict[str, Path]) -> None:
    objective = MultiExit(tasks=["rationale"])
    module = make(folders["t5"], objective)
    assert objective.layers == [1, 2, 3]
    term = objective(module.step(collate(ROWS[2:3], TASKS)))
    term.backward()
    assert float(term.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_accuracy_at_an_exit_is_that_of_the_student_cut_there(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr("tests.modules.batches.WORDS", WORDS if family == "t5" else CAUSAL_WORDS)
    module = make(folders[family], MultiExit(learn_from="labels", layers=[1, 2]), max_label_length=4)
    data = RowsData(ROWS, 4, TASKS)
    make_trainer(max_epochs=30).fit(module, datamodule=data)
    name = "block" if family == "t5" else "layers"

    def stack_of(student: Any) -> Any:
        return student.network.decoder if family == "t5" else student.network.model

    with torch.no_grad():
        for parameter in getattr(stack_of(module.student), name)[1:].parameters():
            parameter.normal_()

    def metrics(tested: Any) -> dict[str, float]:
        make_trainer(limit_test_batches=1.0).test(tested, datamodule=data, verbose=False)
        found: dict[str, float] = tested.evaluation.metrics
        return found

    found = metrics(module)
    accuracies = {name: value for name, value in found.items() if "accuracy" in name}
    names = "accuracy", "accuracy_low", "accuracy_high"
    assert accuracies.keys() == {f"{exit_}{name}" for exit_ in ("", "exit_1_", "exit_2_") for name in names}
    assert found["exit_1_accuracy"] > found["accuracy"], "it has learned, and the further layers have forgotten"
    for layer in (1, 2):
        cut = StepByStepModule(folders[family], max_label_length=4)
        cut.student.load_state_dict(module.student.state_dict())
        setattr(stack_of(cut.student), name, getattr(stack_of(cut.student), name)[:layer])
        assert metrics(cut)["accuracy"] == found[f"exit_{layer}_accuracy"]


def test_evaluation_without_exits(folders: dict[str, Path]) -> None:
    module = make(folders["t5"], MultiExit(evaluate=False))
    make_trainer(limit_val_batches=1.0).validate(module, datamodule=RowsData(ROWS, 4, TASKS), verbose=False)
    assert module.evaluation is not None
    assert not [name for name in module.evaluation.metrics if "exit_" in name]
    assert "exits_loss" in module.evaluation.metrics


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make_objective", "said"),
    [
        (lambda: MultiExit(layers=[4]), r"layers must be an integer in \[1, 3\], got 4"),
        (lambda: MultiExit(layers=[0]), r"layers must be an integer in \[1, 3\], got 0"),
        (lambda: MultiExit(learn_from=UNKNOWN), r"learn_from must be one of last, labels, got 'all'"),
        (lambda: MultiExit(evaluate=UNKNOWN), r"evaluate must be true or false, got 'all'"),
    ],
)
def test_what_is_refused(folders: dict[str, Path], make_objective: Callable[[], MultiExit], said: str) -> None:
    with pytest.raises(UserError, match=f"^objectives: exits: {said}$"):
        make(folders["t5"], make_objective())


def test_students_without_exits(tmp_path: Path) -> None:
    shallow = add_weights(make_student_folder(tmp_path / "shallow", num_decoder_layers=1))
    with pytest.raises(UserError, match=r"^objectives: exits: the student's decoder has one layer, below which"):
        make(shallow, MultiExit())
    changes: Any = {"model_type": "mamba", "state_size": 4, "pad_token_id": 1}
    mamba = make_causal_folder(tmp_path / "mamba", **changes)
    with pytest.raises(UserError, match=r"^student: found no list of layers beside a final norm in a MambaForCausalLM"):
        make(mamba, MultiExit(), from_scratch=True)
