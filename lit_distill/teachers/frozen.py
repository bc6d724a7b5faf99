"""One frozen model: read from where it is, kept on its device or in the host's memory, and its pass over a batch."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_distill import students
from lit_distill.batch import TaskBatch
from lit_distill.errors import UserError
from lit_distill.students import Pass, Student
from lit_distill.students.files import StudentFiles, read_config
from lit_distill.students.models import Dtype
from lit_distill.students.sharding import is_deferred
from lit_distill.teachers.store import is_store

_FROM_FORWARD = frozenset(
    ("inputs", "labels", "rows", "states", "project", "logits", "token_losses", "loss", "hidden", "encoder")
)
"""What a pass gives after its forward without further weights, but for those that are not offloaded."""


class FrozenModel:
    """A model in evaluation mode and without gradients, in its own precision and on its own device.

    Raises a ``UserError`` if it cannot be read, has another vocabulary than the student, or its device is not there.

    Args:
        name: a hub name, a folder, a run of this framework or one of its checkpoints.
        student: whose vocabulary it must have.
        dtype: of the weights.
        device: by default that of a pass's results.
        offload: keep the weight matrices in the host's memory, and on the device only during a forward; but for the
            output head, which losses apply chunk by chunk.
    """

    def __init__(self, name: str, student: Student, *, dtype: Dtype, device: str | None, offload: bool) -> None:
        check_device(device)
        check_run(name)
        self.device, self.offload = device, offload
        self.student = students.load(name, dtype=dtype, meta=is_deferred()).eval().requires_grad_(False)
        if difference := other_vocabulary(self.student.tokenizer, student.tokenizer):
            raise UserError(f"{name!r} has {difference}; distributions can only be compared over the same tokens")
        self._placed: torch.device | None = None
        self._waiting: list[Tensor] = []  # the offloaded weights

    def forward(self, batch: TaskBatch, results: torch.device) -> "FrozenPass":
        """The pass over a batch, with results on that device."""
        device = torch.device(self.device or results)
        # `to` walks over all parameters, and this is called in each micro-batch
        if self._placed != device:
            self._place(device)
        return FrozenPass(self, self.student(move_data_to_device(batch, device)), batch, device, results)

    def _place(self, device: torch.device) -> None:
        self._placed = device
        if not self.offload:
            self.student.to(device)
            return
        head = set(self.student.network.get_output_embeddings().parameters())
        # the norms are small, and used between forwards
        self._waiting = [one for one in self.student.parameters() if one.dim() > 1 and one not in head]
        waiting = [parameter.data.cpu() for parameter in self._waiting]
        self.student.to(device)
        for parameter, weight in zip(self._waiting, waiting, strict=True):
            # page-locked memory is copied without waiting
            parameter.data = weight.pin_memory() if device.type == "cuda" else weight

    @contextmanager
    def weights(self) -> Iterator[None]:
        """With the offloaded weights on the device."""
        waiting = [parameter.data for parameter in self._waiting]
        try:
            for parameter in self._waiting:
                parameter.data = parameter.data.to(self._placed, non_blocking=True)
            yield
        finally:
            for parameter, weight in zip(self._waiting, waiting, strict=True):
                parameter.data = weight


class FrozenPass:
    """A `Pass` of a frozen model: without gradients and autocast, with results on another device."""

    def __init__(
        self, model: FrozenModel, inner: Pass, batch: TaskBatch, device: torch.device, results: torch.device
    ) -> None:
        self.batch = batch
        self._model, self._inner, self._device, self._results = model, inner, device, results
        self._has_run = not model.offload

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self._freeze(getattr(self._inner, name), name)

    def _freeze(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def frozen(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = move_data_to_device((args, kwargs), self._device)
            with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                if not self._has_run and name != "project":
                    with self._model.weights():
                        # of any task: the forward is over all
                        self._inner.states(next(iter(self.batch)))
                    self._has_run = True
                with nullcontext() if name in _FROM_FORWARD else self._model.weights():
                    found = move_data_to_device(method(*args, **kwargs), self._results)
            return self._freeze(found, name) if callable(found) else found

        return frozen


@contextmanager
def about(who: str) -> Iterator[None]:
    """Let what is wrong with a model begin with ``who``, as it is no student."""
    try:
        yield
    except UserError as error:
        told = str(error).removeprefix("student: ").partition("; set from_scratch")[0]
        raise UserError(f"{who}: {told}") from error


def other_vocabulary(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> str:
    """How a teacher's vocabulary differs from the student's, with the first id that does; empty if it does not."""
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    if theirs == ours:
        return ""
    first = min(number for _, number in theirs.items() ^ ours.items())
    tokens = [next((repr(token) for token, number in own.items() if number == first), "none") for own in (theirs, ours)]
    sizes = f"another vocabulary ({len(theirs)} entries) than the student ({len(ours)})"
    return f"{sizes}: its token {first} is {tokens[0]}, the student's {tokens[1]}"


def check_run(name: str) -> None:
    """Raise a ``UserError`` for a run of this framework that has no model, or a folder of several runs."""
    folder = Path(name)
    if (folder / "student" / "config.json").is_file() or (folder / "config.json").is_file():
        return
    if (folder / "checkpoints").is_dir() or (folder / "config.yaml").is_file():
        found = max(folder.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
        instead = f"its newest checkpoint is {str(found)!r}" if found else "it has no checkpoint either"
        raise UserError(f"the run {name!r} has no whole model in student/, which fit writes at its end; {instead}")
    if runs := sorted(path.name for path in folder.glob("version_*") if path.is_dir()):
        raise UserError(f"{name!r} holds runs; name one of {', '.join(runs)} in it")


def check_place(name: str) -> None:
    """Raise a ``UserError`` for a path that holds no teacher. A name that may be one of the hub passes."""
    check_run(name)
    path = Path(StudentFiles(name).name)
    if path.exists():
        if not is_store(path):
            read_config(name)
        return
    # where runs are, and what is no USER/NAME
    if name.startswith("runs/") or path.suffix == ".ckpt" or not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):
        raise UserError(f"there is no {name!r} yet; train, capture or copy it first")


def check_device(device: str | None) -> None:
    """Raise a ``UserError`` if a device is not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device: {device!r} cannot be used here ({str(error).partition('.')[0]})") from error
