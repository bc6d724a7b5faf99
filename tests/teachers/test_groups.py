"""Teachers of several models: ensembles and sequences."""

import copy
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lit_distill.errors import UserError
from lit_distill.evaluation.answers import AnswerKey, Split
from lit_distill.modules import DistillModule, StepByStepModule
from lit_distill.objectives import ForwardKL, divergence
from lit_distill.students.base import Pass
from lit_distill.teachers.frozen import FrozenModel
from lit_distill.teachers.models import Progress, Teachers
from lit_distill.teachers.similarity import linear_cka
from tests.modules.batches import RowsData, collate, random_rows
from tests.modules.running import identical, make_trainer
from tests.modules.test_resume import Shuffled, StopAt, Stopped
from tests.students import WORDS, add_weights, make_student_folder, make_tokenizer

ROWS = random_rows(8, seed=61)
TASKS = ("label", "rationale")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three models of different widths and weights, the second with a padded head."""
    folder = tmp_path_factory.mktemp("several")
    sizes: list[dict[str, int]] = [{"d_model": 16}, {"d_model": 24, "vocab_size": 72}, {"d_model": 24, "num_layers": 3}]
    return [str(add_weights(make_student_folder(folder / str(i), **size))) for i, size in enumerate(sizes)]


def make(student: Path, teacher: dict[str, Any], **arguments: Any) -> Any:
    torch.manual_seed(7)
    settings: dict[str, Any] = {"from_scratch": True, "learning_rate": 1e-2, "lr_schedule": "constant"} | arguments
    return StepByStepModule(student, objectives=[ForwardKL(teacher="crowd")], teachers={"crowd": teacher}, **settings)


def logits_of(student: Path, name: str, task: str) -> Tensor:
    """One model's logits at the target tokens, by Hugging Face's own forward."""
    module = make(student, {"model": name}, fast=False)
    found: Tensor = module.step(collate(ROWS, TASKS)).teacher("crowd").logits(task)[:, : len(WORDS)].double()
    return found


def crowd(module: DistillModule) -> Pass:
    return module.step(collate(ROWS, TASKS)).teacher("crowd")


# ------------------------------------------------------------------------------------------------ ensembles


@pytest.mark.parametrize("weights", [None, [0.5, 0.3, 0.2], [1, 0, 3]])
@pytest.mark.parametrize("mean", ["logits", "probabilities"])
def test_an_ensemble_is_the_mean_token_by_token(
    student_folder: Path, models: list[str], mean: str, weights: list[float] | None
) -> None:
    own = make(student_folder, {"model": models, "mean": mean, "weights": weights})
    shares = [share / sum(weights) for share in weights] if weights else [1 / 3] * 3
    for task in TASKS:
        parts = [logits_of(student_folder, name, task) for name in models]
        if mean == "logits":
            expected = sum((share * part for share, part in zip(shares, parts, strict=True)), torch.zeros(()))
        else:
            expected = sum((s * part.softmax(-1) for s, part in zip(shares, parts, strict=True)), torch.zeros(())).log()
        torch.testing.assert_close(crowd(own).logits(task)[:, : len(WORDS)].double(), expected, rtol=1e-4, atol=1e-5)
    assert len(own.teachers.loaded("crowd")) == sum(share > 0 for share in shares), "no others are in memory"


def test_it_is_projected_in_chunks(student_folder: Path, models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(student_folder, {"model": models, "mean": "probabilities"})
    found = []
    for chunk in (2**26, 1):
        monkeypatch.setattr("lit_distill.objectives.chunks.CHUNK_BYTES", chunk)
        step = module.step(collate(ROWS, TASKS))
        found.append(divergence(ForwardKL().value, step.student, step.teacher("crowd"), TASKS))
    torch.testing.assert_close(*found)


def test_it_decodes_in_lockstep(student_folder: Path, models: list[str]) -> None:
    teacher = crowd(make(student_folder, {"model": models}))
    step, labels = teacher.stepper("label"), collate(ROWS, TASKS)["label"]["labels"]
    first = teacher.rows("label").diff(prepend=torch.tensor([-1])) > 0
    torch.testing.assert_close(step(None), teacher.logits("label")[first])
    follows = teacher.rows("label")[first.roll(1) & ~first]
    torch.testing.assert_close(step(labels[:, 0])[follows], teacher.logits("label")[first.roll(1) & ~first])


def test_what_an_ensemble_cannot_give(student_folder: Path, models: list[str]) -> None:
    module = make(student_folder, {"model": models[:2]})
    module.teachers.load(module.student)
    with pytest.raises(UserError, match=r"^me: teacher 'crowd' is an ensemble, which has no hidden states; name one"):
        module.teachers.single("me", "crowd")
    asked: list[Callable[[Pass], object]] = [
        lambda teacher: teacher.hidden("label", 1),
        lambda teacher: teacher.encoder("label"),
        lambda teacher: teacher.generate("label", max_new_tokens=2),
        lambda teacher: teacher.score("label", []),
    ]
    for ask in asked:
        with pytest.raises(UserError, match=r"^teachers: crowd: an ensemble gives distributions alone, no "):
            ask(crowd(module))


# ------------------------------------------------------------------------------------------------ by similarity


def expected_similarity(module: DistillModule, batches: list[Any]) -> list[float]:
    found = []
    for name in module.teachers.groups["crowd"].settings.names:
        states, labels = [], []
        for batch in batches:
            one = make(Path(str(module.hparams["student"])), {"model": name}).step(batch).teacher("crowd")
            states += [one.states(task) for task in TASKS]
            labels += [one.labels(task) for task in TASKS]
        found.append(linear_cka(torch.cat(states), torch.cat(labels)))
    return found


@pytest.mark.parametrize("weights", ["cka", "nearest"])
def test_weights_by_similarity(
    student_folder: Path, models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    monkeypatch.setattr("lit_distill.modules.choosing.COMPARED_ROWS", 5)
    module = make(student_folder, {"model": models, "weights": weights})
    data = Shuffled(ROWS, 2, TASKS)
    with pytest.raises(UserError, match=rf"^teachers: crowd: fit computes weights: {weights}; give a checkpoint"):
        crowd(module).logits("label")
    trainer = make_trainer()
    trainer.fit(module, datamodule=data)
    # whole batches until there are five rows
    rows = [data.rows[i] for i in list(data.train_dataloader().sampler)[:6]]
    found = module.teachers.groups["crowd"].similarities
    assert found == pytest.approx(expected_similarity(module, [collate(rows, TASKS)]), rel=1e-5)
    best = found.index(max(found))
    parts = [logits_of(student_folder, name, "label") for name in models]
    if weights == "nearest":
        expected = parts[best]
        assert module.teachers.loaded("crowd")[0].width == [16, 24, 24][best]
    else:
        expected = sum((s * part for s, part in zip(found, parts, strict=True)), torch.zeros(())) / sum(found)
    assert len(module.teachers.loaded("crowd")) == (1 if weights == "nearest" else 3)
    torch.testing.assert_close(crowd(module).logits("label")[:, : len(WORDS)].double(), expected, rtol=1e-4, atol=1e-5)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = StepByStepModule.load_from_checkpoint(tmp_path / "end.ckpt")
    for other in (again, copy.deepcopy(module)):
        assert torch.equal(crowd(other).logits("label"), crowd(module).logits("label"))


def test_comparing_draws_no_random_numbers(student_folder: Path, models: list[str]) -> None:
    found = []
    for weights in ("cka", [1.0, 0.0]):
        module = make(student_folder, {"model": models[:2], "weights": weights}, dropout=0.3)
        if weights == "cka":
            module.teachers.groups["crowd"].weights = lambda: [1.0, 0.0]
        torch.manual_seed(7)
        make_trainer().fit(module, datamodule=Shuffled(ROWS, 2, TASKS))
        found.append(module.student.state_dict())
    assert identical(*found)


# ------------------------------------------------------------------------------------------------ sequences


class Seen(pl.Callback):
    """The stage of each micro-batch, and the models in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: object) -> None:
        self.stages.append((pl_module.teachers.stage("crowd"), len(pl_module.teachers.loaded("crowd"))))


