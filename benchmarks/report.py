"""The table, the goals and the JSON line of a benchmark."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure import Memory, Spread
from operations import Shape
from options import Settings

PACKAGES = ("torch", "transformers", "accelerate", "lightning")


@dataclass(frozen=True)
class Figures:
    """One side's figures."""

    examples_per_second: float
    tokens_per_second: float
    """Source and target tokens, padding left out."""
    seconds_per_step: float
    padding: float
    """The share of positions that are padding."""
    share_of_ceiling: float
    """Operations that are needed without padding, a second, as a share of what matrix products alone reach."""
    share_of_peak: float | None = None
    """Likewise of what the device's maker states."""
    memory: Memory | None = None
    """Where it was measured."""


@dataclass(frozen=True)
class Goal:
    """What a figure should be."""

    name: str
    value: float
    goal: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.value <= self.goal if self.at_most else self.value >= self.goal


def is_goal_setting(settings: Settings, shape: Shape) -> bool:
    """Whether goals were set for this: T5-v1.1-small on CommonsenseQA on a CPU, in float32."""
    size = (shape.d_model, shape.d_ff, shape.num_layers, shape.num_heads, shape.vocab_size)
    student = size == (512, 1024, 8, 6, 32128)
    return student and settings.dataset == "cqa" and settings.device == "cpu" and settings.precision == "32"


def machine(device: str) -> dict[str, Any]:
    """What this process runs on."""
    # the process that reports has no use for it
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    found: dict[str, Any] = {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found | {package: version(package) for package in PACKAGES}


def print_head(settings: Settings, on: Mapping[str, Any], what: str) -> None:
    """The machine and the setting."""
    where = f"{on['cpu']}, {on['cores']} cores, {on['threads']} threads"
    print(f"machine  {where}{'; ' + on['gpu'] if 'gpu' in on else ''}")
    print("versions " + ", ".join(f"{name} {on[name]}" for name in PACKAGES))
    student = f"{Path(settings.student).name}{' (random weights)' if settings.from_scratch else ''}"
    precision = {"32": "float32", "bf16": "bfloat16"}[settings.precision]
    print(f"setting  {settings.dataset}, {student}, batch {settings.batch_size}, {precision} on {settings.device}")
    print(f"measured {what}", flush=True)


def print_notes(answers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the sides have to say beside figures, printed and returned."""
    notes = [f"{name}: {note}" for name, own in answers.items() for note in own["notes"]]
    for note in notes:
        print(f"note     {note}", flush=True)
    return notes


def print_figures(figures: Mapping[str, Figures]) -> None:
    """One row a side."""
    print(f"\n{'':<26}{'s/batch':>8}{'examples/s':>11}{'tokens/s':>9}{'padding':>8}{'ceiling':>8}{'peak MiB':>9}")
    for name, own in figures.items():
        memory = "-" if own.memory is None else f"{own.memory['growth']:.0f}"
        print(
            f"{name:<26}{own.seconds_per_step:8.3f}{own.examples_per_second:11.2f}{own.tokens_per_second:9.0f}"
            f"{own.padding:8.1%}{own.share_of_ceiling:8.1%}{memory:>9}"
        )
    peaks = {name: own.share_of_peak for name, own in figures.items() if own.share_of_peak is not None}
    if peaks:
        print("of the stated peak: " + ", ".join(f"{name} {share:.1%}" for name, share in peaks.items()))


def print_memory(figures: Mapping[str, Figures]) -> None:
    """How the peaks are to be read."""
    print("\npeak MiB: growth since before the student was built, with whatever the trainer adds")
    for name, own in figures.items():
        if own.memory is not None:
            peak, before = own.memory["peak"], own.memory["before"]
            print(f"  {name:<24}{peak:6.0f} in all, of which {before:.0f} before the student was built")


def print_ratios(ratios: Mapping[str, Spread]) -> None:
    """One row a ratio."""
    print("\nratio: the recipe's seconds over lit_distill's, on the same examples")
    for name, own in ratios.items():
        print(f"  {name:<24}{own['median']:6.2f} ({own['min']:.2f} to {own['max']:.2f} over {own['pairs']} pairs)")


def print_ceiling(ceiling: float, ratio: float, what: str) -> None:
    """What the ceiling is, and what it leaves.

    Args:
        ceiling: operations a second.
        ratio: the recipe's seconds over those at the ceiling.
        what: a step, or an evaluation.
    """
    print(f"\nceiling: {ceiling / 1e9:.0f} GFLOP/s, in the student's own matrix products; with nothing but those")
    print(f"that its tokens need, {what} would take 1/{ratio:.2f} of the recipe's time")


def print_goals(goals: Sequence[Goal]) -> None:
    """Each goal, met or missed."""
    print()
    for goal in goals:
        wanted = f"{goal.goal:g} or {'less' if goal.at_most else 'more'}"
        print(f"goal {'met' if goal.met else 'MISSED'}: {goal.name} {goal.value:.2f} ({wanted})")
    if not goals:
        print("no goal was set for this setting")


def print_json(
    name: str,
    settings: Settings,
    on: Mapping[str, Any],
    ratios: Mapping[str, Spread],
    figures: Mapping[str, Figures],
    goals: Sequence[Goal],
    **others: Any,
) -> None:
    """All of it as the last line."""
    content = {
        "benchmark": name,
        "settings": asdict(settings),
        "machine": dict(on),
        **ratios,
        **{side: asdict(own) for side, own in figures.items()},
        **others,
        "goals": [asdict(goal) | {"met": goal.met} for goal in goals],
    }
    print(json.dumps(content), flush=True)
