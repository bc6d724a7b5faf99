"""Decoder-only students (Llama, Qwen2, GPT-2, ...): one sequence of prompt and target, with the loss on the target."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lit_distill.batch import IGNORE_INDEX, TaskBatch, pad_targets, sum_rows, take
from lit_distill.errors import UserError
from lit_distill.students.base import Likelihood, Pass, Student
from lit_distill.students.tokens import Tokens

_CHUNK_BYTES = 256 * 2**20
"""Maximum size of float32 logits in one chunk of the cross-entropy."""


@dataclass(frozen=True)
class _Joined:
    """The rows of all tasks, each prompt followed by its target, padded on the right."""

    input_ids: Tensor  # `(rows, length)`
    attention_mask: Tensor  # `(rows, length)`
    prompts: dict[str, tuple[Tensor, Tensor]]  # task -> row and column of each prompt token
    targets: dict[str, tuple[Tensor, Tensor]]
    """Task -> row and column of the position before each target token, which predicts it."""


def _join(batch: TaskBatch, pad: int, device: torch.device) -> _Joined:
    # a batch without rows becomes one unused row of padding
    lengths = [] if any(len(inputs["labels"]) for inputs in batch.values()) else [torch.ones(1, device=device).long()]
    pieces, prompts, targets, rows = [], {}, {}, 0
    for task, inputs in batch.items():
        source, target = inputs["attention_mask"].bool(), inputs["labels"] != IGNORE_INDEX
        # an empty source becomes one padding token, which predicts the first target token
        starts = source.sum(dim=1).clamp(min=1)
        source_row, target_row = source.nonzero()[:, 0] + rows, target.nonzero()[:, 0] + rows
        source_column = (source.cumsum(dim=1) - 1)[source]
        target_column = (starts[:, None] + target.cumsum(dim=1) - 1)[target]
        pieces += [
            (source_row, source_column, inputs["input_ids"][source]),
            (target_row, target_column, inputs["labels"][target]),
        ]
        prompts[task], targets[task] = (source_row, source_column), (target_row, target_column - 1)
        lengths.append(starts + target.sum(dim=1))
        rows += len(source)
    length = torch.cat(lengths)
    columns = torch.arange(int(length.max()), device=device)
    input_ids = torch.full((len(length), len(columns)), pad, device=device)
    for row, column, ids in pieces:
        input_ids[row, column] = ids
    return _Joined(input_ids, (columns < length[:, None]).long(), prompts, targets)


class CausalPass(Pass):
    """One forward over prompts and targets of all tasks.

    The output head is applied only at positions that predict a target token.
    """

    student: "CausalStudent"

    @cached_property
    def _joined(self) -> _Joined:
        return _join(self.batch, self.student.pad, self.student.device)

    @cached_property
    def _hidden(self) -> tuple[Tensor, ...]:
        """Hidden states ``(rows, length, d_model)``, embeddings first."""
        output = self.student.run(
            input_ids=self._joined.input_ids,
            attention_mask=self._joined.attention_mask,
            use_cache=False,
            output_hidden_states=True,
        )
        return (*output.hidden_states[:-1], output.last_hidden_state)

    def states(self, task: str) -> Tensor:
        """See `Pass.states`."""
        return self.hidden(task, -1)

    def project(self, states: Tensor) -> Tensor:
        """See `Pass.project`."""
        return self.student.project(states)

    def token_losses(self, task: str) -> Tensor:
        """See `Pass.token_losses`; large logits are computed in chunks, and again in the backward pass."""
        states, labels = self.states(task), self.labels(task)
        if task in self._logits:
            return F.cross_entropy(self._logits[task].float(), labels, reduction="none")
        size = max(1, _CHUNK_BYTES // (4 * self.student.network.config.get_text_config().vocab_size))
        if len(states) <= size or self.student.sharded:
            # ranks may have different numbers of chunks, and the head may be a collective
            return self._cross_entropy(states, labels)
        chunks = zip(states.split(size), labels.split(size), strict=True)
        return torch.cat([checkpoint(self._cross_entropy, *chunk, use_reentrant=False) for chunk in chunks])

    def _cross_entropy(self, states: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.project(states).float(), labels, reduction="none")

    def hidden(self, task: str, layer: int) -> Tensor:
        """See `Pass.hidden`; at the positions that predict the target tokens."""
        self.inputs(task)
        return self._hidden[layer][self._joined.targets[task]]

    def encoder(self, task: str, layer: int = -1) -> Tensor:
        """See `Pass.encoder`."""
        self.inputs(task)
        return self._hidden[layer][self._joined.prompts[task]]

    def _prompts(self, task: str, rows: Sequence[int]) -> tuple[Tensor, Tensor, int]:
        """These rows' sources, padded on the left."""
        inputs, chosen = self.inputs(task), torch.tensor(list(rows), device=self.student.device)
        source = inputs["attention_mask"][chosen].bool()
        lengths = source.sum(dim=1)
        columns = torch.arange(int(lengths.max().clamp(min=1)), device=source.device)
        mask = columns >= len(columns) - lengths[:, None]
        ids = torch.full_like(mask, self.student.pad, dtype=torch.long)
        ids[mask] = inputs["input_ids"][chosen][source]
        # an empty source becomes one padding token
        mask[:, -1] = True
        return ids, mask.long(), ids.shape[1]

    def likelihood(self, task: str) -> Likelihood:
        """Run a task's prompts, once each if the model can continue them, to score targets."""
        student, device = self.student, self.student.device
        if not student.continues:
            return partial(self._whole_likelihood, task)
        ids, mask, _ = self._prompts(task, range(len(self.inputs(task)["labels"])))
        read = student.run(input_ids=ids, attention_mask=mask, use_cache=True, **student.positions(mask))

        def score(rows: list[int], targets: list[list[int]]) -> Tensor:
            # without choices left, this rank runs a dummy row
            chosen = torch.tensor(rows or [0], device=device)
            labels = pad_targets(targets, student.pad, device)
            if student.sharded:
                # so that each rank makes the second forward
                labels = F.pad(labels, (0, 1), value=IGNORE_INDEX)
            real, states = labels != IGNORE_INDEX, read.last_hidden_state[chosen, -1:]
            if labels.shape[1] > 1:
                # the last token predicts nothing
                known = real[:, :-1]
                whole = torch.cat([mask[chosen], known.long()], dim=1)
                cache = copy.copy(read.past_key_values)
                cache.layers = [copy.copy(layer) for layer in cache.layers]
                cache.batch_select_indices(chosen)
                later = student.run(
                    input_ids=labels[:, :-1].where(known, student.pad),
                    attention_mask=whole,
                    past_key_values=cache,
                    use_cache=True,
                    **{name: value[:, ids.shape[1] :] for name, value in student.positions(whole).items()},
                )
                states = torch.cat([states, later.last_hidden_state], dim=1)
            losses = self._cross_entropy(states[real], labels[real])
            return -sum_rows(losses, real.nonzero()[:, 0], len(labels))[: len(rows)]

        return score

    def _whole_likelihood(self, task: str, rows: list[int], targets: list[list[int]]) -> Tensor:
        """Log-likelihoods by a forward over prompts and targets."""
        inputs = take(self.inputs(task), rows or [0])
        inputs["labels"] = pad_targets(targets, self.student.pad, self.student.device)
        whole = CausalPass(self.student, {task: inputs})
        losses = whole.token_losses(task)
        return -sum_rows(losses, whole.rows(task), len(inputs["labels"]))[: len(rows)]