@pytest.mark.parametrize(
    ("by", "at", "expected"),
    [("step", [2, 3], [0, 0, 0, 0, 1, 1, 2, 2]), ("epoch", [1, 9], [0, 0, 0, 0, 1, 1, 1, 1])],
)
def test_a_sequence_goes_on_by_steps_and_epochs(
    student_folder: Path, models: list[str], by: str, at: list[int], expected: list[int]
) -> None:
    seen = Seen()
    module = make(student_folder, {"model": models, "by": by, "at": at})
    trainer = make_trainer(max_epochs=2, callbacks=[seen], accumulate_grad_batches=2)
    trainer.fit(module, datamodule=RowsData(ROWS, 2, TASKS))
    assert seen.stages == [(stage, 1) for stage in expected], "one model at a time"
    # outside of training it stays where it is
    expected_logits = logits_of(student_folder, models[expected[-1]], "label")
    torch.testing.assert_close(crowd(module).logits("label")[:, : len(WORDS)].double(), expected_logits)


def test_each_model_of_a_sequence_is_freed(student_folder: Path, models: list[str]) -> None:
    module = make(student_folder, {"model": models[:2], "by": "step", "at": [2]})
    batch = collate(ROWS, TASKS)
    module.teachers.forward("crowd", batch, module.student, Progress(1))
    before = weakref.ref(module.teachers.loaded("crowd")[0])
    module.teachers.forward("crowd", batch, module.student, Progress(2))
    assert before() is None


