"""How fast does lit_distill train, beside the published recipe on `Seq2SeqTrainer`?

    python benchmarks/train_throughput.py --data_dir data --student google/t5-v1_1-small --batch_size 16

Trains the same student on the same examples with the one and with the other, each in a process of its own, as a user
runs it, in turn. Compares the seconds of optimizer steps: first on shuffled batches, the same for both sides, which
also give the peak memory, then on batches of rows of like length, where each side makes its own batches of the same
examples, the recipe by the `group_by_length` sampling of its trainer. On CUDA the recipe runs in both float32 and
bfloat16. The last line is a JSON object; `ratio` is the one of shuffled batches in equal precision. Exits with 0 also
where a goal is missed.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from measure import Memory, rotated, spread
from operations import NOTHING, Batches, Content, Lengths, tokens_a_batch, training_flops
from options import SIDES, Settings, contenders, make_parser, one_line_errors, read_settings
from report import (
    Figures,
    Goal,
    is_goal_setting,
    print_ceiling,
    print_figures,
    print_goals,
    print_head,
    print_json,
    print_memory,
    print_notes,
    print_ratios,
)
from workers import Worker, running

GOALS = {16: 2.2, 64: 2.5}
"""Batch size -> the ratio that is aimed at."""
MEMORY_GOAL = 0.6
"""The share of the recipe's peak memory that is aimed at, at batch 64."""

KINDS = {"shuffled": "", "length-grouped": "_length_grouped"}
"""Kind of batches -> the ending of the names of its figures, in the order in which they are measured."""


