"""``plan``: what a config's training needs before anything is loaded: parameters, memory by part, batch size, hours."""

import json
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from lit_distill.checks import check_file, check_range
from lit_distill.commands.parser import Parser
from lit_distill.commands.settings import parse_settings, settle
from lit_distill.commands.train import build, train_parser
from lit_distill.errors import UserError
from lit_distill.files import write_text
from lit_distill.modules.base import DistillModule
from lit_distill.planning.machine import GPU_FRAMEWORK, GPU_HOLES, Machine, find_machine
from lit_distill.planning.plan import AS_IT_IS, LARGEST, Planner, Variant, settings_of
from lit_distill.planning.speed import STEPS, measure_step
from lit_distill.planning.trace import STATIC
from lit_distill.planning.trainer import SETTINGS, silent
from lit_distill.progress import ticker
from lit_distill.students.sharding import deferred
from lit_distill.tables import console_table

_MOVING = ("activations", "logits", "temporary")


def plan(args: list[str]) -> None:
    """Run ``plan``."""
    parser = train_parser("plan")
    parser.add_argument("--memory", type=str | None, default=None, help="Of a device, as 24GiB; by default its own.")
    parser.add_argument("--devices", type=int, default=1, help="Devices of DDP and FSDP.")
    parser.add_argument("--tflops", type=float | None, default=None, help="Throughput of a device, in 10^12 a second.")
    parser.add_argument("--measure", action="store_true", help="Measure the throughput here, by a few real steps.")
    parser.add_argument("--json", type=str | None, default=None, help="File for the same numbers.")
    config = parse_settings(parser, args)
    check_range("devices", config["devices"], at_least=1, below=2**16, whole=True)
    check_range("tflops", config["tflops"], above=0)
    if config["measure"] and config["tflops"] is not None:
        raise UserError("tflops: not with --measure, which finds it")
    if config.get("data") is None:
        raise UserError("data: must be given, in a config file or as --data: lengths are those of its rows")
    check_file("json", config["json"])
    settle(config, "fit")
    machine = find_machine(config["trainer"]["accelerator"], config["memory"])
    planner = make_planner(parser, config, machine)
    if (told := planner.too_small()) is not None:
        raise UserError(f"memory: {told}")
    tflops, seconds = config["tflops"], None
    if config["measure"]:
        seconds, tflops = measure(parser, config, planner)
    report = make_report(planner, config, tflops, seconds)
    if config["json"] is not None:
        write_text(config["json"], json.dumps(report, indent=2) + "\n")
    render(report)


def make_planner(parser: Parser, config: Namespace, machine: Machine) -> Planner:
    """A planner whose data is read, and whose modules are built without weights."""
    # steps are taken by trainers of the plan's own
    trainer = parser.get_defaults()["trainer"]
    trainer.update(Namespace(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False))
    trainer.update(Namespace(enable_progress_bar=False, enable_model_summary=False))

    def make(changed: Namespace) -> tuple[DistillModule, Any]:
        built = changed.clone()
        built["trainer"] = trainer
        with deferred(), silent():
            _, module, data = build(parser, built, [])
        return module, data

    _, data = make(config)
    data.prepare_data()
    data.setup("fit")
    return Planner(config, lambda changed: make(changed)[0], data, machine, config.get("devices", 1))


def measure(parser: Parser, config: Namespace, planner: Planner) -> tuple[float, float]:
    """Seconds of a micro-batch of the median batch here, and the throughput that this is, in 10^12 a second."""
    median, _ = planner.batches(planner.batch_size, AS_IT_IS)
    built = config.clone()
    keep = {name: config["trainer"][name] for name in (*SETTINGS, "accelerator")}
    built["trainer"] = parser.get_defaults()["trainer"]
    built["trainer"].update(Namespace(**keep, logger=False, enable_checkpointing=False, enable_progress_bar=False))
    _, module, _ = build(parser, built, [])
    seconds = measure_step(module, planner.data, median.tasks, settings_of(config), config["trainer"]["accelerator"])
    found = planner.estimate(AS_IT_IS)
    return seconds, found.flops / found.accumulate / seconds / 1e12


def make_report(planner: Planner, config: Namespace, tflops: float | None, measured: float | None) -> dict[str, Any]:
    """Everything that is shown, in plain values: bytes, operations, seconds."""
    student = planner.module.student
    median, largest = planner.batches(planner.batch_size, AS_IT_IS)
    variants = planner.variants()
    rows = []
    with ticker("Planning", len(variants)) as advance:
        for variant in variants:
            rows.append(_row(planner, variant, tflops))
            advance(1)
    return {
        "method": type(planner.module).__name__,
        "student": str(config["model"]["init_args"].get("student")),
        "parameters": {
            "total": sum(one.numel() for one in student.parameters()),
            "trained": sum(one.numel() for one in student.trained),
        },
        "machine": {"kind": planner.machine.kind, "memory": planner.machine.memory},
        "batch": {
            "size": planner.batch_size,
            "accumulated": config["trainer"]["accumulate_grad_batches"],
            "median": {**median.tokens, "memory": planner.needed(AS_IT_IS, median)},
            "largest": {**largest.tokens, "memory": rows[0]["memory"]},
        },
        "tflops": tflops,
        "measured_seconds": measured,
        "variants": rows,
        "notes": _notes(planner, measured),
    }


