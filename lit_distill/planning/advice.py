"""What to do about a run that does not fit the memory, by its plan."""

from collections.abc import Iterator

from lit_distill.planning.plan import AS_IT_IS, Planner, Variant, gib

_MARGIN = 0.9
"""Share of the memory that a setting may need to be named: an estimate is within about 15 %."""

_CHECKPOINTING = "model.activation_checkpointing true"


def advice(planner: Planner) -> str:
    """The part that does not fit, and a setting that would."""
    memory = planner.machine.memory
    parts = planner.estimate(AS_IT_IS).parts
    there = f"{gib(memory)} of memory"
    if (told := planner.too_small()) is not None:
        return told
    needed, largest = sum(parts.values()), max(parts, key=lambda part: parts[part])
    told = f"by its plan the run needs {gib(needed)}, of which {largest} {gib(parts[largest])}, and there are {there}"
    if needed <= memory:
        told += ", so something else takes memory, too"
        memory = min(memory, needed)
    for variant in _savings(planner):
        total = planner.estimate(variant).total
        if total <= _MARGIN * memory:
            return f"{told}; {variant.name} would fit, with {gib(total)}"
    return f"{told}; no setting here makes it fit: take a smaller student, or FSDP over several devices"


def _savings(planner: Planner) -> Iterator[Variant]:
    """Settings from the mildest on; the mathematics of the first ones is the run's own."""
    named = {variant.name: variant.changes for variant in planner.variants()}
    size, accumulate = planner.batch_size, planner.config["trainer"]["accumulate_grad_batches"]
    divisors = [by for by in range(2, size + 1) if size % by == 0 and (by & (by - 1) == 0 or by == size)]
    smaller = {
        f"data.batch_size {size // by} with trainer.accumulate_grad_batches {accumulate * by}": planner.divided(by)
        for by in divisors
    }
    checkpointing = {_CHECKPOINTING: named["checkpointing"]} if "checkpointing" in named else {}
    for name, changes in (smaller | checkpointing).items():
        yield Variant(name, changes)
    # with the smallest micro-batch, if the batch can be divided
    least = [(f"{name}, ", changes) for name, changes in list(smaller.items())[-1:]] or [("", {})]
    before, base = least[0]
    for name, keys in (
        (_CHECKPOINTING, ["checkpointing"]),
        (f"{_CHECKPOINTING} and trainer.precision bf16-mixed", ["checkpointing", "bf16-mixed"]),
        ("model.optimizer adafactor", ["adafactor"]),
        ("model.adapter.r 16 (LoRA)", ["LoRA"]),
        ("model.adapter.r 16 (LoRA) and model.dtype bfloat16", ["LoRA, bfloat16"]),
    ):
        if all(key in named for key in keys):
            both = {name: value for key in keys for name, value in named[key].items()}
            yield Variant(before + name, {**base, **both})
