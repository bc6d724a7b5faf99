"""What two processes do for `test_ddp.py`."""

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from lit_distill.callbacks import GradientShares
from lit_distill.data import JSONLDataModule
from lit_distill.data.batches import EpochSampler, ResumableLoader
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import AnswerKey, Split
from lit_distill.modules import DistillModule, StepByStepModule, choosing
from lit_distill.modules.voting import Vote
from lit_distill.modules.window import Window
from lit_distill.objectives import DistiLLM, ForwardKL, PredictionHeads, Progressive, Step
from lit_distill.students import base
from lit_distill.students.timing import Choice
from lit_distill.teachers.groups import WeighedGroup
from tests.modules.batches import Row, Rows, RowsData, collate, random_rows
from tests.modules.running import Steps, make_trainer
from tests.modules.test_resume import StopAt, Stopped
from tests.modules.test_weights import LogVariances
from tests.ranks import WORLD
from tests.runs import write_lines
from tests.test_gradient_shares import Lines
from tests.variants.fixed_text import FixedText

WEIGHT = 0.7
ACCUMULATES = (1, 3)
# seven micro-batches a rank: with 3, windows of 3, 3 and 1. Rows are dealt out in turn, so the first micro-batch of
# rank 0 has rows 0 and 2 and no rationale, and in the last window rank 1 has none either; the seed is one with which
# the two ranks' counts differ in every step
ROWS = random_rows(28, seed=44, without_rationale=(0, 2, 9, 25, 27))
# an odd number: the sampler pads the second rank
EVALUATION_ROWS = random_rows(7, seed=32, without_rationale=(2,))


