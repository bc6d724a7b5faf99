"""What every data module has: the tokens of the student that it is for, and how its batches are made."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from transformers import PreTrainedTokenizerBase

from lit_distill import checks
from lit_distill.batch import TaskBatch, remember_rows
from lit_distill.data.batches import collate
from lit_distill.data.tokenize import TokenRow
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.students import Tokens, load_tokenizer, load_tokens
from lit_distill.tasks import Row, Task

Tokenizer = str | Path | PreTrainedTokenizerBase | Tokens

# the logger that Lightning shows without set-up; a notice that were a `warnings.warn` would be a fault in strict runs
_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")


class StudentDataModule(pl.LightningDataModule):
    """Batches for a student.

    Args:
        tokenizer: the student's: a hub name, a folder, a tokenizer, or `Tokens`.
        batch_size: training examples per batch and device.
        eval_batch_size: evaluation examples per batch and device; ``batch_size`` by default.
        seed: of the order of training examples.
        num_workers: data loader processes per device; 0 loads in the main process.
    """

    name: str = ""  # name in ids, reports and the cache
    hub_name: str | None = None  # name on the Hugging Face hub, for model cards
    tasks: dict[str, Task]

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = checks.check_int("batch_size", batch_size, 1)
        eval_size = batch_size if eval_batch_size is None else eval_batch_size
        self.eval_batch_size = checks.check_int("eval_batch_size", eval_size, 1)
        self.seed = checks.check_int("seed", seed, 0, 2**32 - 1)
        self.num_workers = checks.check_int("num_workers", num_workers, 0, 256)
        if not isinstance(tokenizer, Tokenizer | None):
            raise UserError(f"tokenizer must be a hub name, a folder or a tokenizer object, got {tokenizer!r}")
        self._tokenizer = tokenizer
        self._notices: set[str] = set()

    def describe(self) -> dict[str, Any]:
        """Settings and counts of what was used, in plain values."""
        raise NotImplementedError

    def split_rows(self, split: Split) -> Sequence[Row] | None:
        """The rows of a split; ``None`` if it is absent, as each is of texts without labels."""
        return None

    def train_rows(self) -> int:
        """The number of rows that were trained on. Call it on all ranks."""
        raise NotImplementedError

    def tokens_per_row(self) -> float:
        """The mean number of source and target tokens of a training example."""
        raise NotImplementedError

    def warn(self, text: str) -> None:
        """Log a warning once."""
        if text not in self._notices:
            self._notices.add(text)
            rank_zero_only(_log.warning)(text if text.startswith("data_dir") else f"{self.name} {text}")

    @property
    def tokenizer_name(self) -> str | None:
        """The name or folder of the tokenizer that was given, if it has any."""
        given = self._tokenizer.tokenizer if isinstance(self._tokenizer, Tokens) else self._tokenizer
        return str(getattr(given, "name_or_path", given) or "") or None

    @property
    def tokens(self) -> Tokens:
        """The student's tokens, loaded at the first access. Raises a ``UserError`` if there is no usable tokenizer."""
        given = self._tokenizer
        if given is None:
            raise UserError("tokenizer must be given: a hub name, a folder or a tokenizer object")
        if isinstance(given, str | Path):
            name = given
            try:
                given = load_tokens(name)
            except UserError:  # a tokenizer without a model's configuration
                given = load_tokenizer(name)
        found = given if isinstance(given, Tokens) else Tokens(given)
        if found.tokenizer.eos_token_id is None or found.tokenizer.pad_token_id is None:
            name = found.tokenizer.name_or_path
            raise UserError(f"tokenizer: {name!r} needs a padding and an end-of-sequence token")
        self._tokenizer = found
        return found

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of `tokens`."""
        return self.tokens.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase | Tokens) -> None:
        self._tokenizer = tokenizer

    @property
    def rank_and_world(self) -> tuple[int, int]:
        """The number of this process, and of all processes that train together."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def stream_settings(self, buffer: int) -> dict[str, int]:
        """The arguments of a `Stream` that shuffles ``buffer`` rows at a time."""
        rank, world = self.rank_and_world
        settings = {"batch_size": self.batch_size, "buffer": buffer, "seed": self.seed, "rank": rank, "world": world}
        return settings | {"streams": max(self.num_workers, 1)}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        # reading its rows' lengths on the device would wait for it
        remember_rows(batch, moved)
        return moved

    def _collator(self, *, evaluation: bool) -> Callable[[Sequence[TokenRow]], TaskBatch]:
        """What makes a batch of rows, see `collate`."""
        if self.num_workers:
            # avoids a warning in each worker, which is forked after the tokenizer used threads
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        pad_token_id = int(self.tokenizer.pad_token_id)
        return partial(collate, tasks=tuple(self.tasks), pad_token_id=pad_token_id, evaluation=evaluation)
