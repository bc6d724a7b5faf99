"""What does an objective cost? An overlay of `configs/method` beside plain step-by-step training.

    python benchmarks/objective_cost.py --data_dir data --student google/t5-v1_1-small kl jsd kl=stores/cqa

Each argument is an overlay, by its name under `configs/method` or its path, which learns from a teacher of the
student's size, or from the one after `=`: a run, a folder, a hub name or captured distributions. Each overlay and the
plain method run `lit_distill fit` in a process of their own, one optimizer step in turn on the same batches. The ratio
is the overlay's seconds over the plain step's of the same pair, also of CPU time, which says more on a busy machine;
memory is the most that a process held, above what it held before it built anything. The last line is a JSON object.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from measure import rotated, spread
from options import one_line_errors, with_weights
from workers import running

from lit_distill.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
WARMUP = 2
"""Steps that do not count; the second is the first with the optimizer's state."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``argv`` are its arguments, by default the process's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overlays", nargs="+", metavar="OVERLAY[=TEACHER]")
    parser.add_argument("--dataset", default="cqa")
    parser.add_argument("--data_dir", default="data", help="folder that holds the datasets' folders")
    parser.add_argument("--student", default="google/t5-v1_1-small", help="also the teacher where none is named")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, help="threads of PyTorch on CPU; default: PyTorch's own")
    parser.add_argument("--more", nargs="*", default=[], help="further arguments of both sides' fit, without --")
    given = parser.parse_args(argv)
    with one_line_errors("objective_cost"), tempfile.TemporaryDirectory() as folder:
        student = with_weights(given.student, folder)
        base = [
            f"--config={CONFIGS / given.dataset / 'step_by_step.yaml'}", f"--data.batch_size={given.batch_size}",
            f"--model.student={student}", "--model.from_scratch=false", "--model.effective_batch_size=null",
            f"--data.data_dir={Path(given.data_dir).absolute()}", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
            *(f"--{argument}" for argument in given.more),
        ]  # fmt: skip
        print(json.dumps({name: measure(name, base, student, folder, given) for name in given.overlays}))


def overlay_arguments(name: str, student: str) -> list[str]:
    """The arguments of an overlay with its teacher."""
    overlay, _, teacher = name.partition("=")
    path = Path(overlay) if overlay.endswith(".yaml") else CONFIGS / "method" / f"{overlay}.yaml"
    if not path.is_file():
        raise UserError(f"{path}: there is no such overlay")
    model = yaml.safe_load(path.read_text()).get("model", {})
    named = model.get("init_args", {}).get("teachers", {})
    folder = str(Path(teacher).absolute()) if teacher and Path(teacher).exists() else teacher or student
    # as many of it as the overlay has
    models = {
        each: json.dumps([folder] * len(own["model"])) if isinstance(own["model"], list) else folder
        for each, own in named.items()
    }
    return [f"--config={path.absolute()}", *(f"--model.teachers.{each}.model={own}" for each, own in models.items())]


def measure(name: str, base: list[str], student: str, folder: str, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds and MiB of an overlay and of the plain method."""
    sides = {"plain": base, name: [*base, *overlay_arguments(name, student)]}
    found: dict[str, list[Any]] = {side: [] for side in sides}
    workers = {}
    for side, arguments in sides.items():
        place = tempfile.mkdtemp(dir=folder)
        workers[side] = ("objective_side:fit", arguments, place, given.threads)
    with running(workers) as processes:
        for pair in range(WARMUP + given.pairs):
            for side in rotated(list(sides), pair):
                found[side].append(processes[side].ask())
    result: dict[str, Any] = {"memory": {side: own[-1]["memory"]["growth"] for side, own in found.items()}}
    for unit in ("seconds", "cpu"):
        plain, own = ([each[unit] for each in found[side][WARMUP:]] for side in sides)
        result |= {unit: {"plain": plain, name: own}, f"{unit}_ratio": spread(divided(own, plain))}
    plain, own = result["memory"].values()
    result["memory_ratio"] = own / plain
    print(
        f"{name:<20} {shown(result, 'seconds', 's a step')}; {shown(result, 'cpu', 's of CPU')};"
        f" {own:,.0f} MiB, plain {plain:,.0f}, ratio {own / plain:.2f}",
        flush=True,
    )
    return result


def divided(values: Sequence[float], by: Sequence[float]) -> list[float]:
    """Each pair's ratio."""
    return [a / b for a, b in zip(values, by, strict=True)]


def shown(result: dict[str, Any], unit: str, text: str) -> str:
    """Medians, and the ratio of the pairs with its range."""
    plain, own = (statistics.median(each) for each in result[unit].values())
    ratio = result[f"{unit}_ratio"]
    return (
        f"{own:.2f} {text}, plain {plain:.2f}, ratio {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
    )


if __name__ == "__main__":
    main()
