"""Decoder-only students (Llama, Qwen2, GPT-2, ...): one sequence of prompt and target, with the loss on the target."""

import inspect
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel

from lit_distill.batch import IGNORE_INDEX, TaskBatch, TaskInputs, join, pad_targets, sum_rows, take
from lit_distill.errors import UserError
from lit_distill.students.attention import Attention, Call, recording
from lit_distill.students.base import Pass, Stack, Stepper, Student
from lit_distill.students.tokens import Tokens

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
"""Names of the norm after the last layer, beside the list of layers."""

_CHUNK_BYTES = 256 * 2**20
"""Maximum size of float32 logits in one chunk of the cross-entropy."""


class CausalStudent(Student):
    """A decoder-only model."""

    attentions = ("decoder",)

    def __init__(self, model: PreTrainedModel, tokens: Tokens) -> None:
        pad, end = tokens.tokenizer.pad_token_id, tokens.tokenizer.eos_token_id
        super().__init__(model, tokens, GenerationConfig(pad_token_id=pad, eos_token_id=end))
        self.text_config: Any = self.network.config.get_text_config()
        self.most_positions = getattr(self.text_config, "max_position_embeddings", None) or self.most_positions

    @property
    def caches(self) -> bool:
        """Whether a prompt's cache can be continued row by row, which Mamba's state cannot."""
        network: Any = self.network
        return "past_key_values" in inspect.signature(network.forward).parameters and not network._is_stateful

    def layers(self, stack: Stack) -> int:
        layers: int = self.text_config.num_hidden_layers
        return layers

    def forward(self, batch: TaskBatch) -> "CausalPass":
        return CausalPass(self, batch)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """See `Student.final_norm`. Raises a ``UserError`` for a model with another structure."""
        stack, _ = self._decoder_layers()
        normed: Tensor = next(norm for name, norm in stack.named_children() if name in _FINAL_NORMS)(hidden)
        return normed

    def _decoder_layers(self) -> tuple[nn.Module, str]:
        for stack in self.network.base_model.modules():
            # those with a state, as Mamba, number their hidden states otherwise
            if self.network._is_stateful or not any(name in _FINAL_NORMS for name, _ in stack.named_children()):
                continue
            for name, layers in stack.named_children():
                if isinstance(layers, nn.ModuleList) and len(layers) == self.layers("decoder"):
                    return stack, name
        raise UserError(f"student: found no list of layers beside a final norm in a {type(self.network).__name__}")


