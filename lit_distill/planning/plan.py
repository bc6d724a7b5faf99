"""What a config's training needs, as it is and with each of the savings: memory by part, the batch that fits, time."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np
from jsonargparse import Namespace
from torch import nn

from lit_distill.batch import TaskBatch, target_tokens
from lit_distill.errors import UserError
from lit_distill.modules.base import DistillModule
from lit_distill.planning.machine import Machine
from lit_distill.planning.trace import STATIC, Traced, trace
from lit_distill.planning.trainer import SETTINGS
from lit_distill.students.seq2seq import Seq2SeqStudent

Strategy = Literal["one", "ddp", "fsdp"]

LARGEST = 1024
"""Rows of a micro-batch beyond which none is looked for."""

_ROWS = 10**5
"""Rows of an epoch that are looked at for its largest batch."""


@dataclass(frozen=True)
class Variant:
    """A config with changes."""

    name: str
    changes: Mapping[str, Any]  # keys of the config
    strategy: Strategy = "one"


AS_IT_IS = Variant("as it is", {})


@dataclass(frozen=True)
class Batch:
    """A batch of an epoch's."""

    tasks: TaskBatch
    size: int  # real tokens, or positions with padding where these are computed, too

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Real tokens of the sources and targets of all tasks."""
        tasks = self.tasks.values()
        source = sum(int(inputs["attention_mask"].sum()) for inputs in tasks)
        return {"source": source, "target": sum(map(target_tokens, tasks))}


@dataclass(frozen=True)
class Estimate:
    """What a variant needs on each device."""

    variant: Variant
    batch_size: int
    accumulate: int
    parts: Mapping[str, int]  # bytes at the peak of the epoch's largest batch
    flops: int  # operations of one optimizer step of median batches

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


class Planner:
    """Estimates for variants of one config.

    Args:
        config: the parsed config.
        build: makes a module of a config, without weights.
        data: the data module, set up for ``fit``.
        machine: what is planned for.
        devices: of DDP and FSDP.
    """

    def __init__(
        self, config: Namespace, build: Callable[[Namespace], DistillModule], data: Any, machine: Machine, devices: int
    ) -> None:
        self.config, self.data, self.machine, self.devices = config, data, machine, devices
        self._build = build
        self._batches: dict[tuple[int, bool], tuple[Batch, Batch]] = {}
        self._modules: dict[str, DistillModule] = {}
        self._traced: dict[tuple[str, bool, int], Traced] = {}

    @property
    def batch_size(self) -> int:
        """Rows of the config's micro-batch."""
        size: int = self.config["data"]["init_args"].get("batch_size") or self.data.batch_size
        return size

    @cached_property
    def module(self) -> DistillModule:
        """The module of the config as it is, without weights."""
        return self._build(self.config)

    def too_small(self) -> str | None:
        """That the weights alone, divided among the devices, need more than the memory; ``None`` if they do not."""
        weights, memory = _bytes(self.module.student) // self.devices, self.machine.memory
        if weights <= memory:
            return None
        there = f"{gib(weights)}{' a device' if self.devices > 1 else ''}, and there are {gib(memory)}"
        return f"the student's weights alone need {there}; take a smaller student"

    def variants(self) -> list[Variant]:
        """The config as it is, and each saving that it lacks and its method allows."""
        trainer, model = self.config["trainer"], self.config["model"]["init_args"]
        lora = {"model.init_args.adapter": {"r": 16, "alpha": 32}}
        bf16 = {"trainer.precision": "bf16-mixed"}
        again = {"model.init_args.activation_checkpointing": True}
        found = [AS_IT_IS]
        is_wide = "16" not in str(trainer["precision"]) and model.get("dtype", "float32") == "float32"
        if is_wide:
            found.append(Variant("bf16-mixed", bf16))
        if model.get("activation_checkpointing") is False:
            found.append(Variant("checkpointing", again))
        if self.batch_size >= 4:
            found.append(Variant("1/4 batch x 4", self.divided(4)))
        if model.get("optimizer") == "adamw" and not model.get("adapter"):
            found.append(Variant("adafactor", {"model.init_args.optimizer": "adafactor"}))
        if "adapter" in model and not model["adapter"]:
            found.append(Variant("LoRA", lora))
            if model.get("dtype") == "float32":
                found.append(Variant("LoRA, bfloat16", lora | {"model.init_args.dtype": "bfloat16"}))
        low = {**(bf16 if is_wide else {}), **(again if "activation_checkpointing" in model else {})}
        if low:
            found.append(Variant("bf16, checkp." if is_wide else "checkp.", low))
        if self.devices > 1:
            found += [Variant(f"DDP x {self.devices}", {}, "ddp"), Variant(f"FSDP x {self.devices}", {}, "fsdp")]
            found.append(Variant(f"FSDP x {self.devices}, low", low, "fsdp"))
        return found

    def divided(self, by: int) -> dict[str, Any]:
        """Changes for micro-batches of this share, of which as many more are accumulated."""
        accumulate = self.config["trainer"]["accumulate_grad_batches"]
        return {
            "data.init_args.batch_size": self.batch_size // by,
            "trainer.accumulate_grad_batches": accumulate * by,
        }

    def estimate(self, variant: Variant) -> Estimate:
        """What a variant needs, at its batch size."""
        config = self._changed(variant)
        size = self._size(variant)
        median, largest = self.batches(size, variant)
        traced, parts = self._trace(variant, largest)
        accumulate = config["trainer"]["accumulate_grad_batches"]
        return Estimate(variant, size, accumulate, parts, int(traced.flops * accumulate * median.size / largest.size))

    def needed(self, variant: Variant, batch: Batch) -> dict[str, int]:
        """Bytes of each part with another batch: what comes and goes in a step grows with its size."""
        own = self.batches(self._size(variant), variant)[1]
        traced, _ = self._trace(variant, own)
        return self._parts(traced.grown(batch.size / own.size), variant)

    def steps(self, variant: Variant) -> int | None:
        """Optimizer steps of the run; ``None`` if only its time is bounded."""
        config = self._changed(variant)
        trainer = config["trainer"]
        window = self._size(variant) * trainer["accumulate_grad_batches"]
        devices = 1 if variant.strategy == "one" else self.devices
        steps = [] if trainer["max_steps"] in (None, -1) else [trainer["max_steps"]]
        if trainer["max_epochs"] not in (None, -1):
            rows = len(self.data.train_dataloader().dataset)
            steps.append(-(-rows // (window * devices)) * trainer["max_epochs"])
        return min(steps, default=None)

    def _size(self, variant: Variant) -> int:
        size: int = self._changed(variant)["data"]["init_args"]["batch_size"]
        return size

    def largest(self, variant: Variant) -> int | None:
        """The largest micro-batch whose largest batch of an epoch fits the memory; ``None`` if none does."""
        sizes = range(1, min(LARGEST, len(self.data.train_dataloader().dataset)) + 1)

        def needed(size: int) -> int:
            return sum(self.needed(variant, self.batches(size, variant)[1]).values())

        return bisect_right(sizes, self.machine.memory, key=needed) or None

    def batches(self, size: int, variant: Variant) -> tuple[Batch, Batch]:
        """The median and the largest batch of the first epoch, of so many rows."""
        padded = not self._packs(variant)
        if (size, padded) not in self._batches:
            self._batches[size, padded] = _pick(self.data, size, padded=padded)
        return self._batches[size, padded]

    def _packs(self, variant: Variant) -> bool:
        student = self.module.student
        return variant.strategy != "fsdp" and isinstance(student, Seq2SeqStudent) and student.path != "plain"

    def _changed(self, variant: Variant) -> Namespace:
        config = self.config.clone()
        config["data"]["init_args"]["batch_size"] = self.batch_size
        for key, value in variant.changes.items():
            config[key] = value
        return config

    def _trace(self, variant: Variant, batch: Batch) -> tuple[Traced, dict[str, int]]:
        config, sharded = self._changed(variant), variant.strategy == "fsdp"
        changes = str(variant.changes)
        key = changes, sharded, id(batch)
        if key not in self._traced:
            # building takes as long as tracing
            if changes not in self._modules:
                self._modules[changes] = self._build(config) if variant.changes else self.module
            module, own, on_cpu = self._modules[changes], settings_of(config), self.machine.kind == "cpu"
            self._traced[key] = trace(module, self.data, batch.tasks, own, sharded=sharded, with_heap=on_cpu)
        traced = self._traced[key]
        return traced, self._parts(traced, variant)

    def _parts(self, traced: Traced, variant: Variant) -> dict[str, int]:
        """Bytes on one device, with what the strategy and the machine add."""
        strategy = variant.strategy

        def spread(tensors: Mapping[Any, int]) -> dict[str, int]:
            parts: dict[str, int] = dict(tensors)
            if strategy == "ddp":
                parts["buckets"] = gradients
            elif strategy == "fsdp":
                for part in ("weights", "gradients", "optimizer"):
                    parts[part] = parts.get(part, 0) // self.devices
                root, block = _units(self._modules[str(variant.changes)])
                # the root's weights and those of two blocks, and the gradient of the larger
                parts["unsharded"] = root + 2 * block + max(root, block)
            coming = sum(size for part, size in parts.items() if part not in (*STATIC, "buckets"))
            live = sum(tensors.values())
            return parts | self.machine.overhead(coming, live, traced.heap if strategy == "one" else None)

        gradients = max(parts.get("gradients", 0) for parts in traced.peaks.values())
        return max(map(spread, traced.peaks.values()), key=lambda parts: sum(parts.values()))


def settings_of(config: Namespace) -> dict[str, Any]:
    """The arguments of a config's trainer that memory and time depend on."""
    settings = {name: config["trainer"][name] for name in SETTINGS}
    if settings["precision"] in ("16-mixed", "16", 16):
        # of the same size, and known to the CPU
        settings["precision"] = "bf16-mixed"
    return settings


def gib(size: int) -> str:
    """A size in bytes, for a sentence."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def _units(module: DistillModule) -> tuple[int, int]:
    """Bytes of FSDP's root unit and of its largest block."""
    network = module.student.network
    names = network._no_split_modules or ()
    blocks = [_bytes(part) for part in network.modules() if type(part).__name__ in names]
    return _bytes(network) - sum(blocks), max(blocks, default=0)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _pick(data: Any, size: int, *, padded: bool) -> tuple[Batch, Batch]:
    """The median and the largest batch, by real tokens, or by positions with padding."""
    before = data.batch_size
    data.batch_size = size
    loader = data.train_dataloader()
    data.batch_size = before
    lengths = np.asarray(loader.dataset.lengths(evaluation=False))
    batches = list(islice(iter(loader.batch_sampler), -(-_ROWS // size)))
    if not batches:
        raise UserError("data: train has no rows")
    # without a smaller last batch, if there are others
    batches = [rows for rows in batches if len(rows) == len(batches[0])]

    def measure(rows: list[int]) -> int:
        own = lengths[np.asarray(rows) % len(lengths)]
        return int(len(own) * own.max() if padded else own.sum())

    batches.sort(key=measure)
    chosen = batches[len(batches) // 2], batches[-1]
    median, largest = (Batch(loader.collate_fn(loader.dataset.__getitems__(rows)), measure(rows)) for rows in chosen)
    return median, largest
