"""Attention scores of both models, against loops over pairs of tokens and heads in float64."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_distill.batch import IGNORE_INDEX, TaskBatch
from lit_distill.errors import UserError
from lit_distill.modules import StepByStepModule
from lit_distill.objectives import AttentionScores, HiddenStates, MutualInformation, Objective
from tests.modules.batches import Row, RowsData, collate, random_rows
from tests.modules.running import difference, gradients_of, make_trainer
from tests.students import add_weights, make_causal_folder, make_causal_tokenizer, make_student_folder, make_tokenizer
from tests.students.test_attention import llama_scores, t5_scores

ROWS = random_rows(5, seed=31, without_rationale=(2,))
TASKS = ("label", "rationale")
PAIRS: dict[str, list[Any]] = {"t5": ["encoder", "decoder", "cross"], "llama": ["decoder"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A student and a wider teacher of four layers, twice as many, of each family."""
    root = tmp_path_factory.mktemp("models")
    t5 = (
        make_student_folder(root / "t5"),
        make_student_folder(root / "t5-teacher", d_model=24, num_layers=4, num_decoder_layers=4),
    )
    llama = (
        make_causal_folder(root / "llama"),
        make_causal_folder(root / "llama-teacher", hidden_size=24, num_hidden_layers=4),
    )
    for folder in t5:
        add_weights(folder)
    for folder in llama:
        add_weights(folder, make_causal_tokenizer())
    return {"t5": t5, "llama": llama}


def make(student: Path, teacher: Path, **arguments: Any) -> Any:
    torch.manual_seed(7)
    objective = AttentionScores(teacher="big", **arguments)
    module = StepByStepModule(student, objectives=[objective], teachers={"big": {"model": str(teacher)}})
    with torch.no_grad():
        for parameter in module.student.model.parameters():
            parameter.normal_(std=0.3)
    module.teachers.load(module.student)
    objective.setup(module.student, module.teachers)
    return module


def term(module: Any, batch: TaskBatch) -> Tensor:
    found: Tensor = module.objectives[0](module.step(batch))
    return found


def scores(family: str, student: Any, source: list[int], target: list[int], layer: int, kind: Any) -> Tensor:
    if family == "t5":
        return t5_scores(student, source, target, layer - 1, kind)
    return llama_scores(student, source, target, layer - 1)


def by_hand(
    family: str, ours: Any, theirs: Any, rows: list[Row], layers: list[tuple[int, int]], *, per_head: bool = True
) -> Tensor:
    """The mean over texts of the sum over layers and kinds of the mean over heads and pairs, in float64."""
    texts = []
    for row in rows:
        for source, target in row.values():
            total = torch.zeros((), dtype=torch.float64)
            for own, other in layers:
                for kind in PAIRS[family]:
                    student = scores(family, ours, source, target, own, kind)
                    teacher = scores(family, theirs, source, target, other, kind)
                    if not per_head:
                        student, teacher = student.mean(0, keepdim=True), teacher.mean(0, keepdim=True)
                    number, queries, keys = student.shape
                    squares = [
                        (student[h, i, j] - teacher[h, i, j]) ** 2
                        for h in range(number)
                        for i in range(queries)
                        for j in range(keys)
                        if kind != "decoder" or j <= i
                    ]
                    total = total + sum(squares, torch.zeros(())) / len(squares)
            texts.append(total)
    return sum(texts, torch.zeros(())) / len(texts)


@pytest.mark.parametrize(
    ("family", "arguments", "layers"),
    [
        ("t5", {}, [(1, 2), (2, 4)]),
        ("llama", {}, [(1, 2), (2, 4)]),
        ("llama", {"layers": [(-1, 1)], "per_head": False}, [(2, 1)]),
    ],
)
def test_value_and_gradient(
    folders: dict[str, tuple[Path, Path]], family: str, arguments: dict[str, Any], layers: list[tuple[int, int]]
) -> None:
    module = make(*folders[family], **arguments)
    rows = ROWS[:3]
    found = term(module, collate(rows, TASKS, extra=2))
    found.backward()
    gradients = gradients_of(module.student.model)
    module.zero_grad()
    ours, [teacher] = module.student, module.teachers.loaded("big")
    theirs = copy.deepcopy(teacher).double()
    ours.double()
    expected = by_hand(family, ours, theirs, rows, layers, per_head=arguments.get("per_head", True))
    expected.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert difference(gradients, gradients_of(ours.model)) < 1e-5
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("family", PAIRS)
def test_micro_batches_add_up(folders: dict[str, tuple[Path, Path]], family: str) -> None:
    module = make(*folders[family])
    objective = module.objectives[0]
    whole = collate(ROWS, TASKS)
    assert objective.counts(whole) == 9
    expected = term(module, whole)
    expected.backward()
    gradients = gradients_of(module.student.model)
    module.zero_grad()
    parts = [collate(ROWS[start:stop], TASKS, extra=start) for start, stop in ((0, 1), (1, 2), (2, 3), (3, 5))]
    # with the row without a rationale alone
    assert len(parts[2]["rationale"]["labels"]) == 0
    found = sum(term(module, part) * objective.counts(part) / 9 for part in parts)
    assert isinstance(found, Tensor)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert difference(gradients_of(module.student.model), gradients) < 1e-5


