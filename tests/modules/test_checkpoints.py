"""A checkpoint is all that a student needs, and a module's arguments come back as they were."""

import json
import shutil
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lit_distill.errors import UserError
from lit_distill.modules import DistillModule, SingleTaskModule, StandardModule, StepByStepModule
from lit_distill.objectives import HiddenStates, Objective, PredictionHeads, Step, build_objective
from lit_distill.students import load_model, load_tokenizer
from lit_distill.students.models import is_tied, save_model
from lit_distill.tasks import LABEL, RATIONALE_LABEL, Task
from lit_distill.teachers.models import TeacherModel
from tests.modules.batches import RowsData, collate, random_rows
from tests.modules.running import identical, make_trainer
from tests.students import make_student_folder

ROWS = random_rows(6, seed=51)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something asks the network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def logits(module: DistillModule) -> Tensor:
    module.eval()
    with torch.no_grad():
        return module.step(collate(ROWS, ("label",))).student.logits("label")


def trained(folder: Path, path: Path, kind: type[DistillModule] = StepByStepModule, **arguments: Any) -> Any:
    module = kind(folder, **({"from_scratch": True, "learning_rate": 1e-2} | arguments))
    trainer = make_trainer()
    trainer.fit(module, datamodule=RowsData(ROWS, 2, module.tasks))
    trainer.save_checkpoint(path)
    return module


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_needs_neither_hub_nor_folder(tmp_path: Path, tied: bool) -> None:
    folder = make_student_folder(tmp_path / "student", tie_word_embeddings=tied)
    path = tmp_path / "end.ckpt"
    module = trained(folder, path, rationale_weight=0.4)
    shutil.rmtree(folder)
    loaded = StepByStepModule.load_from_checkpoint(path)
    assert is_tied(loaded.student.model) is tied
    assert torch.equal(logits(loaded), logits(module))
    loaded.student.model.tie_weights()
    assert torch.equal(logits(loaded), logits(module))
    assert loaded.tokenizer("predict: cat")["input_ids"] == [3, 17, 1]
    assert loaded.tasks["rationale"].weight == 0.4
    assert dict(loaded.hparams) == dict(module.hparams)
    assert dict(loaded.hparams_initial) == {name: value for name, value in module.hparams.items() if name != "tasks"}
    assert loaded.hparams["student"] == str(folder)
    assert loaded.hparams["from_scratch"] is True


@pytest.mark.usefixtures("offline")
def test_a_loaded_checkpoint_saves_one_that_loads(tmp_path: Path) -> None:
    folder = make_student_folder(tmp_path / "student")
    trained(folder, tmp_path / "first.ckpt")
    shutil.rmtree(folder)
    loaded = StepByStepModule.load_from_checkpoint(tmp_path / "first.ckpt")
    trainer = make_trainer()
    trainer.fit(loaded, datamodule=RowsData(ROWS, 2, loaded.tasks))
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    (tmp_path / "first.ckpt").unlink()
    again = StepByStepModule.load_from_checkpoint(tmp_path / "second.ckpt")
    assert torch.equal(logits(again), logits(loaded))
    assert again.hparams["student"] == str(folder)


