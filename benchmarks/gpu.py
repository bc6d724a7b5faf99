"""What `gpu.sh` measures beside the other benchmarks: compiling, a profile, and losses of bf16 beside float32's.

    python benchmarks/gpu.py profile --student STUDENT --data_dir DATA --device cuda

Parts: `compile` (seconds of the first steps of the compiled path, and of new sizes), `profile` (kernels, waits and
the host's time for a step of each path, by PyTorch's profiler, with a table of the longest kernels), `losses` (each
path's, or that of `--fast` alone, in bf16 beside the plain one's in float32, without dropout), `tables` (the last
lines of a folder's parts as Markdown). The last line is a JSON object.
"""

import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from operations import Batches
from options import Precision, Settings, make_parser, one_line_errors, read_settings
from ours import Ours
from quiet import quiet
from rows import taken
from torch.profiler import ProfilerActivity, profile
from training import Training

from lit_distill.files import flatten
from lit_distill.students.seq2seq import PathName

PARTS = ("compile", "profile", "losses", "tables")
PATHS: tuple[PathName, ...] = ("plain", "packed", "compiled")

WARM, PROFILED = 8, 3
"""Steps before the profile, in which graphs are recorded, and in it."""


def train(
    training: Training, settings: Settings, batches: Batches, on_step: Callable[[int, Ours], None], **arguments: Any
) -> None:
    """Train the same student anew on these batches, one a step."""
    ours = Ours(settings, training.data, **arguments)
    ours.train(batches, lambda done: on_step(done, ours))


def wait(settings: Settings) -> None:
    """Wait for the device."""
    if settings.device == "cuda":
        torch.cuda.synchronize()


def compile_seconds(training: Training, settings: Settings, batches: Batches) -> dict[str, Any]:
    """Seconds of each step of the compiled path: the first compiles, and steps of new sizes record a graph."""
    times = [time.perf_counter()]

    def on_step(done: int, ours: Ours) -> None:
        wait(settings)
        times.append(time.perf_counter())

    train(training, settings, batches, on_step, fast="compiled")
    seconds = [after - before for before, after in pairwise(times)]
    usual = statistics.median(seconds)
    return {
        "first_s": seconds[0],
        "median_s": usual,
        "steps_above_twice_the_median": sum(second > 2 * usual for second in seconds),
        "seconds": [round(second, 3) for second in seconds],
    }


def profiles(training: Training, settings: Settings, batches: Batches) -> dict[str, Any]:
    """Kernels, graph launches, waits and the host's own milliseconds of a step of each path."""
    return {path: _profile(training, settings, batches, path) for path in PATHS}


def _profile(training: Training, settings: Settings, batches: Batches, path: PathName) -> dict[str, Any]:
    on_cuda = settings.device == "cuda"
    recorder = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])])
    marks: list[tuple[float, float]] = []

    def on_step(done: int, ours: Ours) -> None:
        if done in (WARM, WARM + PROFILED):
            wait(settings)
            marks.append((time.perf_counter(), time.process_time()))
            if on_cuda:
                torch.cuda.set_sync_debug_mode("warn" if done == WARM else "default")
        elif done == WARM + PROFILED + 1:
            recorder.start()
        elif done == WARM + 2 * PROFILED + 1:
            wait(settings)
            recorder.stop()

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(training, settings, taken(batches, 0, WARM + 2 * PROFILED + 1), on_step, fast=path)
    waits = [str(one.message) for one in told if "synchronizing CUDA operation" in str(one.message)]
    events = recorder.key_averages()
    sort = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
    print(f"\n== {path}\n{events.table(sort_by=sort, row_limit=25, max_name_column_width=60)}", flush=True)
    kernels = [one for one in recorder.events() or [] if str(one.device_type).endswith("CUDA")]
    (first, first_cpu), (last, last_cpu) = marks
    return {
        "step_ms": 1000 * (last - first) / PROFILED,
        "host_cpu_ms": 1000 * (last_cpu - first_cpu) / PROFILED,
        "launches": len(kernels) / PROFILED,
        "graph_launches": sum(one.count for one in events if one.key == "cudaGraphLaunch") / PROFILED,
        "device_ms": sum(one.time_range.elapsed_us() for one in kernels) / PROFILED / 1000,
        "synchronisations": len(waits) / PROFILED,
    }


def losses(training: Training, settings: Settings, batches: Batches) -> dict[str, Any]:
    """The largest relative distance of each path's losses in bf16 from the plain path's in float32."""

    def curve(path: PathName, precision: Precision) -> list[float]:
        found: list[torch.Tensor] = []

        def on_step(done: int, ours: Ours) -> None:
            found.append(ours.module.trainer.callback_metrics["train/loss"].detach().clone())

        train(training, replace(settings, precision=precision), batches, on_step, fast=path, dropout=0.0)
        return [float(loss) for loss in found]

    right = curve("plain", "32")
    figures: dict[str, Any] = {"steps": len(right), "float32_last": right[-1]}
    for path in PATHS if settings.fast is None else (cast(PathName, settings.fast),):
        own = curve(path, "bf16")
        distances = [abs(a - b) / b for a, b in zip(own, right, strict=True)]
        figures[path] = {"largest": max(distances), "mean": statistics.mean(distances), "met": max(distances) <= 1e-2}
    return figures


def tables(folder: Path) -> dict[str, Any]:
    """Each part's last line, in ``tables.json`` and as a table in ``tables.md``."""
    found: dict[str, Any] = {}
    lines = ["| part | figure | value |", "|---|---|---|"]
    for path in sorted(folder.glob("*.txt")):
        last = (path.read_text().strip().splitlines() or [""])[-1]
        code = path.with_suffix(".code")
        status = code.read_text().strip() if code.is_file() else ""
        try:
            found[path.stem] = json.loads(last)
        except ValueError:
            # tests, and parts that failed
            found[path.stem] = last
        lines.append(f"| {path.stem} | | {status} |")
        whole = found[path.stem]
        for name, value in (flatten(whole) if isinstance(whole, dict) else {"": whole}).items():
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)[:200]
            lines.append(f"| {path.stem} | {name} | {shown} |")
    (folder / "tables.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "tables.md").write_text("\n".join(lines) + "\n")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run a part; ``argv`` are its arguments, by default the process's."""
    parser = make_parser("gpu", __doc__, batch_size=64, steps="of compiling and of losses; default: 20")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path(), help="the folder of `tables`")
    arguments = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        if arguments.part == "tables":
            figures = tables(arguments.out)
        else:
            settings = read_settings(arguments, lambda size, device: 20)
            measure = {"compile": compile_seconds, "profile": profiles, "losses": losses}[arguments.part]
            with quiet(settings.threads):
                training = Training(settings)
                warmup, (block, *_) = training.shuffled()
                figures = measure(training, settings, [*warmup, *block][-settings.steps :])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