@pytest.mark.parametrize("family", PAIRS)
def test_rows_without_a_target_do_not_count(folders: dict[str, tuple[Path, Path]], family: str) -> None:
    """As in evaluation, where a task has every row."""
    module = make(*folders[family])
    expected = term(module, collate(ROWS, TASKS))
    rows = [row | {"rationale": row.get("rationale", (row["label"][0], [IGNORE_INDEX]))} for row in ROWS]
    assert float(term(module, collate(rows, TASKS)).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("family", PAIRS)
def test_a_student_that_is_its_teacher(folders: dict[str, tuple[Path, Path]], family: str) -> None:
    module = make(folders[family][1], folders[family][1])
    [teacher] = module.teachers.loaded("big")
    module.student.model.load_state_dict(teacher.model.state_dict())
    # in float32 the two round differently on some processors
    teacher.model.double()
    found = term(module.double().eval(), collate(ROWS, TASKS))
    found.backward()
    assert float(found.detach()) < 1e-10
    assert max(float(gradient.abs().max()) for gradient in gradients_of(module.student.model).values()) < 1e-6


def test_it_trains_a_student_towards_its_teacher(folders: dict[str, tuple[Path, Path]]) -> None:
    student, teacher = folders["t5"]
    module = StepByStepModule(
        student,
        objectives=[AttentionScores(kinds=["cross"])],
        teachers={"big": {"model": str(teacher), "dtype": "bfloat16"}},
        learning_rate=1e-2,
    )
    batch = collate(ROWS, TASKS)
    trainer = make_trainer(max_epochs=8)
    trainer.fit(module, datamodule=RowsData(ROWS, 5, TASKS))
    after = float(term(module.eval(), batch).detach())
    before = StepByStepModule(student, objectives=[AttentionScores(kinds=["cross"])], teachers=module.teachers.plain())
    make_trainer().fit(before, datamodule=RowsData(ROWS, 5, TASKS))
    assert after < float(term(before.eval(), batch).detach())


# ------------------------------------------------------------------------------------------------ bad input


def refused(student: Path, teacher: Path, **arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        make(student, teacher, **arguments)
    return str(error.value)


def test_models_that_do_not_fit(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    t5, llama = folders["t5"], folders["llama"]
    assert refused(*t5, layers=[(3, 3)]) == (
        "objectives: attention: layers: the student has no layer 3; there are 1 to 2"
    )
    assert refused(*t5, layers=[(0, 0)]).endswith("the student has no layer 0; there are 1 to 2")
    assert refused(*llama, kinds=["cross"]) == "objectives: attention: kinds must be one of decoder, got 'cross'"
    more = add_weights(make_student_folder(tmp_path / "more", num_heads=4))
    assert refused(t5[0], more) == (
        "objectives: attention: the student's attention has 2 heads, the teacher's 4;"
        " per_head: false matches the mean over heads"
    )
    make(t5[0], more, per_head=False)
    other = add_weights(make_causal_folder(tmp_path / "other", vocab_size=64), make_tokenizer())
    for models in ((t5[0], other), (other, t5[1])):
        assert refused(*models) == (
            "objectives: attention: of the student and teacher 'big' one has an encoder, the other none, so that they"
            " attend to different tokens; take a teacher of the student's family"
        )
    mamba = make_causal_folder(tmp_path / "mamba", model_type="mamba", state_size=4, pad_token_id=1)
    add_weights(mamba, make_causal_tokenizer())
    assert refused(llama[0], mamba).startswith("objectives: attention: no attention scores: a Mamba")


@pytest.mark.parametrize("objective", [AttentionScores(), MutualInformation(), HiddenStates()])
def test_a_teacher_of_several_models(folders: dict[str, tuple[Path, Path]], objective: Objective) -> None:
    student, teacher = folders["t5"]
    models = {"crowd": {"model": [str(student), str(teacher)]}}
    module = StepByStepModule(student, objectives=[objective], teachers=models)
    with pytest.raises(UserError) as error:
        make_trainer().fit(module, datamodule=RowsData(ROWS, 2, TASKS))
    assert str(error.value) == (
        f"objectives: {objective.name}: teacher 'crowd' is an ensemble, which has no hidden states; name one model"
    )
