"""A student that an engine runs, in place of a module's own, to predict."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from lit_distill.batch import TaskBatch
from lit_distill.errors import UserError
from lit_distill.exporting.engine import Engine
from lit_distill.modules.base import DistillModule
from lit_distill.students import ProcessLogits, Student, Tokens


class EngineStudent(nn.Module):
    """What a module reads of a `Student` in order to predict; it has no parameters and cannot train."""

    def __init__(self, engine: Engine, config: Any) -> None:
        super().__init__()
        self.engine = engine
        self.tokens: Tokens = engine.tokens
        self.model = SimpleNamespace(config=config)
        self.sharded = self.losses_only = False
        self.device = torch.device("cpu")

    def forward(self, batch: TaskBatch) -> "EnginePass":
        """The lazy pass over a batch."""
        return EnginePass(self.engine, batch)


class EnginePass:
    """Texts and scores of a batch; see `Pass`."""

    def __init__(self, engine: Engine, batch: TaskBatch) -> None:
        self.engine, self.batch = engine, batch

    def _sources(self, task: str) -> list[list[int]]:
        inputs = self.batch[task]
        pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        return [ids[mask != 0].tolist() for ids, mask in pairs]

    def generate(
        self,
        task: str,
        *,
        rows: Sequence[int] | None = None,
        process_logits: ProcessLogits | None = None,
        **settings: int,
    ) -> list[list[int]]:
        """See `Pass.generate`; settings are `Engine.generate`'s. Raises a ``UserError`` for ``process_logits``."""
        if process_logits is not None:
            raise UserError("engine: ctranslate2 cannot run a method with process_logits or a vote; use transformers")
        sources = self._sources(task)
        chosen = sources if rows is None else [sources[row] for row in rows]
        return self.engine.generate(chosen, **settings)

    def score(self, task: str, choices: Sequence[tuple[str, ...]]) -> list[list[float]]:
        """See `Pass.score`."""
        sources = [source for source, own in zip(self._sources(task), choices, strict=True) for _ in own]
        targets = self.engine.tokens.targets([choice for own in choices for choice in own], max_length=10**9).ids
        scores = iter(self.engine.score(sources, targets))
        return [[next(scores) for _ in own] for own in choices]


def run_on(engine: Engine, module: DistillModule) -> None:
    """Let an engine predict for a module, which was built without weights."""
    if module.vote is not None:
        raise UserError("engine: ctranslate2 does not sample the texts of model.vote; set model.vote to null")
    module.student = cast(Student, EngineStudent(engine, module.student.network.config))
