"""What two processes do for `test_two_ranks.py`."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel

from lit_distill.modules import DistillModule, StepByStepModule
from lit_distill.students import base, load
from lit_distill.students.sharding import deferred
from tests.modules.batches import random_rows
from tests.modules.ddp_runs import EVALUATION_ROWS, Choices, InOrder, ddp_trainer, make_module
from tests.modules.running import make_trainer
from tests.ranks import WORLD

ROWS = random_rows(12, seed=44, without_rationale=(0, 2, 9))
LORA = {"r": 4, "alpha": 8, "target_modules": "all-linear"}


def module_of(folder: Path, **arguments: Any) -> StepByStepModule:
    # plain gradient descent shows the size of a gradient, which Adam's steps do not
    return make_module(folder, from_scratch=False, evaluate_rationales=False, lr_schedule="constant", **arguments)


def weights_of(module: DistillModule) -> dict[str, Tensor]:
    return {
        name.replace("_fsdp_wrapped_module.", ""): parameter.detach().clone()
        for name, parameter in module.student.named_parameters()
    }


def trained(trainer: Any, module: DistillModule, batch_size: int) -> dict[str, Tensor]:
    module.configure_optimizers = lambda: torch.optim.SGD(  # type: ignore[method-assign]
        [parameter for parameter in module.parameters() if parameter.requires_grad], lr=0.5
    )
    trainer.fit(module, datamodule=InOrder(ROWS, batch_size, module.tasks))
    if not isinstance(trainer.strategy, FSDPStrategy):
        return weights_of(module)
    whole: Any = trainer.strategy.model
    with FullyShardedDataParallel.summon_full_params(whole):
        return weights_of(module)


def one_process(folder: Path, **arguments: Any) -> dict[str, Tensor]:
    """The weights after an epoch over all rows."""
    return trained(make_trainer(), module_of(folder, **arguments), 2 * WORLD)


def on_cpu(self: Any, *args: Any, device_id: object = None, **settings: Any) -> None:
    right_init(self, *args, device_id=torch.device("cpu"), **settings)


right_init: Any = FullyShardedDataParallel.__init__


def sharded(folder: Path, **arguments: Any) -> dict[str, Any]:
    """The same under FSDP, which Lightning and torch keep from a CPU."""
    with deferred():
        module = module_of(folder, **arguments)
    empty = all(parameter.is_meta for parameter in module.student.parameters())
    reads: list[int] = []

    def read(*args: Any, **settings: Any) -> PreTrainedModel:
        reads.append(1)
        model: PreTrainedModel = load(args[0], dtype=settings["dtype"], adapter=settings["adapter"]).model
        return model

    patches = (
        mock.patch.object(FullyShardedDataParallel, "__init__", on_cpu),
        mock.patch.object(_AcceleratorConnector, "_check_strategy_and_fallback"),
        mock.patch("lit_distill.students.load_model", read),
    )
    for patch in patches:
        patch.start()
    strategy = FSDPStrategy(process_group_backend="gloo")
    weights = trained(ddp_trainer(strategy=strategy), module, 2)
    for patch in patches:
        patch.stop()
    blocks = [part for part in module.student.modules() if isinstance(part, FullyShardedDataParallel)]
    return {"weights": weights, "empty": empty, "reads": len(reads), "blocks": len(blocks)}


def forwards_with_choices(folder: Path) -> int:
    """Forwards of an evaluation in which each would be a collective."""
    module, calls = module_of(folder), []
    module.student.network.base_model.register_forward_hook(lambda *_: calls.append(1))
    with mock.patch.object(DistillModule, "sharded", True), mock.patch.object(base, "CHOICES_AT_ONCE", 2):
        data = Choices(EVALUATION_ROWS, 2, module.tasks)
        ddp_trainer(limit_val_batches=1.0, use_distributed_sampler=False).validate(
            module, datamodule=data, verbose=False
        )
    return len(calls)


def all_runs(rank: int, out: Path, folders: dict[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        found[f"ddp {name}"] = trained(ddp_trainer(), module_of(folder), 2)
        found[f"fsdp {name}"] = sharded(folder)
    found["fsdp with an adapter"] = sharded(folders["llama"], adapter=LORA)
    found["forwards"] = forwards_with_choices(folders["llama"])
    return found