class RankData(RowsData):
    """Evaluates through the sampler that pads with rows that do not count, as the real data modules do."""

    padded = True

    def _collate_padded(self, items: Any) -> Any:
        batch = self._collate_evaluation([(max(index, 0), row) for index, row in items])
        for inputs in batch.values():
            for i, (index, _) in enumerate(items):
                if index < 0:
                    inputs["index"][i] = index
                    inputs["labels"][i] = -100
        return batch

    def val_dataloader(self) -> DataLoader[Any]:
        if not self.padded:
            return super().val_dataloader()
        assert self.trainer is not None
        rows = PaddedRows(EVALUATION_ROWS)
        sampler = EpochSampler(rows, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(rows, batch_size=self.batch_size, sampler=sampler, collate_fn=self._collate_padded)


class PaddedRows(Rows):
    def __getitem__(self, index: int) -> tuple[int, Row]:
        return index, self.rows[max(index, 0)]


class TestedData(RankData):
    """Tests what `RankData` validates."""

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()


class Repeated(RankData):
    """Lightning's own sampler, which fills up with rows that are real, and so are there twice."""

    padded = False


class Choices(RankData):
    """Rows of the first rank have seven closed choices, those of the second one or none."""

    def answer_key(self, split: Split) -> AnswerKey:
        words = ("cat", "dog", "red", "blue", "yes", "no", "a b")
        choices = [words if row % WORLD == 0 else words[: row % 4 // 2] for row in range(len(self.rows))]
        return dataclasses.replace(super().answer_key(split), choices=choices)


class InOrder(RowsData):
    """Unshuffled, which Lightning's own sampler for training is not."""

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        rows = Rows(self.rows)
        sampler = EpochSampler(rows, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(rows, batch_size=self.batch_size, sampler=sampler, collate_fn=self._collate)


class Numbered(InOrder):
    """Rows that know their position, as the real data modules collate."""

    _collate = RowsData._collate_evaluation


class Resumable(RowsData):
    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        rows = Rows(self.rows)
        sampler = EpochSampler(rows, self.trainer.world_size, self.trainer.global_rank, shuffle=True, seed=4)
        return ResumableLoader(rows, batch_size=self.batch_size, sampler=sampler, collate_fn=self._collate)


def make_module(folder: Path, **arguments: Any) -> StepByStepModule:
    torch.manual_seed(7)
    settings: dict[str, Any] = {
        "from_scratch": True, "learning_rate": 1e-2, "rationale_weight": WEIGHT, "max_label_length": 4,
        "max_rationale_length": 6, "num_samples": 3, "evaluate_rationales": True,
    }  # fmt: skip
    return StepByStepModule(folder, **(settings | arguments))


def ddp_trainer(**settings: Any) -> Any:
    return make_trainer(**({"strategy": "ddp", "devices": WORLD} | settings))


def gradients(
    folder: Path, accumulate: int, epochs: int = 1, callbacks: Sequence[Callback] = (), **arguments: Any
) -> dict[str, Any]:
    steps = Steps()
    module = make_module(folder, **arguments)
    trainer = ddp_trainer(accumulate_grad_batches=accumulate, max_epochs=epochs, callbacks=[steps, *callbacks])
    trainer.fit(module, datamodule=InOrder(ROWS, 2, module.tasks))
    return {
        "gradients": steps.gradients,
        "weights": [student.state_dict() for student in steps.students],
        "logged": steps.logged,
        "tokens": module.train_tokens(),
    }


def gradient_shares(module: DistillModule, rows: Sequence[Row] = ROWS, batch: int = 2, **settings: Any) -> Any:
    """What the first step's measured shares are, logged by the first rank alone."""
    lines = Lines()
    trainer = make_trainer(max_steps=1, callbacks=[GradientShares(1)], logger=lines, log_every_n_steps=1, **settings)
    trainer.fit(module, datamodule=InOrder(rows, batch, module.tasks))
    return lines.found


def only_own_counts(self: DistillModule, window: Window) -> dict[str, Tensor]:
    """What the correction would be if ranks did not add up their counts."""
    accumulate = self.trainer.accumulate_grad_batches
    weights = {name: torch.tensor(accumulate / max(count, 1)) for name, count in window.totals.items()}
    return weights | {"": torch.tensor(accumulate / len(window.counts))}


def all_runs(rank: int, out: Path, folder: Path, teacher: Path) -> dict[str, Any]:
    found: dict[str, Any] = {f"right {k}": gradients(folder, k, epochs=2) for k in ACCUMULATES}

    for k in ACCUMULATES:
        found[f"prepared {k}"] = gradients(folder, k, objectives=[FixedText(weight=0.5, tasks=["rationale"])])

    with mock.patch.object(DistillModule, "window_weights", only_own_counts):
        found["own counts"] = gradients(folder, 3)

    for name, kind in (("padded", RankData), ("repeated", Repeated)):
        module = make_module(folder)
        data = kind(EVALUATION_ROWS, 2, module.tasks)
        ddp_trainer(limit_val_batches=1.0, use_distributed_sampler=name == "repeated").validate(
            module, datamodule=data, verbose=False
        )
        assert module.evaluation is not None
        found[name] = {
            "metrics": module.evaluation.metrics,
            "samples": [vars(sample) for sample in module.evaluation.samples],
        }

    found["gradient shares"] = gradient_shares(
        make_module(folder), strategy="ddp", devices=WORLD, accumulate_grad_batches=3
    )
    caught = LogVariances()
    found["weighted"] = gradients(folder, 3, callbacks=[caught], weighting="uncertainty")
    found["log-variances"] = caught.found
    found["voted"] = voted(folder, ddp_trainer(use_distributed_sampler=False), 2)
    found["forward passes"] = forward_passes(folder)
    found["one rank's rationales"] = unevenly_measured(folder)

    found["shaped"] = shaped(folder, teacher, ddp_trainer, rank)
    found["resume"] = {name: resumed(folder, out, rank, name) for name in ("whole", "stopped", "resumed")}
    (out / "own").mkdir(exist_ok=True)
    found["own text"] = {
        name: resumed(
            folder, out / "own", rank, name,
            objectives=[DistiLLM(teacher="big", share=0.7, capacity=6)], teachers={"big": {"model": str(teacher)}},
        )
        for name in ("whole", "stopped", "resumed")
    }  # fmt: skip
    (out / "streamed").mkdir(exist_ok=True)
    found["streamed"] = {
        name: resumed(folder, out / "streamed", rank, name, streamed=True) for name in ("whole", "stopped", "resumed")
    }
    found["paths"] = paths(folder, rank)
    found["taught"] = taught(folder, str(teacher), rank)
    found["diverged"] = diverged(folder, rank)
    return found


def shaped(folder: Path, teacher: Path, trainer: Any, rank: int = 0, batch_size: int = 2) -> dict[str, Any]:
    """The gradients of an objective's parameters, which are as wide as its teacher, in the first step."""
    objectives = [PredictionHeads(stack=stack, name=stack, teacher=str(teacher)) for stack in ("encoder", "decoder")]
    module = make_module(folder, objectives=objectives)
    gradients: list[dict[str, Tensor]] = []

    class Gradients(Callback):
        def on_before_optimizer_step(self, *_: object) -> None:
            named = module.objectives.named_parameters()  # type: ignore[attr-defined]
            gradients.append({name: parameter.grad.clone() for name, parameter in named})

    # each rank has its own seed: the parameters begin as on the first
    torch.manual_seed(60 + rank)
    data = InOrder(ROWS[:4], batch_size, module.tasks)
    trainer(max_steps=1, callbacks=[Gradients()], use_distributed_sampler=False).fit(module, datamodule=data)
    return {"gradients": gradients[0], "weights": dict(module.objectives.state_dict())}  # type: ignore[attr-defined]


def streamed_rows(out: Path, module: DistillModule, rank: int) -> JSONLDataModule:
    """Shards of unequal sizes, an odd number of them, so that the ranks are at different places of them."""
    rows = [{"input": f"{i} and 1?", "label": "yes", "rationale": f"{i} is so"} for i in range(23)]
    if rank == 0:
        for number, (start, end) in enumerate(((0, 2), (2, 14), (14, 23))):
            write_lines(out / "shards" / f"{number}.jsonl", rows[start:end])
    return JSONLDataModule(
        train=out / "shards" / "*", val=out / "shards" / "0.jsonl", streaming=True, shuffle_buffer=4, batch_size=2,
        tasks=module.tasks, tokenizer=module.student.tokens,
    )  # fmt: skip


def resumed(
    folder: Path, out: Path, rank: int, part: str, streamed: bool = False, **arguments: Any
) -> dict[str, Tensor]:
    module = make_module(folder, dropout=0.1, **arguments)
    # each rank has its own seed, as without `seed_everything`: the run's is the first rank's
    seed_everything(40 + rank if part == "resumed" else 20 + rank, verbose=False)
    path = out / "stopped.ckpt"
    # after four steps: in the middle of the second epoch, an epoch having three
    stop = [StopAt("on_before_zero_grad", 5, path)] if part == "stopped" else []
    limit = {"max_epochs": -1, "max_steps": 9, "check_val_every_n_epoch": None} if streamed else {"max_epochs": 3}
    trainer = ddp_trainer(accumulate_grad_batches=3, use_distributed_sampler=False, callbacks=stop, **limit)
    data = streamed_rows(out, module, rank) if streamed else Resumable(ROWS, 2, module.tasks)
    resume = path if part == "resumed" else None
    with suppress(Stopped):
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    tokens = torch.tensor(module.train_tokens())
    return {name: tensor.clone() for name, tensor in module.state_dict().items()} | {"tokens": tokens}


def paths(folder: Path, rank: int) -> list[str]:
    """The paths of a run's passes where the ranks' own timings speak for different ones."""
    module, found = make_module(folder), list[str]()
    choice = Choice("packed" if rank else "plain", 2, {"packed": 1.0, "plain": 2.0 * rank})

    def record(self: Any, trainer: Any, module: Any, *_: object) -> None:
        found.append(module.student.path)

    with (
        mock.patch.object(choosing, "choose", return_value=choice),
        mock.patch.object(Steps, "on_before_optimizer_step", record),
    ):
        ddp_trainer(max_steps=2, callbacks=[Steps()]).fit(module, datamodule=InOrder(ROWS, 2, module.tasks))
    return found


def taught(folder: Path, teacher: str, rank: int) -> dict[str, Any]:
    """What a run keeps of a sequence and of similarities, and the similarities of this rank's rows."""
    module = make_module(
        folder,
        objectives=[Progressive(teacher="path"), ForwardKL(teacher="crowd")],
        teachers={
            "path": {"model": [teacher] * 3, "by": "step", "at": [1, 2]},
            "crowd": {"model": [teacher] * 2, "weights": "cka"},
        },
    )
    torch.manual_seed(60 + rank)
    data = Numbered(ROWS, 2, module.tasks)
    ddp_trainer(max_steps=4, use_distributed_sampler=False).fit(module, datamodule=data)
    own = collate(ROWS[rank::WORLD], module.tasks)
    group = cast(WeighedGroup, module.teachers.groups["crowd"])
    return {"kept": dict(module.state_dict()), "own": group.compare([own], module.student)}


def diverged(folder: Path, rank: int) -> dict[str, Any]:
    """A loss that is not finite in the second step of the second rank alone."""
    module = make_module(folder)
    calls = iter(range(100))
    right = module.loss_terms

    def wrong(step: Step) -> dict[str, Tensor]:
        terms = right(step)
        return terms | {"label": terms["label"] * float("nan")} if next(calls) == 1 and rank == 1 else terms

    module.loss_terms = wrong  # type: ignore[method-assign]
    try:
        ddp_trainer().fit(module, datamodule=InOrder(ROWS, 2, module.tasks))
    except UserError as error:
        return {"error": str(error), "finite": all(bool(p.isfinite().all()) for p in module.parameters())}
    return {"error": "", "finite": False}


def forward_passes(folder: Path) -> list[int]:
    """Passes over encoder and decoder of an evaluation in which each would be a collective."""
    module = make_module(folder, evaluate_rationales=False)
    counts = [0, 0]

    def count(part: int) -> Any:
        def hook(*_: object) -> None:
            counts[part] += 1

        return hook

    module.student.model.get_submodule("encoder").register_forward_hook(count(0))
    module.student.model.get_submodule("decoder").register_forward_hook(count(1))
    with mock.patch.object(DistillModule, "sharded", True), mock.patch.object(base, "CHOICES_AT_ONCE", 2):
        data = Choices(EVALUATION_ROWS, 2, module.tasks)
        ddp_trainer(limit_val_batches=1.0, use_distributed_sampler=False).validate(
            module, datamodule=data, verbose=False
        )
    assert module.evaluation is not None
    return counts


def unevenly_measured(folder: Path) -> list[str]:
    """The losses that are found where the first rank's rows of val alone have rationales."""
    module = make_module(folder)
    data = RankData(EVALUATION_ROWS, 2, module.tasks)
    right = DistillModule.term_counts
    DistillModule.term_counts = lambda self, batch: (  # type: ignore[method-assign]
        {**right(self, batch), **({"rationale": 0} if self.global_rank else {})}
    )
    trainer = ddp_trainer(limit_val_batches=1.0, use_distributed_sampler=False)
    trainer.validate(module, datamodule=data, verbose=False)
    DistillModule.term_counts = right  # type: ignore[method-assign]
    assert module.evaluation is not None
    return sorted(name for name in module.evaluation.metrics if "loss" in name)


def voted(folder: Path, trainer: Any, batch_size: int) -> list[dict[str, Any]]:
    """The answers of a test in which samples vote."""
    module = make_module(folder, vote=Vote(samples=3, temperature=1.5, by="likelihood"))
    trainer.test(module, datamodule=TestedData(EVALUATION_ROWS, batch_size, module.tasks), verbose=False)
    assert module.evaluation is not None
    return [vars(answer) for answer in module.evaluation.answers]


def one_process(folder: Path) -> dict[str, float]:
    module = make_module(folder)
    make_trainer(limit_val_batches=1.0).validate(
        module, datamodule=RowsData(EVALUATION_ROWS, 3, module.tasks), verbose=False
    )
    assert module.evaluation is not None
    return module.evaluation.metrics