class CausalPass(Pass):
    """One forward over prompts and targets of all tasks.

    The output head is applied only at positions that predict a target token.
    """

    student: CausalStudent

    @cached_property
    def _sequences(self) -> TaskInputs:
        """The rows of all tasks, each prompt followed by its target; the prompts' labels are ``IGNORE_INDEX``."""
        return join([self._sequence(inputs) for inputs in self._with_rows()])

    def _sequence(self, inputs: TaskInputs) -> TaskInputs:
        ids, source = self._sources(inputs)
        target = inputs["labels"] != IGNORE_INDEX
        real = torch.cat([source, target], dim=1)
        # real tokens first, in their order
        order = real.int().argsort(dim=1, descending=True, stable=True)[:, : int(real.sum(dim=1).max())]
        return {
            "input_ids": torch.cat([ids, inputs["labels"].clamp(min=0)], dim=1).gather(1, order),
            "attention_mask": real.gather(1, order).long(),
            "labels": torch.cat([torch.full_like(ids, IGNORE_INDEX), inputs["labels"]], dim=1).gather(1, order),
        }

    def _sources(self, inputs: TaskInputs) -> tuple[Tensor, Tensor]:
        """Source ids and which are real, ``(rows, source_len)``; an empty source becomes one padding token."""
        real, pad = inputs["attention_mask"].bool(), self.student.tokenizer.pad_token_id
        ids = F.pad(inputs["input_ids"].where(real, pad), (1, 0), value=pad)
        return ids, torch.cat([~real.any(dim=1, keepdim=True), real], dim=1)

    @cached_property
    def _forward(self) -> tuple[tuple[Tensor, ...], list[Call]]:
        """Hidden states ``(rows, length, d_model)``, embeddings first, and each layer's attention."""
        ids, mask = self._sequences["input_ids"], self._sequences["attention_mask"]
        with recording() as calls:
            output = self._run(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        return (*output.hidden_states[:-1], output.last_hidden_state), calls

    def _run(self, **inputs: Any) -> Any:
        """The model without its output head; refuses more positions than it has."""
        length, most = int(inputs["attention_mask"].sum(dim=1).max()), self.student.most_positions
        if length > most:
            raise UserError(
                f"student: a prompt and its target have {length} tokens, the model has {most} positions;"
                " lower data.max_source_length or data.max_target_length, or of a corpus data.max_length"
            )
        return self.student.network.base_model(**inputs, return_dict=True)

    def hidden(self, task: str, layer: int) -> Tensor:
        """At the positions that predict the target tokens."""
        labels = self._sequences["labels"][self._own_rows(task)]
        return self._own(task, self._forward[0][layer][:, :-1], labels[:, 1:] != IGNORE_INDEX)

    def pairs(self, task: str, kind: Attention) -> Tensor:
        real = self._sequences["attention_mask"][self._own_rows(task)] != 0
        return (real[:, :, None] & real[:, None]).tril()

    def _call(self, layer: int, kind: Attention) -> Call:
        _, calls = self._forward
        if not calls:
            return super()._call(layer, kind)
        if len(calls) != (layers := self.student.layers("decoder")):
            raise UserError(
                f"student: no attention scores: {len(calls)} of its {layers} layers have PyTorch's attention"
            )
        return calls[layer - 1]

    def encoder(self, task: str, layer: int = -1) -> Tensor:
        lengths = self.inputs(task)["attention_mask"].sum(dim=1, keepdim=True)
        states = self._forward[0][layer]
        return self._own(task, states, torch.arange(states.shape[1], device=states.device) < lengths)

    def project(self, states: Tensor) -> Tensor:
        """Scaled and capped as configured."""
        logits, config = super().project(states), self.student.text_config
        # of Cohere, Granite and Gemma 2
        scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
        if scale != 1:
            logits = logits * scale
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def token_losses(self, task: str) -> Tensor:
        """Large logits are computed in chunks, and again in the backward pass."""
        if task in self._logits:
            return super().token_losses(task)
        states, labels = self.states(task), self.labels(task)
        size = max(1, _CHUNK_BYTES // (4 * self.student.text_config.vocab_size))
        if len(states) <= size or self.student.sharded:
            # ranks may have different numbers of chunks, and the head may be a collective
            return self._cross_entropy(states, labels)
        chunks = zip(states.split(size), labels.split(size), strict=True)
        return torch.cat([checkpoint(self._cross_entropy, *chunk, use_reentrant=False) for chunk in chunks])

    def _cross_entropy(self, states: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.project(states).float(), labels, reduction="none")

    def _prompts(self, inputs: TaskInputs) -> tuple[Tensor, Tensor, int]:
        """Padded on the left."""
        ids, real = self._sources(inputs)
        width = int(real.sum(dim=1).max())
        # real tokens last, in their order
        order = real.int().argsort(dim=1, stable=True)[:, -width:]
        return ids.gather(1, order), real.gather(1, order).long(), width

    def stepper(self, task: str) -> Stepper:
        if not self.student.caches:
            raise UserError(f"student: a {self.student.text_config.model_type} cannot be decoded one token at a time")
        prompts, mask, _ = self._prompts(self.inputs(task))
        cache: Any = None

        def step(ids: Tensor | None) -> Tensor:
            nonlocal mask, cache
            new = prompts if ids is None else ids[:, None]
            if ids is not None:
                mask = F.pad(mask, (0, 1), value=1)
            positions = {name: each[:, -new.shape[1] :] for name, each in self._positions(mask).items()}
            output = self._run(input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True, **positions)
            cache = output.past_key_values
            return self.project(output.last_hidden_state[:, -1])

        return step

    def _likelihoods(self, task: str, rows: list[int], targets: list[list[int]]) -> Tensor:
        """Each prompt is read once, if its cache can be continued row by row."""
        student, distinct = self.student, sorted(set(rows))
        if student.sharded or not student.caches:
            return super()._likelihoods(task, rows, targets)
        ids, mask, width = self._prompts(take(self.inputs(task), distinct))
        read = self._run(input_ids=ids, attention_mask=mask, use_cache=True, **self._positions(mask))
        own = torch.tensor([distinct.index(row) for row in rows], device=ids.device)
        read.past_key_values.batch_select_indices(own)
        labels = pad_targets(targets, ids.device)
        real = labels != IGNORE_INDEX
        whole = torch.cat([mask[own], real.long()], dim=1)
        continued = self._run(
            input_ids=labels.clamp(min=0),
            attention_mask=whole,
            past_key_values=read.past_key_values,
            use_cache=True,
            **{name: positions[:, width:] for name, positions in self._positions(whole).items()},
        )
        # each state predicts the next token
        states = torch.cat([read.last_hidden_state[own, -1:], continued.last_hidden_state[:, :-1]], dim=1)
        losses = self._cross_entropy(states[real], labels[real])
        return -sum_rows(losses, real.nonzero()[:, 0], len(rows))

    def _positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Position ids of left-padded sequences, for models that take them."""
        if "position_ids" not in inspect.signature(self.student.network.base_model.forward).parameters:
            return {}
        return {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