@dataclass
class Blocks:
    """A contender's blocks of one kind of batches."""

    side: str
    lengths: list[list[Lengths]]
    """Of each block's rows."""
    content: list[Content]
    seconds: list[float]
    memory: Memory | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``argv`` are its arguments, by default the process's."""
    parser = make_parser(
        "train_throughput",
        __doc__,
        batch_size=16,
        steps="optimizer steps of a measurement; default: 32 examples' worth, 20 on CUDA",
    )
    arguments = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        settings = read_settings(arguments, lambda size, device: 20 if device == "cuda" else max(1, 32 // size))
        with tempfile.TemporaryDirectory() as folder:
            sides = {
                name: ("training:train_side", settings, side, precision, folder)
                for name, (side, precision) in contenders(settings).items()
            }
            with running(sides | {"ceiling": ("ceiling:ceiling_process", settings, True)}) as workers:
                run(workers, settings, peak_tflops=arguments.peak_tflops)


def run(workers: Mapping[str, Worker], settings: Settings, *, peak_tflops: float | None) -> None:
    """Measure, and print."""
    started = time.perf_counter()
    names = list(contenders(settings))
    ready = prepared(workers, names)
    first = ready["recipe"]
    print_head(
        settings,
        first["machine"],
        f"{settings.pairs} pairs of {settings.steps} optimizer step(s), after {settings.warmup} that do not count, "
        f"seed {settings.seed}",
    )
    every = [row for block in first["lengths"][: settings.pairs] for row in block]
    workers["ceiling"].tell((first["shape"], tokens_a_batch(every, settings.pairs * settings.steps)))
    ceilings = [workers["ceiling"].answer()]
    warm = {name: workers[name].ask() for name in names}
    notes = print_notes(warm)

    measured: dict[str, Blocks] = {}
    for number, (kind, ending) in enumerate(KINDS.items()):
        part = slice(number * settings.pairs, (number + 1) * settings.pairs)
        for name in names:
            own = ready[name]
            measured[name + ending] = Blocks(
                contenders(settings)[name][0], own["lengths"][part], own["content"][part], []
            )
        for pair in range(settings.pairs):
            for name in rotated(names, pair):
                done = workers[name].ask()
                blocks = measured[name + ending]
                blocks.seconds.append(done["seconds"])
                # a peak never falls again: what shuffled batches need is known before there are others
                blocks.memory = done["memory"] if kind == "shuffled" and name in SIDES else None
            ceilings.append(workers["ceiling"].ask())
            told = ", ".join(f"{name} {measured[name + ending].seconds[-1] / settings.steps:.3f}" for name in names)
            print(f"{kind:<14} pair {pair + 1:2d}, seconds a step: {told}", flush=True)

    for name in names:
        # whether training ended as it should have
        workers[name].ask()

    ceiling = statistics.median(ceilings)
    flops = {name: [training_flops(first["shape"], own) for own in b.lengths] for name, b in measured.items()}
    figures = {
        name: figures_of(blocks, flops[name], settings.steps, ceiling, peak_tflops) for name, blocks in measured.items()
    }
    ratios = {
        "ratio" + name.removeprefix("recipe"): spread(
            [a / b for a, b in zip(blocks.seconds, measured["lit_distill" + ending].seconds, strict=True)]
        )
        for ending in KINDS.values()
        for name, blocks in measured.items()
        if blocks.side == "recipe" and name.endswith("_length_grouped") == bool(ending)
    }
    recipe = measured["recipe"]
    at_ceiling = statistics.median(
        own * ceiling / need for need, own in zip(flops["recipe"], recipe.seconds, strict=True)
    )

    print_figures(figures)
    print_memory(figures)
    print_ratios(ratios)
    print_ceiling(ceiling, at_ceiling, "a step")
    goals: list[Goal] = []
    if is_goal_setting(settings, first["shape"]) and settings.batch_size in GOALS:
        goals.append(Goal("ratio of training", ratios["ratio"]["median"], GOALS[settings.batch_size]))
        if settings.batch_size == 64:
            share = _growth(measured["lit_distill"]) / _growth(recipe)
            goals.append(Goal("peak memory beside the recipe's", share, MEMORY_GOAL, at_most=True))
    print_goals(goals)
    print(f"{time.perf_counter() - started:.0f} s in all")
    print_json(
        "train_throughput",
        settings,
        first["machine"],
        ratios,
        figures,
        goals,
        ceiling={"gflops": ceiling / 1e9, "ratio": at_ceiling},
        seconds={name: blocks.seconds for name, blocks in measured.items()},
        same_examples=all(
            _rows(a) == _rows(b) for a, b in zip(first["grouped"], ready["lit_distill"]["grouped"], strict=True)
        ),
        notes=notes,
    )


def prepared(workers: Mapping[str, Worker], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each side is about to do; lit_distill makes its batches of the rows of the recipe's.

    Raises:
        RuntimeError: they are about to train on different batches where they should not.
    """
    ready = {name: workers[name].answer() for name in names if name != "lit_distill"}
    ready["lit_distill"] = workers["lit_distill"].ask(ready["recipe"]["grouped"])
    if any(own["shuffled"] != ready["recipe"]["shuffled"] for own in ready.values()):
        raise RuntimeError("the sides' shuffled batches differ")
    return ready


def figures_of(blocks: Blocks, flops: Sequence[int], steps: int, ceiling: float, peak_tflops: float | None) -> Figures:
    """A contender's figures.

    Args:
        blocks: what it did.
        flops: the operations that each block needs.
        steps: the optimizer steps of a block.
        ceiling: operations a second of matrix products.
        peak_tflops: what the device's maker states.
    """
    held, seconds = blocks.content, blocks.seconds
    rate = statistics.median(need / own for need, own in zip(flops, seconds, strict=True))
    return Figures(
        examples_per_second=statistics.median(c.examples / own for c, own in zip(held, seconds, strict=True)),
        tokens_per_second=statistics.median(c.real / own for c, own in zip(held, seconds, strict=True)),
        seconds_per_step=statistics.median(own / steps for own in seconds),
        padding=sum(held, NOTHING).padding,
        share_of_ceiling=rate / ceiling,
        share_of_peak=None if peak_tflops is None else rate / (peak_tflops * 1e12),
        memory=blocks.memory,
    )


def _growth(blocks: Blocks) -> float:
    assert blocks.memory is not None  # noqa: S101 - for the type checker
    return blocks.memory["growth"]


def _rows(block: Batches) -> list[int]:
    return sorted(row for batch in block for row in batch)


if __name__ == "__main__":
    main()
