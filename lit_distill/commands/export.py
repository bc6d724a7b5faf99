"""``export``: a student for use, smaller and faster, that is proven to answer as it did."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

from jsonargparse import Namespace
from rich.console import Console

from lit_distill import __version__
from lit_distill.checks import check_choice, check_file, check_range
from lit_distill.commands.measuring import parse_arguments, read_subject
from lit_distill.commands.parser import Option
from lit_distill.errors import UserError
from lit_distill.exporting.convert import DTYPES, check_architecture, convert
from lit_distill.exporting.engine import TransformersEngine, load_engine
from lit_distill.exporting.gguf import TYPES, check_gguf, same_pieces, write_gguf
from lit_distill.exporting.hugging_face import set_tasks
from lit_distill.exporting.parity import BOUNDS, measure
from lit_distill.exporting.predictor import REPORT, record_task
from lit_distill.exporting.speed import measure_speed
from lit_distill.files import atomic_folder, write_text
from lit_distill.interrupts import interruptible
from lit_distill.students import StudentFiles, load
from lit_distill.students.delta import write_delta
from lit_distill.students.models import Dtype
from lit_distill.tables import console_table

Target = Literal["ctranslate2", "safetensors", "gguf", "delta"]
Quantization = Literal["int8", "bf16", "float32"]

_OPTIONS: Sequence[Option] = (
    ("to", Target, "ctranslate2", "CTranslate2's format, a Hugging Face folder, GGUF, or the difference to a base."),
    ("quantization", Quantization, "float32", "Of the weights; int8 is for ctranslate2 and gguf."),
    ("base", str | None, None, "Of a delta: what the student was finetuned from; it is needed to load it."),
    ("bits", float | None, None, "Of a delta: bits a weight; null: 1."),
    ("out", str | None, None, "Folder of the export, a new one."),
    ("rows", int | None, None, "Number of test rows of the parity gate; fewer than 200 only if they are asked for."),
    ("write_anyway", bool, False, "Write an export that fails the parity gate, too."),
    ("json", str | None, None, "File for the same numbers."),
)

_QUANTIZATIONS = {
    "ctranslate2": tuple(DTYPES), "safetensors": ("bf16", "float32"), "gguf": tuple(TYPES), "delta": ("float32",),
}  # fmt: skip


@interruptible()
def export(args: list[str]) -> None:
    """Run ``export``: parse, read the test rows, convert, compare with the student, time, and write."""
    student, config = parse_arguments("export", args, _OPTIONS)
    _check(config)
    files = StudentFiles(student)
    if config["to"] == "ctranslate2":
        check_architecture(files)
    if config["to"] == "gguf":
        check_gguf(files)
    subject = read_subject(files, config)
    quantization, out = config["quantization"], Path(config["out"])
    plain = {
        name: record_task(task, {"max_new_tokens": task.max_length(), "num_beams": subject.beams[name]})
        for name, task in subject.tasks.items()
    }
    with atomic_folder(out) as folder:
        told = _write(files, plain, config, quantization, folder)
        reference = load(student)
        weights = sum(one.numel() * one.element_size() for one in reference.parameters())
        own, made = subject.predictor(TransformersEngine(reference, plain=True)), subject.predictor(load_engine(folder))
        parity = measure(own, made, subject.rows, BOUNDS["delta" if config["to"] == "delta" else quantization])
        if config["to"] == "gguf" and (same := same_pieces(own.tokens, folder, subject.rows.inputs)) < 1:
            parity["passed"] = False
            parity["faults"].append(f"tokenizer: {same:.1%} of the inputs are in the same pieces, allowed is 100%")
        if not parity["passed"] and not config["write_anyway"]:
            raise UserError(f"parity: {'; '.join(parity['faults'])}; nothing is written without --write_anyway")
        name = "delta" if config["to"] == "delta" else f"{config['to']} {quantization}"
        with TemporaryDirectory() as whole:
            predictors, megabytes = {"transformers float32": own}, {"transformers float32": weights / 1e6}
            if config["to"] == "ctranslate2" and quantization != "float32":
                _write(files, plain, config, "float32", Path(whole))
                predictors["ctranslate2 float32"] = subject.predictor(load_engine(whole))
                megabytes["ctranslate2 float32"] = _megabytes(Path(whole))
            predictors[name], megabytes[name] = made, _megabytes(folder)
            # transformers computes a GGUF file in float32
            speed = {} if config["to"] == "gguf" else measure_speed(predictors, subject.rows)
        report = {
            "student": student, "to": config["to"], "quantization": quantization, "version": __version__,
            "data": subject.settings, "parity": parity, **told,
            "speed": {name: {"megabytes": size} | speed.get(name, {}) for name, size in megabytes.items()},
        }  # fmt: skip
        text = json.dumps(report, indent=2) + "\n"
        write_text(folder / REPORT, text)
    if config["json"] is not None:
        write_text(config["json"], text)
    render(report, out)


def _check(config: Namespace) -> None:
    """Check the options. Raises a ``UserError``."""
    check_file("json", config["json"])
    if (config["to"] == "delta") != (config["base"] is not None):
        raise UserError("base: must be given with --to delta, and with it alone")
    if config["to"] != "delta" and config["bits"] is not None:
        raise UserError("bits: only with --to delta; --quantization says them of the others")
    check_range("bits", config["bits"], at_least=0.1, at_most=16)
    check_choice(f"quantization: of {config['to']}", config["quantization"], _QUANTIZATIONS[config["to"]])


def _write(
    files: StudentFiles, tasks: dict[str, Any], config: Namespace, quantization: str, folder: Path
) -> dict[str, Any]:
    """Write the student in one format; returns what is further to be told."""
    if config["to"] == "ctranslate2":
        described = files.config | {"prefix": next(iter(tasks.values()))["prefix"], "task_specific_params": tasks}
        convert(files, described, partial(load, files.name), quantization, folder)
        return {}
    dtype = "float32" if config["to"] == "gguf" else DTYPES[quantization]
    student = load(files.name, dtype=cast(Dtype, dtype))
    set_tasks(student.network, tasks)
    if config["to"] == "safetensors":
        student.save(folder)
        return {}
    if config["to"] == "gguf":
        write_gguf(student.network, student.tokenizer, quantization, folder)
        return {}
    base, bits = config["base"], 1.0 if config["bits"] is None else config["bits"]
    return {"delta": write_delta(student.network, student.tokenizer, load(base).network, base, folder, bits)}


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def render(report: dict[str, Any], out: Path) -> None:
    """Print parity and speed as tables."""
    console, parity = Console(), report["parity"]
    bounds, accuracy = parity["bounds"], parity["accuracy"]
    title = f"parity on {parity['rows']} test rows: {'passed' if parity['passed'] else 'FAILED'}"
    table = console_table(title, ["task"], ["score apart", "a token", "greedy equal", "4 beams equal"])
    for name, found in parity["tasks"].items():
        scores = [f"{found[key]:.2g}" if key in found else "" for key in ("score", "token_score")]
        table.add_row(name, *scores, f"{found['greedy']:.1%}", f"{found['beams']:.1%}")
    console.print(table)
    nats = f"{bounds['score']:g} nats" + (" a token" if bounds["texts"] < 1 else "")
    console.print(
        f"accuracy {accuracy['exported']:.3f}, of the student {accuracy['student']:.3f}: {accuracy['difference']:+.3f}"
        f" ({accuracy['low']:+.3f} to {accuracy['high']:+.3f}); allowed: {nats}, {bounds['texts']:.0%} equal texts,"
        f" {bounds['accuracy']:.1%} of accuracy"
    )
    if delta := report.get("delta"):
        console.print(
            f"delta to {delta['base']}: {delta['megabytes']:.2f} MB, {delta['bits_a_weight']:.2f} bits a weight,"
            f" largest relative error {delta['largest_error']:.3f} ({delta['worst']})", markup=False, highlight=False,
        )  # fmt: skip
    for fault in parity["faults"]:
        console.print(f"[bold red]beyond[/] {fault}")
    first = next(iter(report["speed"].values()))
    batches = [key.removesuffix("_p50_ms") for key in first if key.endswith("_p50_ms")]
    timed = "rows_a_second" in first
    columns = ["MB", *["accuracy", "rows/s"] * timed, *(f"{batch.replace('_', ' ')}, ms" for batch in batches)]
    title = "speed, greedy; times of a batch: median / 99th percentile" if timed else "size"
    table = console_table(title, ["engine"], columns)
    for name, found in report["speed"].items():
        values = [f"{found['megabytes']:,.1f}"]
        values += [f"{found['accuracy']:.3f}", f"{found['rows_a_second']:,.1f}"] if timed else []
        times = [f"{found[f'{batch}_p50_ms']:,.0f} / {found[f'{batch}_p99_ms']:,.0f}" for batch in batches]
        table.add_row(name, *values, *times)
    console.print(table)
    console.print("Exported student:", style="bold")
    console.print(f"  {out}", soft_wrap=True, markup=False, highlight=False)
