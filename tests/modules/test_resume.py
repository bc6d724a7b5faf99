"""A run that is stopped and resumed ends as one that was not: the same weights and optimizer state, bit by bit."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader

from lit_distill.data.batches import EpochSampler, ResumableLoader
from lit_distill.modules import StepByStepModule, training
from tests.modules.batches import Rows, RowsData, random_rows
from tests.modules.running import identical, make_trainer

BATCH, ACCUMULATE, EPOCHS = 2, 3, 2
# seven micro-batches, the last one of one row: windows of 3, 3 and 1
ROWS = random_rows(13, seed=11, without_rationale=(4, 5, 9))


class Shuffled(RowsData):
    """The same rows through the loader and the sampler that the real data modules use."""

    order_seed = 3

    def train_dataloader(self) -> DataLoader[Any]:
        rows = Rows(self.rows)
        return ResumableLoader(
            rows,
            batch_size=self.batch_size,
            sampler=EpochSampler(rows, shuffle=True, seed=self.order_seed),
            collate_fn=self._collate,
            persistent_workers=self.loader.get("num_workers", 0) > 0,
            **self.loader,
        )


class Endless(Shuffled):
    """Without a length, as a stream: Lightning reads a micro-batch ahead."""

    def train_dataloader(self) -> Any:
        return Repeated(list(super().train_dataloader()))


class Repeated:
    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches, self.read = batches, 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.read += 1
            yield self.batches[(self.read - 1) % len(self.batches)]

    def state_dict(self) -> dict[str, int]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.read = state["read"]


class Stopped(Exception):
    pass


class StopAt(pl.Callback):
    """Saves a checkpoint and raises when a hook is called for the n-th time."""

    def __init__(self, hook: str, count: int, path: Path) -> None:
        self.left = count

        def called(trainer: pl.Trainer, *_: object, **__: object) -> None:
            self.left -= 1
            if self.left == 0:
                trainer.save_checkpoint(path)
                raise Stopped

        setattr(self, hook, called)


def run(
    folder: Path,
    callbacks: Sequence[pl.Callback] = (),
    resume: Path | None = None,
    seed: int = 1,
    data: type[RowsData] = Shuffled,
    workers: int = 0,
    **settings: Any,
) -> tuple[StepByStepModule, pl.Trainer]:
    pl.seed_everything(seed, verbose=False)
    module = StepByStepModule(folder, from_scratch=True, learning_rate=1e-2, dropout=0.1, score_choices=False,
                              max_label_length=2, num_samples=0)  # fmt: skip
    trainer = make_trainer(
        **{
            "max_epochs": EPOCHS,
            "accumulate_grad_batches": ACCUMULATE,
            "callbacks": list(callbacks),
            "limit_val_batches": 1,
            "check_val_every_n_epoch": None,
            "val_check_interval": ACCUMULATE,
        }
        | settings
    )
    loaded = data(ROWS, BATCH, module.tasks, num_workers=workers)
    trainer.fit(module, datamodule=loaded, ckpt_path=resume, weights_only=True if resume else None)
    return module, trainer


def end_state(module: StepByStepModule, trainer: pl.Trainer) -> dict[str, Any]:
    return {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"],
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "tokens": module.train_tokens(),
    }


@pytest.fixture(scope="module")
def unbroken(student_folder: Path) -> dict[str, Any]:
    state = end_state(*run(student_folder))
    assert state["step"] == 6
    # each row twice, its sources and targets
    assert state["tokens"] == 2 * sum(len(ids) for row in ROWS for task in row.values() for ids in task)
    return state


STOPS = [
    # each of the 14 micro-batches, of which only 3, 6, 7, 10, 13 and 14 complete a step
    *[("on_train_batch_end", count) for count in range(1, 2 * 7 + 1)],
    *[("on_train_batch_start", count) for count in (1, 8, 12)],
    *[("on_after_backward", count) for count in (2, 7)],
    *[("on_before_optimizer_step", count) for count in (3, 5)],
    ("on_before_zero_grad", 4),
    # after 3, 6, 9 and 12 micro-batches of the run: at a step's end in the first epoch, inside one in the second
    ("on_validation_start", 3),
    ("on_validation_batch_end", 4),
    *[("on_validation_end", count) for count in (1, 2, 3, 4)],
    *[("on_train_epoch_start", count) for count in (1, 2)],
    *[("on_train_epoch_end", count) for count in (1, 2)],
    ("on_train_end", 1),
]


@pytest.mark.parametrize(("hook", "count"), STOPS)
def test_stopped_anywhere_and_resumed(
    student_folder: Path, tmp_path: Path, unbroken: dict[str, Any], hook: str, count: int
) -> None:
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(Stopped):
        run(student_folder, [StopAt(hook, count, path)])
    torch.load(path, weights_only=True)
    # another seed: what it decides has to come from the checkpoint
    assert identical(end_state(*run(student_folder, resume=path, seed=99)), unbroken)


def test_the_tokens_before_an_older_checkpoint_are_unknown(student_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(Stopped):
        run(student_folder, [StopAt("on_train_batch_end", 7, path)])
    kept = torch.load(path, weights_only=True)
    del kept["lit_distill_train_tokens"]
    torch.save(kept, path)
    module, _ = run(student_folder, resume=path)
    assert module.train_tokens() < 0


@pytest.mark.parametrize("count", [2, 10])
def test_stopped_twice(student_folder: Path, tmp_path: Path, unbroken: dict[str, Any], count: int) -> None:
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    with pytest.raises(Stopped):
        run(student_folder, [StopAt("on_train_batch_end", 4, first)])
    with pytest.raises(Stopped):
        run(student_folder, [StopAt("on_train_batch_end", count, second)], resume=first, seed=50)
    assert identical(end_state(*run(student_folder, resume=second, seed=99)), unbroken)


# with this callback Lightning takes no `ckpt_path` for the last one, finds none, and warns of all that
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_stopped_by_an_error_with_lightnings_own_callback(
    student_folder: Path, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
            if trainer.global_step == 4 and trainer.fit_loop.batch_idx == 4:
                raise Stopped

    with pytest.raises(Stopped):
        run(student_folder, [OnExceptionCheckpoint(tmp_path, "failed"), Fails()], enable_checkpointing=True)
    assert identical(end_state(*run(student_folder, resume=tmp_path / "failed.ckpt", seed=99)), unbroken)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    "saving",
    [{"every_n_train_steps": 1}, {"monitor": "val/accuracy", "mode": "max"}, {"save_on_train_epoch_end": True}],
    ids=["steps", "validations", "epochs"],
)
def test_resumed_from_what_model_checkpoint_wrote(
    student_folder: Path, tmp_path: Path, unbroken: dict[str, Any], saving: dict[str, Any]
) -> None:
    def checkpoints() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", save_last=True, **saving)

    class Fails(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *rest: object) -> None:
            if trainer.global_step == 4 and trainer.fit_loop.batch_idx == 4:
                raise Stopped

    with pytest.raises(Stopped):
        run(student_folder, [checkpoints(), Fails()], enable_checkpointing=True)
    last = tmp_path / "last.ckpt"
    assert 0 < torch.load(last, weights_only=True)["global_step"] <= 4
    found = end_state(*run(student_folder, [checkpoints()], resume=last, seed=99, enable_checkpointing=True))
    assert identical(found, unbroken)


@pytest.mark.parametrize("count", [4, 9])
def test_resumed_with_worker_processes(
    student_folder: Path, tmp_path: Path, unbroken: dict[str, Any], count: int
) -> None:
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(Stopped):
        run(student_folder, [StopAt("on_train_batch_end", count, path)], workers=2)
    assert identical(end_state(*run(student_folder, resume=path, seed=99, workers=2)), unbroken)


# Lightning cannot know that the module reads such a loader up to where it was
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("count", [2, 5, 8])
def test_resumed_with_a_plain_loader(student_folder: Path, tmp_path: Path, count: int) -> None:
    path = tmp_path / "stopped.ckpt"
    whole = end_state(*run(student_folder, data=RowsData))
    with pytest.raises(Stopped):
        run(student_folder, [StopAt("on_train_batch_end", count, path)], data=RowsData)
    assert identical(end_state(*run(student_folder, resume=path, seed=99, data=RowsData)), whole)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_with_a_loader_without_a_length(
    student_folder: Path, tmp_path: Path, accumulate: int, hook: str
) -> None:
    path = tmp_path / "stopped.ckpt"
    settings: dict[str, Any] = {"data": Endless, "max_epochs": -1, "max_steps": 6, "val_check_interval": 4}
    settings["accumulate_grad_batches"] = accumulate
    whole = end_state(*run(student_folder, **settings))
    with pytest.raises(Stopped):
        run(student_folder, [StopAt(hook, 3, path)], **settings)
    assert identical(end_state(*run(student_folder, resume=path, seed=99, **settings)), whole)


@pytest.mark.parametrize("without", ["random states", "position"])
def test_it_takes_both_the_random_states_and_the_position(
    student_folder: Path, tmp_path: Path, unbroken: dict[str, Any], without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(Stopped):
        run(student_folder, [StopAt("on_train_batch_end", 4, path)])
    if without == "random states":
        monkeypatch.setattr(training, "seed_step", lambda seed, step, rank: None)
    else:
        monkeypatch.setattr(ResumableLoader, "load_state_dict", lambda self, state: None)
    resumed = end_state(*run(student_folder, resume=path, seed=99))
    assert not identical(resumed["weights"], unbroken["weights"])


def test_another_seed_is_another_run(student_folder: Path, unbroken: dict[str, Any]) -> None:
    module, _ = run(student_folder, seed=2)
    assert not identical(module.state_dict(), unbroken["weights"])


def test_steps_do_not_share_their_dropout(student_folder: Path) -> None:
    """The same rows at a learning rate of nearly nothing: only the dropout moves the loss."""

    class Losses(pl.Callback):
        found: list[float] = []  # noqa: RUF012 - one instance

        def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
            self.found.append(float(trainer.callback_metrics["train/loss"]))

    module = StepByStepModule(student_folder, from_scratch=True, learning_rate=1e-12, dropout=0.3)
    losses = Losses()
    make_trainer(max_epochs=4, callbacks=[losses]).fit(module, datamodule=RowsData(ROWS[:2], 2, module.tasks))
    assert len(set(losses.found)) == 4


def test_a_loaded_module_starts_a_run_with_the_new_seed(student_folder: Path, tmp_path: Path) -> None:
    _, trainer = run(student_folder, seed=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    found = []
    for seed in (1, 5):
        pl.seed_everything(seed, verbose=False)
        module = StepByStepModule.load_from_checkpoint(tmp_path / "end.ckpt")
        make_trainer().fit(module, datamodule=RowsData(ROWS, BATCH, module.tasks))
        found.append(module.state_dict())
    assert not identical(*found)


@pytest.mark.parametrize(
    ("shorter", "longer", "saved_by"),
    [
        ({"max_epochs": 1}, {"max_epochs": 3}, "trainer"),
        ({"max_epochs": 1}, {"max_epochs": 3}, "model checkpoint"),
        ({"max_epochs": -1, "max_steps": 4}, {"max_epochs": -1, "max_steps": 8}, "trainer"),
        ({"max_epochs": -1, "max_steps": 3}, {"max_epochs": -1, "max_steps": 8}, "model checkpoint"),
        ({"max_epochs": -1, "max_steps": 4}, {"max_epochs": 3}, "model checkpoint"),
    ],
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_finished_run_resumed_for_longer(
    student_folder: Path, tmp_path: Path, shorter: dict[str, Any], longer: dict[str, Any], saved_by: str
) -> None:
    """With a constant learning rate, so that the longer run's schedule is the shorter one's."""

    def constant(
        resume: Path | None = None, seed: int = 1, callbacks: Sequence[pl.Callback] = (), **settings: Any
    ) -> tuple[StepByStepModule, pl.Trainer]:
        pl.seed_everything(seed, verbose=False)
        module = StepByStepModule(
            student_folder, from_scratch=True, learning_rate=1e-2, dropout=0.1, lr_schedule="constant"
        )
        trainer = make_trainer(
            accumulate_grad_batches=ACCUMULATE, callbacks=list(callbacks), enable_checkpointing=bool(callbacks),
            **settings,
        )  # fmt: skip
        data = Shuffled(ROWS, BATCH, module.tasks)
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
        return module, trainer

    path = tmp_path / "last.ckpt"
    if saved_by == "trainer":
        _, trainer = constant(**shorter)
        trainer.save_checkpoint(path)
    else:
        constant(callbacks=[ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)], **shorter)
    resumed, whole = end_state(*constant(path, seed=9, **longer)), end_state(*constant(**longer))
    assert identical(resumed, whole)