@pytest.mark.parametrize("monitor", ["loss", "accuracy"])
def test_a_plateau(student_folder: Path, models: list[str], monitor: str) -> None:
    module = make(student_folder, {"model": models, "by": "plateau", "patience": 2, "monitor": monitor})
    sign = 1 if monitor == "loss" else -1
    stages: list[int] = []
    # better, equal, worse: on; worse than before but the first of this model; better; twice none: on; the last stays
    for step, value in enumerate([3.0, 2.0, 2.0, 2.5, 4.0, 3.9, 3.9, 3.9, 5.0, 6.0, 7.0]):
        # a resumed run validates again, and that counts once
        for _ in range(2):
            module.teachers.on_validation_end({monitor: sign * value, "label_loss": 0.0})
        module.teachers.groups["crowd"].advance(Progress(step))
        assert module.teachers.stage("crowd") == (stages or [0])[-1], "the same teacher to the end of the step"
        module.teachers.groups["crowd"].advance(Progress(step + 1))
        stages.append(module.teachers.stage("crowd"))
    assert stages == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    module.teachers.on_validation_end({})


class NeverRight(Shuffled):
    """Rows whose labels no student generates, so that each second validation ends a stage."""

    def answer_key(self, split: Split) -> AnswerKey:
        return replace(super().answer_key(split), labels=["never"] * len(self.rows))


def run_plateau(folder: Path, models: list[str], epochs: int, resume: Path | None = None, seed: int = 7) -> Any:
    teacher = {"model": models, "by": "plateau", "patience": 1, "monitor": "accuracy"}
    module = make(folder, teacher, dropout=0.1, max_label_length=1, num_samples=0)
    torch.manual_seed(seed)
    trainer = make_trainer(max_epochs=epochs, limit_val_batches=1.0)
    trainer.fit(module, datamodule=NeverRight(ROWS, 2, TASKS), ckpt_path=resume, weights_only=True if resume else None)
    return trainer


def test_a_plateau_survives_a_resumed_run(student_folder: Path, models: list[str], tmp_path: Path) -> None:
    whole = run_plateau(student_folder, models, 6)
    stopped = run_plateau(student_folder, models, 3)
    stages = [trainer.lightning_module.teachers.stage("crowd") for trainer in (stopped, whole)]
    assert stages == [1, 2], "the last validation counts from the next step on"
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = run_plateau(student_folder, models, 6, tmp_path / "stopped.ckpt", seed=99)
    assert identical(whole.lightning_module.state_dict(), resumed.lightning_module.state_dict())