class CausalStudent(Student):
    """A decoder-only model.

    Args:
        model: an ``AutoModelForCausalLM``, or PEFT's wrapper around one.
        tokens: its tokens.
        compile: train through a compiled forward.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tokens, *, compile: bool = False) -> None:
        super().__init__()
        self.model = model
        self.tokens = tokens
        self.compiles = compile
        self.pad = cast(int, tokens.tokenizer.pad_token_id)
        generation = self.network.generation_config
        # replaces the pretrained model's own settings: generation depends on our arguments alone
        generation = type(generation)(pad_token_id=self.pad, eos_token_id=tokens.tokenizer.eos_token_id)
        self.network.generation_config = generation
        text = self.network.config.get_text_config()
        self.most_positions = getattr(text, "max_position_embeddings", None) or self.most_positions

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def continues(self) -> bool:
        """Whether the model caches keys and values only, which can be continued row by row (Mamba's state cannot)."""
        cached = "past_key_values" in inspect.signature(self.network.forward).parameters
        return cached and not self.network._is_stateful

    def forward(self, batch: TaskBatch) -> CausalPass:
        """The lazy pass over a batch."""
        return CausalPass(self, batch)

    def run(self, **inputs: Any) -> Any:
        """The model without its output head; refuses more positions than it has."""
        if (length := inputs["attention_mask"].shape[1]) > self.most_positions:
            raise UserError(
                f"student: a prompt and its target have {length} tokens, the model has {self.most_positions} positions;"
                " lower data.max_source_length or data.max_target_length"
            )
        return self.training_forward(self.network.base_model)(**inputs, return_dict=True)

    def positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Position ids of left-padded sequences, for models that take them."""
        if "position_ids" not in inspect.signature(self.network.base_model.forward).parameters:
            return {}
        return {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}

    def project(self, states: Tensor) -> Tensor:
        """Logits ``(n, vocabulary)`` of states ``(n, d_model)``, scaled and capped as configured."""
        logits: Tensor = self.network.get_output_embeddings()(states)
        config = self.network.config.get_text_config()
        # of Cohere, Granite and Gemma 2
        scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
        if scale != 1:
            logits = logits * scale
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits
