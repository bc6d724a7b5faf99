"""Passes that go on where they were left, alone and under Lightning."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler

from lit_distill.data.batches import EpochSampler, ResumableLoader

ROWS = list(range(23))


def loader(workers: int = 0, world: int = 1, rank: int = 0, **settings: Any) -> ResumableLoader:
    sampler = EpochSampler(ROWS, world, rank, seed=1)
    return ResumableLoader(
        ROWS,  # type: ignore[arg-type]
        batch_size=4,
        sampler=sampler,
        collate_fn=list,
        num_workers=workers,
        persistent_workers=workers > 0,
        **settings,
    )


def pass_over(data: DataLoader[Any], epoch: int) -> list[Any]:
    assert isinstance(data.sampler, EpochSampler)
    data.sampler.set_epoch(epoch)
    return list(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_rest_of_a_pass(workers: int) -> None:
    whole = [pass_over(loader(), epoch) for epoch in range(3)]
    data = loader(workers)
    assert len(data) == 6
    data.load_state_dict({"epoch": 1, "batches": 4})
    assert data.state_dict() == {"epoch": 1, "batches": 4}
    iterator: Iterator[Any] = iter(data)
    data.sampler.set_epoch(1)  # type: ignore[attr-defined]  # Lightning says it after the iterator is made
    assert next(iterator) == whole[1][4]
    assert data.state_dict() == {"epoch": 1, "batches": 5}
    assert list(iterator) == whole[1][5:]
    assert data.state_dict() == {"epoch": 1, "batches": 6}
    assert pass_over(data, 2) == whole[2]
    assert len(data) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_counts_what_was_handed_out(workers: int) -> None:
    data = loader(workers)
    assert data.state_dict() == {"epoch": 0, "batches": 0}
    for number, _ in enumerate(data, start=1):
        assert data.state_dict() == {"epoch": 0, "batches": number}
    data.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert data.state_dict() == {"epoch": 1, "batches": 0}


@pytest.mark.parametrize("batches", [6, 7])
def test_after_the_last_batch_nothing_is_left_of_a_pass(batches: int) -> None:
    data = loader()
    data.load_state_dict({"epoch": 1, "batches": batches})
    assert pass_over(data, 1) == []
    assert len(pass_over(data, 2)) == 6


def test_another_epoch_begins_at_its_beginning() -> None:
    data = loader()
    data.load_state_dict({"epoch": 1, "batches": 4})
    assert pass_over(data, 2) == pass_over(loader(), 2)


def test_ranks_resume_their_own_rows() -> None:
    for rank in range(2):
        whole = pass_over(loader(world=2, rank=rank), 3)
        data = loader(world=2, rank=rank)
        data.load_state_dict({"epoch": 3, "batches": 1})
        assert list(data) == whole[1:]


def test_with_another_sampler_what_was_seen_is_dropped() -> None:
    rows: Any = ROWS
    data: Any = ResumableLoader(rows, batch_size=4, sampler=SequentialSampler(rows), collate_fn=list)
    data.load_state_dict({"epoch": 0, "batches": 5})
    assert data.state_dict() == {"epoch": 0, "batches": 5}
    assert list(data) == [[20, 21, 22]]
    assert data.state_dict() == {"epoch": 0, "batches": 6}
    assert next(iter(data)) == [0, 1, 2, 3]


class Recorder(pl.LightningModule):
    """Trains one number and writes down what it saw."""

    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.workers = workers
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: list[int]) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch))
        return self.weight * len(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.workers)


class SaveAt(pl.Callback):
    """Save in the middle of a run, as `ModelCheckpoint` does; a run that reached ``max_steps`` has closed its epoch."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(module: Recorder, folder: Path, save_at: int = 0, resume: Path | None = None) -> Path:
    path = folder / f"{save_at}.ckpt"
    with warnings.catch_warnings():
        # Lightning's advice on workers and devices, none of it about what is tested
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=15,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[SaveAt(save_at, path)],
            default_root_dir=folder,
        )
        trainer.fit(module, ckpt_path=resume, weights_only=True)
    return path


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stop", [2, 5, 6, 9])
def test_lightning_resumes_a_stopped_run(stop: int, workers: int, tmp_path: Path) -> None:
    unbroken, resumed = Recorder(workers), Recorder(workers)
    checkpoint = fit(unbroken, tmp_path, save_at=stop)
    fit(resumed, tmp_path, resume=checkpoint)
    assert resumed.seen == unbroken.seen[stop:]
    # each epoch is another order of all rows
    epochs = [[row for epoch, batch in unbroken.seen if epoch == number for row in batch] for number in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [ROWS, ROWS]
    assert epochs[0] != epochs[1]