def validate(teachers: Teachers, *steps: int) -> None:
    """Equal validations after these steps."""
    for step in steps:
        teachers.on_validation_end({"loss": 1.0})
        teachers.groups["crowd"].advance(Progress(step + 1))


def test_a_plateau_found_inside_a_step_survives_a_run_resumed_in_it(
    student_folder: Path, models: list[str], tmp_path: Path
) -> None:
    def end(*callbacks: pl.Callback, resume: Path | None = None) -> dict[str, Any]:
        # never better than at first, as no answer is right; the third validation is inside the third step
        teacher = {"model": models, "by": "plateau", "patience": 2, "monitor": "accuracy"}
        module = make(student_folder, teacher, max_label_length=2, num_samples=0)
        settings: dict[str, Any] = {"val_check_interval": 5, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}
        trainer = make_trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=list(callbacks), **settings)
        data = Shuffled(ROWS, 1, TASKS)
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
        return dict(module.state_dict())

    whole = end()
    for hook in ("on_validation_end", "on_before_optimizer_step"):
        with pytest.raises(Stopped):
            end(StopAt(hook, 3, tmp_path / "stopped.ckpt"))
        assert identical(whole, end(resume=tmp_path / "stopped.ckpt")), hook


def test_a_copy_and_a_pickle_know_the_stage(student_folder: Path, models: list[str]) -> None:
    module = make(student_folder, {"model": models, "by": "plateau", "patience": 1})
    validate(module.teachers, 0, 1)
    for other in (copy.deepcopy(module.teachers), pickle.loads(pickle.dumps(module.teachers))):  # noqa: S301
        assert other.stage("crowd") == 1
        validate(other, 2, 3)
        assert (other.stage("crowd"), module.teachers.stage("crowd")) == (2, 1)


def test_models_of_other_sizes_have_no_common_hidden_states(student_folder: Path, models: list[str]) -> None:
    alike = make(student_folder, {"model": [models[0], models[0]], "by": "step", "at": [1]})
    alike.teachers.load(alike.student)
    assert alike.teachers.single("me", "crowd").width == 16
    other = make(student_folder, {"model": models[:2], "by": "step", "at": [1]})
    other.teachers.load(other.student)
    with pytest.raises(UserError, match=r"^me: the models of teacher 'crowd' have different numbers or widths of"):
        other.teachers.single("me", "crowd")


# ------------------------------------------------------------------------------------------------ before any work


def test_each_model_is_checked_before_the_first_step(student_folder: Path, models: list[str], tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["more"])
    other = add_weights(make_student_folder(tmp_path / "other", vocab_size=len(WORDS) + 8))
    tokenizer.save_pretrained(other)
    empty = make_student_folder(tmp_path / "empty")
    for bad, said in (
        (other, r"'.*other' has another vocabulary \(65 entries\) than the student \(64\)"),
        (empty, r"no weights in the folder '.*empty'"),
    ):
        for more in ({"by": "plateau"}, {"mean": "logits"}, {"weights": "nearest"}):
            module = make(student_folder, {"model": [models[0], str(bad)], **more})
            with pytest.raises(UserError, match=f"^teachers: crowd: {said}"):
                make_trainer().fit(module, datamodule=RowsData(ROWS, 2, TASKS))
            assert module.global_step == 0


def test_only_one_model_is_in_memory_while_they_are_checked(
    student_folder: Path, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []

    class Counted(FrozenModel):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            assert sum(reference() is not None for reference in made[1:]) <= 1
            super().__init__(*arguments, **settings)
            made.append(weakref.ref(self))

    monkeypatch.setattr("lit_distill.teachers.groups.FrozenModel", Counted)
    module = make(student_folder, {"model": models, "by": "plateau"})
    module.teachers.load(module.student)
    assert len(made) == 3
    assert [reference() is not None for reference in made] == [True, False, False]
