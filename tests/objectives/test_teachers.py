"""Teachers never change, and are in nothing that is saved, optimised or exchanged."""

import copy
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lit_distill.errors import UserError
from lit_distill.modules import StepByStepModule
from lit_distill.teachers.models import TeacherModel
from tests.modules.batches import RowsData, collate, random_rows
from tests.modules.running import identical, make_trainer
from tests.students import WORDS, add_weights, make_student_folder, make_tokenizer
from tests.variants.kl import KL

ROWS = random_rows(6, seed=51)
TASKS = ("label", "rationale")


def make(student: Path, teacher: Path, **model: Any) -> Any:
    torch.manual_seed(7)
    teachers = {"big": TeacherModel(str(teacher), **model)}
    return StepByStepModule(
        student, from_scratch=True, objectives=[KL(teacher="big")], teachers=teachers, learning_rate=1e-2
    )


class Modes(pl.Callback):
    """What a teacher is like in the midst of training."""

    def __init__(self) -> None:
        self.found: list[bool] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *rest: object) -> None:
        model = pl_module.teachers.loaded("big")[0].model
        self.found += [module.training for module in model.modules()]
        self.found += [parameter.requires_grad or parameter.grad is not None for parameter in model.parameters()]


def test_training_leaves_a_teacher_as_it_is(student_folder: Path, teacher_folder: Path, tmp_path: Path) -> None:
    module, modes = make(student_folder, teacher_folder), Modes()
    trainer = make_trainer(callbacks=[modes], max_epochs=2)
    trainer.fit(module, datamodule=RowsData(ROWS, 2, TASKS))
    assert modes.found
    assert not any(modes.found)
    before = make(student_folder, teacher_folder)
    before.teachers.load(before.student)
    states = [each.teachers.loaded("big")[0].state_dict() for each in (before, module)]
    assert identical(*states)
    assert not [name for name, _ in module.named_parameters() if not name.startswith("student.")]
    trainer.save_checkpoint(tmp_path / "with.ckpt")
    torch.manual_seed(7)
    alone = StepByStepModule(student_folder, from_scratch=True, learning_rate=1e-2)
    plain = make_trainer(max_epochs=2)
    plain.fit(alone, datamodule=RowsData(ROWS, 2, TASKS))
    plain.save_checkpoint(tmp_path / "without.ckpt")
    found, expected = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("with", "without"))
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    assert len(trainer.optimizers[0].state) == len(plain.optimizers[0].state)
    assert found["hyper_parameters"]["teachers"] == {"big": asdict(TeacherModel(str(teacher_folder)))}


def test_it_comes_back_with_a_checkpoint_a_copy_and_a_pickle(
    student_folder: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    module = make(student_folder, teacher_folder)
    trainer = make_trainer()
    trainer.fit(module, datamodule=RowsData(ROWS, 2, TASKS))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    batch = collate(ROWS, TASKS)
    expected = float(module.eval().loss_terms(module.step(batch))["kl"].detach())
    copied = copy.deepcopy(module)
    assert copied.teachers.loaded("big")[0] is module.teachers.loaded("big")[0], "there is one, which nobody changes"
    pickled = pickle.dumps(module.teachers)
    assert len(pickled) < 2000
    copied.teachers = pickle.loads(pickled)  # noqa: S301 - made here
    for other in (StepByStepModule.load_from_checkpoint(tmp_path / "end.ckpt").eval(), copied):
        assert float(other.loss_terms(other.step(batch))["kl"].detach()) == pytest.approx(expected, rel=1e-6)


def test_its_precision_is_its_own(student_folder: Path, teacher_folder: Path) -> None:
    batch = collate(ROWS, TASKS)
    found = {}
    for dtype in ("float32", "bfloat16"):
        module = make(student_folder, teacher_folder, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[dtype] = module.step(batch).teacher("big").logits("label")
        assert found[dtype].dtype == getattr(torch, dtype)
        assert not found[dtype].requires_grad
    expected = make(student_folder, teacher_folder).step(batch).teacher("big").logits("label")
    assert torch.equal(found["float32"], expected), "whatever the student's autocast"
    assert not torch.equal(found["bfloat16"].float(), expected)


def test_the_pass_of_a_step_is_shared(student_folder: Path, teacher_folder: Path) -> None:
    module = make(student_folder, teacher_folder)
    step = module.step(collate(ROWS, TASKS))
    assert step.teacher("big") is step.teacher("big")
    assert step.student is step.student


# ------------------------------------------------------------------------------------------------ bad input


def refused(student: Path, **arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        StepByStepModule(student, from_scratch=True, **arguments)
    return str(error.value)


def test_objectives_that_ask_for_what_is_not_there(student_folder: Path, teacher_folder: Path) -> None:
    teachers = {"big": TeacherModel(str(teacher_folder))}
    assert refused(student_folder, objectives=[KL(teacher="huge")], teachers=teachers) == (
        "objectives: kl: unknown teacher 'huge'; there are big (model.teachers names them)"
    )
    assert refused(student_folder, objectives=[KL(teacher="big")]) == (
        "objectives: kl: unknown teacher 'big'; there is none (model.teachers names them)"
    )
    both = [KL(teacher="big"), KL(teacher="big")]
    assert refused(student_folder, objectives=both, teachers=teachers) == (
        "objectives: kl is the name of two terms; give one of them another name"
    )
    assert "label is the name of two terms" in refused(student_folder, objectives=[KL(name="label")])
    assert refused(student_folder, objectives=[KL(teacher="big", tasks=["lable"])], teachers=teachers) == (
        "objectives: kl: unknown task 'lable'; there are label, rationale"
    )
    with pytest.raises(UserError, match=r"objectives: weight must be at least 0, got -1.0"):
        KL(weight=-1.0)


def test_a_teacher_of_another_vocabulary_is_refused_before_the_first_step(student_folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["more"])
    # room for the token more
    assert len(tokenizer) == len(WORDS) + 1
    folder = add_weights(make_student_folder(tmp_path / "other", vocab_size=len(WORDS) + 8))
    tokenizer.save_pretrained(folder)
    module = make(student_folder, folder)
    with pytest.raises(
        UserError,
        match=r"^teachers: big: .* has another vocabulary \(65 entries\) than the student \(64\): its token 64 is"
        r" 'more', the student's none; distributions can only be compared over the same tokens$",
    ):
        make_trainer().fit(module, datamodule=RowsData(ROWS, 2, TASKS))
    assert module.global_step == 0


def test_the_first_token_that_differs_is_named(student_folder: Path, tmp_path: Path) -> None:
    folder = add_weights(make_student_folder(tmp_path / "other"))
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"cat":', '"cow":').replace('"no":', '"nay":'))
    with pytest.raises(UserError, match=rf"\(64\): its token {WORDS.index('cat')} is 'cow', the student's 'cat'"):
        make_trainer().fit(make(student_folder, folder), datamodule=RowsData(ROWS, 2, TASKS))


@pytest.mark.parametrize(
    ("model", "device", "said"),
    [
        ("no-weights", None, "no weights in the folder "),
        ("teacher", "nonsense", "device: 'nonsense' cannot be used here "),
    ],
)
def test_a_teacher_that_cannot_be_loaded_is_named(
    student_folder: Path, tmp_path: Path, model: str, device: str | None, said: str
) -> None:
    make_student_folder(tmp_path / "no-weights")
    add_weights(make_student_folder(tmp_path / "teacher"))
    module = make(student_folder, tmp_path / model, device=device)
    with pytest.raises(UserError, match=f"^teachers: big: {said}"):
        make_trainer().fit(module, datamodule=RowsData(ROWS, 2, TASKS))
