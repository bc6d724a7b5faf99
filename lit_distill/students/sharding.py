"""Students with parameters sharded over ranks: only the first rank reads the weights.

Within `deferred`, modules are built without allocating weights; ``configure_model`` provides them once the strategy is
known.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import PreTrainedModel

from lit_distill.students.base import Student

_DEFERRED: ContextVar[bool] = ContextVar("deferred", default=False)


@contextmanager
def deferred() -> Iterator[None]:
    """Build students without allocating weights."""
    token = _DEFERRED.set(True)
    try:
        yield
    finally:
        _DEFERRED.reset(token)


def is_deferred() -> bool:
    """Whether `deferred` is active."""
    return _DEFERRED.get()


def give_weights(student: Student, strategy: Strategy, load: Callable[[], PreTrainedModel]) -> None:
    """Give a student that was built within `deferred` the weights of the model that ``load`` reads.

    FSDP asks for one block of layers at a time: the first rank reads the model and broadcasts each block, of which
    every rank keeps its shard. Blocks are transformers' unsplittable modules, unless the strategy has its own policy.
    Under any other strategy every rank reads the weights.
    """
    if isinstance(strategy, FSDPStrategy):
        names = student.network._no_split_modules or ()
        blocks = {type(part) for part in student.modules() if type(part).__name__ in names}
        strategy.kwargs.setdefault("auto_wrap_policy", ModuleWrapPolicy(blocks))
        whole = load() if strategy.global_rank == 0 else None
        strategy.kwargs["param_init_fn"] = _Sender(student.model, whole, strategy.root_device)
    else:
        student.model = load()


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    return dict((*model.named_parameters(), *model.named_buffers()))


class _Sender:
    """FSDP's ``param_init_fn``: fills a module of an empty model from the first rank, which alone has it whole."""

    def __init__(self, empty: PreTrainedModel, whole: PreTrainedModel | None, device: torch.device) -> None:
        self._names = {id(tensor): name for name, tensor in _tensors(empty).items()}
        self._weights = None if whole is None else _tensors(whole)
        self._device = device
        self._sent: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> None:
        for tensors in (module._parameters, module._buffers):
            for name, empty in tensors.items():
                if empty is None or not empty.is_meta:
                    continue
                if id(empty) not in self._sent:
                    # kept with the empty one, whose id would go to another
                    self._sent[id(empty)] = empty, self._send(empty)
                # a tied one is sent once, and stays tied
                tensors[name] = self._sent[id(empty)][1]  # type: ignore[assignment]

    def _send(self, empty: Tensor) -> Tensor:
        tensor = torch.empty_like(empty, device=self._device)
        if self._weights is not None:
            tensor.copy_(self._weights.pop(self._names[id(empty)]))
        torch.distributed.broadcast(tensor, src=0)
        return nn.Parameter(tensor, empty.requires_grad) if isinstance(empty, nn.Parameter) else tensor