def _row(planner: Planner, variant: Variant, tflops: float | None) -> dict[str, Any]:
    found = planner.estimate(variant)
    seconds = None if tflops is None else found.flops / tflops / 1e12
    steps = planner.steps(variant)
    return {
        "name": variant.name,
        "changes": dict(variant.changes),
        "devices": 1 if variant.strategy == "one" else planner.devices,
        "batch_size": found.batch_size,
        "accumulated": found.accumulate,
        "memory": dict(found.parts),
        "total": found.total,
        "fits": found.total <= planner.machine.memory,
        "largest_batch_size": planner.largest(variant),
        "flops": found.flops,
        "steps_per_second": None if seconds is None else 1 / seconds,
        "hours": None if seconds is None or steps is None else steps * seconds / 3600,
    }


def _notes(planner: Planner, measured: float | None) -> list[str]:
    own = "counted over one training step of shapes, which computes nothing, at the largest batch of an epoch"
    notes = [
        "States: weights, gradients, optimizer, teacher. Moving: activations, logits, temporary.",
        f"Memory: of tensors, {own}; evaluation and callbacks are not in it.",
    ]
    if planner.machine.kind == "cpu":
        notes.append("Other: holes in the heap, replayed with this system's C library, and PyTorch and Lightning.")
    else:
        context = f"{GPU_FRAMEWORK / 2**20:.0f} MiB"
        notes.append(
            f"Other, not seen by a GPU: {context} for CUDA's context and cuBLAS, {GPU_HOLES:.0%} of what comes and goes"
            " in a step for the allocator's rounding and holes."
        )
    notes.append(f"Largest batch: the rows of a micro-batch that fit, up to {LARGEST:,}, by their lengths.")
    if getattr(planner.module.student, "path", "") == "compiled":
        notes.append("The compiled pass is planned as the packed one; its graphs' own memory is not in it.")
    if measured is not None:
        notes.append(
            f"Time: {measured:.3g} s for a median micro-batch here ({STEPS} steps); others by their operations."
        )
    else:
        notes.append("Time: operations of the median batch (matrix products, attention) over --tflops, or --measure.")
    if planner.devices > 1:
        notes.append(
            "DDP adds buckets of the gradients' size. FSDP divides weights, gradients and optimizer, and adds the"
            " root's weights, two blocks' and a gradient; it runs without the fast path. Communication takes no time."
        )
    return notes


def render(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a report, by default to standard output."""
    console = console or Console()
    machine, batch, numbers = report["machine"], report["batch"], report["parameters"]
    unit = _Unit(max(row["total"] for row in report["variants"]))
    console.print(
        f"{report['method']}, {report['student']}: {numbers['total'] / 1e6:,.1f} million parameters,"
        f" {numbers['trained'] / 1e6:,.1f} trained; {'the CPU' if machine['kind'] == 'cpu' else 'a GPU'} with"
        f" {unit(machine['memory'])} {unit.name}",
        highlight=False,
    )
    accumulated = f", {batch['accumulated']} accumulated" if batch["accumulated"] > 1 else ""
    title = f"memory of batches of {batch['size']}{accumulated}, in {unit.name}"
    parts = console_table(title, ["part"], ["median batch", "largest batch"])
    both = batch["median"], batch["largest"]
    for kind in ("source", "target"):
        parts.add_row(f"{kind} tokens", *(f"{each[kind]:,}" for each in both))
    parts.add_section()
    for part in dict.fromkeys(part for each in both for part in each["memory"]):
        parts.add_row(part, *(unit(each["memory"].get(part, 0)) for each in both))
    parts.add_section()
    parts.add_row("in all", *(unit(sum(each["memory"].values())) for each in both))
    console.print(parts)
    timed = ["steps/s", "hours"] if report["tflops"] else []
    columns = ["states", "moving", "other", "in all", "largest batch", *timed]
    table = console_table(f"savings: memory of a device in {unit.name}", ["config"], columns)
    table.columns[0].no_wrap = True
    for row in report["variants"]:
        states, moving = (sum(row["memory"].get(part, 0) for part in parts) for parts in (STATIC, _MOVING))
        cells = map(unit, [states, moving, row["total"] - states - moving])
        total = f"{unit(row['total'])}{'' if row['fits'] else '!'}"
        largest = "none" if row["largest_batch_size"] is None else f"{row['largest_batch_size']:,}"
        times = [_short(row[name]) for name in ("steps_per_second", "hours")] if timed else []
        table.add_row(row["name"], *cells, total, largest, *times)
    console.print(table)
    if not all(row["fits"] for row in report["variants"]):
        console.print(f"!: more than {unit(machine['memory'])} {unit.name}", highlight=False)
    if report["variants"][0]["largest_batch_size"] is None:
        console.print("No batch of this config fits: a single row needs more memory.")
    for note in report["notes"]:
        console.print(note, highlight=False)


class _Unit:
    """Bytes in the unit that suits the largest of them."""

    def __init__(self, largest: int) -> None:
        self.name, self._size = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)

    def __call__(self, size: int) -> str:
        number = size / self._size
        return f"{number:,.0f}" if number >= 1000 else f"{number:.1f}" if number >= 100 else f"{number:.2f}"


def _short(value: float | None) -> str:
    """A rate or hours; empty where it is not known."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else "<0.01" if value < 0.01 else f"{value:.2f}"