def test_a_checkpoint_of_an_untied_student_loads_into_a_new_module(student_folder: Path, tmp_path: Path) -> None:
    module = trained(student_folder, tmp_path / "end.ckpt")
    fresh = StepByStepModule(student_folder, from_scratch=True)
    assert not torch.equal(logits(fresh), logits(module))
    fresh.load_state_dict(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"])
    assert not is_tied(fresh.student.model)
    assert torch.equal(logits(fresh), logits(module))


@pytest.mark.usefixtures("offline")
def test_a_checkpoint_as_a_student(student_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "end.ckpt"
    module = trained(student_folder, path)
    other = StandardModule(path, dropout=0.2)
    assert torch.equal(logits(other), logits(module))
    assert {m.p for m in other.student.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.2}
    assert load_tokenizer(path)("cat")["input_ids"] == [17, 1]
    assert torch.equal(load_model(path).lm_head.weight, module.student.model.lm_head.weight)
    scratch = StandardModule(path, from_scratch=True)
    assert not torch.equal(logits(scratch), logits(module))


@pytest.mark.parametrize("tied", [False, True])
def test_pretrained_weights(tmp_path: Path, tied: bool) -> None:
    folder = make_student_folder(tmp_path / "student", tie_word_embeddings=tied, dropout_rate=0.1)
    module = StepByStepModule(folder, from_scratch=True)
    save_model(module.student.model, module.tokenizer, folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied
    loaded = trained(folder, tmp_path / "end.ckpt", from_scratch=False)
    assert loaded.student.model.training, "its dropout is on"
    shutil.rmtree(folder)
    again = StepByStepModule.load_from_checkpoint(tmp_path / "end.ckpt")
    assert is_tied(again.student.model) is tied
    assert again.hparams["from_scratch"] is False
    assert torch.equal(logits(again), logits(loaded))


def test_arguments_can_be_replaced(student_folder: Path, tmp_path: Path) -> None:
    trained(student_folder, tmp_path / "end.ckpt")
    loaded = StepByStepModule.load_from_checkpoint(tmp_path / "end.ckpt", rationale_weight=2.0, num_beams=3)
    assert loaded.tasks["rationale"].weight == loaded.hparams["rationale_weight"] == 2.0
    assert loaded.hparams["num_beams"] == 3


class Sharpened(StepByStepModule):
    """A variant with an argument of its own, in a module of its own."""

    def __init__(self, student: str | Path, *, sharpness: float = 2.0, **kwargs: Any) -> None:
        super().__init__(student, **kwargs)
        self.sharpness = sharpness

    def loss_terms(self, step: Step) -> dict[str, Tensor]:
        terms = super().loss_terms(step)
        return terms | {"sharp": self.sharpness * terms["label"]}


def test_a_users_subclass_comes_back(student_folder: Path, tmp_path: Path) -> None:
    module = trained(student_folder, tmp_path / "end.ckpt", Sharpened, sharpness=5.0, rationale_weight=0.2)
    assert module.hparams["sharpness"] == 5.0
    assert module.hparams["rationale_weight"] == 0.2
    assert "kwargs" not in module.hparams
    loaded = Sharpened.load_from_checkpoint(tmp_path / "end.ckpt")
    assert (loaded.sharpness, loaded.tasks["rationale"].weight) == (5.0, 0.2)
    assert dict(loaded.hparams) == dict(module.hparams)
    assert identical(loaded.state_dict(), module.state_dict())
    assert list(loaded.loss_terms(loaded.step(collate(ROWS, loaded.tasks)))) == ["label", "rationale", "sharp"]


# ------------------------------------------------------------------------------------------------ tasks and prefixes


class OtherPrefix(StepByStepModule):
    def __init__(self, student: str | Path, *, label_prefix: str = "[label] ", **kwargs: Any) -> None:
        super().__init__(student, label_prefix=label_prefix, **kwargs)


class ThreeTasks(StepByStepModule):
    @classmethod
    def make_tasks(cls, init_args: Mapping[str, Any]) -> dict[str, Task]:
        return {**super().make_tasks(init_args), "both": replace(RATIONALE_LABEL, prefix="both: ")}


class LabelFirst(SingleTaskModule):
    def __init__(
        self,
        student: str | Path,
        *,
        order: Literal["rationale_first", "label_first"] = "label_first",
        input_prefix: str = "answer: ",
        **kwargs: Any,
    ) -> None:
        super().__init__(student, order=order, input_prefix=input_prefix, **kwargs)


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        (DistillModule, {}, {"label": ""}),
        (StandardModule, {}, {"label": ""}),
        (StandardModule, {"label_prefix": "answer: "}, {"label": "answer: "}),
        (StepByStepModule, {}, {"label": "predict: ", "rationale": "explain: "}),
        (StepByStepModule, {"rationale_prefix": "why: "}, {"label": "predict: ", "rationale": "why: "}),
        (StepByStepModule, {"label_prefix": ""}, {"label": "", "rationale": "explain: "}),
        (SingleTaskModule, {}, {"rationale_label": ""}),
        (SingleTaskModule, {"order": "rationale_first", "input_prefix": "x "}, {"rationale_label": "x "}),
        (SingleTaskModule, {"order": "label_first"}, {"label_rationale": ""}),
        (Sharpened, {"sharpness": 1.0}, {"label": "predict: ", "rationale": "explain: "}),
        (OtherPrefix, {}, {"label": "[label] ", "rationale": "explain: "}),
        (ThreeTasks, {}, {"label": "predict: ", "rationale": "explain: ", "both": "both: "}),
        (LabelFirst, {}, {"label_rationale": "answer: "}),
        (LabelFirst, {"order": "rationale_first", "input_prefix": ""}, {"rationale_label": ""}),
    ],
)
def test_tasks_of_a_class_are_those_of_its_modules(
    student_folder: Path, kind: type[DistillModule], arguments: Mapping[str, Any], expected: dict[str, str]
) -> None:
    assert {name: task.prefix for name, task in kind.all_tasks(arguments).items()} == expected
    module = kind(student_folder, from_scratch=True, **arguments)
    assert module.tasks == kind.all_tasks(arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "answer", "rationale"),
    [
        (StandardModule, {}, "label", None),
        (StepByStepModule, {}, "label", "rationale"),
        (SingleTaskModule, {}, "rationale_label", "rationale_label"),
        (SingleTaskModule, {"order": "label_first"}, "label_rationale", "label_rationale"),
    ],
)
def test_where_the_answers_stand(
    student_folder: Path, kind: type[DistillModule], arguments: dict[str, Any], answer: str, rationale: str | None
) -> None:
    module = kind(student_folder, from_scratch=True, max_label_length=5, max_rationale_length=70, **arguments)
    assert (module.answer_task, module.rationale_task) == (answer, rationale)
    length = 5 if answer == "label" else 75
    assert module.generation_settings(answer) == {"max_new_tokens": length, "num_beams": 1}


def test_unknown_order(student_folder: Path) -> None:
    order: Any = "sideways"
    with pytest.raises(UserError, match=r"^order must be one of rationale_first, label_first, got 'sideways'$"):
        SingleTaskModule(student_folder, order=order, from_scratch=True)


def test_a_data_module_that_builds_other_tasks(student_folder: Path) -> None:
    module = StepByStepModule(student_folder, from_scratch=True)
    data = RowsData(ROWS, 2, module.tasks)
    data.tasks = {"label": LABEL}  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"^tasks: StepByStepModule trains on .*the data module builds"):
        make_trainer().fit(module, datamodule=data)


@pytest.mark.parametrize("wanted", [None, 6, 7])
def test_effective_batch_is_compared(
    student_folder: Path, wanted: int | None, recwarn: pytest.WarningsRecorder
) -> None:
    module = StepByStepModule(student_folder, from_scratch=True, effective_batch_size=wanted)
    trainer = make_trainer(accumulate_grad_batches=3)
    data = RowsData(ROWS, 2, module.tasks)
    if wanted == 7:
        with pytest.warns(UserWarning, match=r"effective batch is 6 examples .* written for 7"):
            trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, datamodule=data)


def test_a_checkpoint_of_other_prefixes_is_refused(student_folder: Path, tmp_path: Path) -> None:
    module = StepByStepModule(student_folder, from_scratch=True)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 0}
    module.on_save_checkpoint(checkpoint)
    StepByStepModule(student_folder, from_scratch=True).on_load_checkpoint(checkpoint)
    for other in (
        StandardModule(student_folder, from_scratch=True),
        StepByStepModule(student_folder, from_scratch=True, label_prefix="say: "),
    ):
        with pytest.raises(UserError, match="ckpt_path: the checkpoint was trained with tasks"):
            other.on_load_checkpoint(checkpoint)


def test_a_checkpoint_is_evaluated_without_its_objectives(
    student_folder: Path, weights_folder: Path, tmp_path: Path
) -> None:
    path, teachers = tmp_path / "end.ckpt", {"big": TeacherModel(str(weights_folder))}
    module = trained(student_folder, path, objectives=[HiddenStates()], teachers=teachers)
    data = RowsData(ROWS, 2, module.tasks)
    alone = StepByStepModule(student_folder, from_scratch=True)
    make_trainer(limit_val_batches=1).validate(alone, data, ckpt_path=path, weights_only=True, verbose=False)
    assert torch.equal(logits(alone), logits(module))
    again = StepByStepModule.load_from_checkpoint(path)
    assert torch.equal(again.state_dict()["objectives.0.maps"], module.state_dict()["objectives.0.maps"])
    told = (
        r"^ckpt_path: its objectives, teachers or weighting are others: it has objectives.0.maps, which these have not"
    )
    with pytest.raises(UserError, match=told):
        make_trainer(max_epochs=2).fit(alone, data, ckpt_path=path, weights_only=True)
    other = StepByStepModule(student_folder, from_scratch=True, objectives=[PredictionHeads()], teachers=teachers)
    with pytest.raises(UserError, match=r"it has no objectives.0.inner.bias, which these have; "):
        make_trainer().validate(other, data, ckpt_path=path, weights_only=True, verbose=False)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = make_student_folder(tmp_path / "small", vocab_size=10)
    with pytest.raises(UserError, match="vocab_size is 10"):
        StandardModule(folder, from_scratch=True)


class Placed(StepByStepModule):
    """A method with a path among its arguments."""

    def __init__(self, student: str, *, where: object, **kwargs: Any) -> None:
        super().__init__(student, **kwargs)


class PlacedObjective(Objective):
    """An objective with one."""

    def __init__(self, *, where: object, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def forward(self, step: Step) -> Tensor:
        return step.student.loss("label")


@pytest.mark.parametrize("owner", ["where", "objectives"])
def test_settings_that_no_checkpoint_can_hold(student_folder: Path, tmp_path: Path, owner: str) -> None:
    def fit(where: object) -> None:
        arguments: dict[str, Any] = {"from_scratch": True}
        if owner == "where":
            module: DistillModule = Placed(str(student_folder), where=where, **arguments)
        else:
            module = StepByStepModule(student_folder, objectives=[PlacedObjective(where=where)], **arguments)
        trainer = make_trainer(enable_checkpointing=True, default_root_dir=tmp_path)
        trainer.fit(module, datamodule=RowsData(ROWS, 2, module.tasks))

    with pytest.raises(UserError, match=f"^{owner}: a checkpoint cannot hold it .*PosixPath .*; use numbers, texts"):
        fit(tmp_path)
    fit({"at": [str(tmp_path), None, (1, 2.5)]})


def test_an_objective_in_a_checkpoint_is_one() -> None:
    with pytest.raises(UserError, match=r"^objectives: os\.system is no Objective$"):
        build_objective({"class_path": "os.system", "init_args": {"command": "exit 1"}})
