"""How long does a start take, and how much memory, with many rows?

Rows of e-SNLI in the layout of the paper's release, made from the given ones: repeats have a marker word in the
premise, so that no two inputs are equal. Each measurement is a process of its own, from after its imports to the first
training batch; memory is the peak of what is private to a process (anonymous pages), above that of its imports. The
order of rows is started by itself, too: each way, for one and three ranks, from its beginning and its middle.
"""

import argparse
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from options import OneLineParser

STAGES = ("cold", "cached", "by_length", "inspect", "order", "streaming")
TASKS = ("label", "rationale")
BATCH_SIZE = 64
SHARED = Path(__file__).parents[2] / "shared"  # real data and tokenizers beside the repository, as for the tests
CHUNK = 100_000  # outputs in one file of the teacher
POLL = 0.01  # seconds


def main(args: Sequence[str] | None = None) -> None:
    """Make the rows, measure each stage in a process, and print a table, the last line JSON."""
    parser = OneLineParser("data_scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="training rows to make")
    data_dir = str(SHARED / "data") if (SHARED / "data").is_dir() else "data"
    parser.add_argument("--data_dir", default=data_dir, help="folder that holds esnli/")
    tokenizer = SHARED / "models" / "t5-v1_1-small"
    tokenizer_name = str(tokenizer) if tokenizer.is_dir() else "google/t5-v1_1-small"
    parser.add_argument("--tokenizer", default=tokenizer_name, help="hub name or folder")
    parser.add_argument("--dir", help="folder for rows and cache, which stay; by default a temporary one")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to measure, in order")
    parser.add_argument("--in_process", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.rows < BATCH_SIZE:
        parser.error(f"argument --rows: at least {BATCH_SIZE}, got {options.rows}")
    if not (Path(options.data_dir) / "esnli" / "esnli_train.json").is_file():
        parser.error(f"argument --data_dir: no esnli/esnli_train.json in {options.data_dir}")
    if options.in_process:
        return measure(options)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(options.dir or temporary)
        data = place / f"rows-{options.rows}"
        if set(options.stages) - {"order"} and not data.exists():
            make_release(Path(options.data_dir) / "esnli", data / "esnli", options.rows)
        found = {stage: run_stage(stage, options, data, place / f"cache-{options.rows}") for stage in options.stages}
    print(f"{'stage':<12}{'seconds':>10}{'CPU s':>10}{'private MB':>12}")
    for stage, values in found.items():
        print(f"{stage:<12}{values['seconds']:>10.2f}{values['cpu']:>10.2f}{values['private_mb']:>12.0f}")
    summary = {
        f"{stage}_{unit}": round(values[key], 3) for stage, values in found.items() for unit, key in UNITS.items()
    }
    exact = {name: value for values in found.values() for name, value in values.items() if name.startswith("same_")}
    print(
        json.dumps({"rows": options.rows, "rss_mb": max(v["private_mb"] for v in found.values()), **exact, **summary})
    )


UNITS = {"s": "seconds", "cpu_s": "cpu", "mb": "private_mb"}


def make_release(source: Path, target: Path, rows: int) -> None:
    """Write ``rows`` training rows with their outputs, and the other splits as they are."""
    lines = [json.loads(line) for line in (source / "esnli_train.json").read_text().splitlines()]
    files = sorted(source.glob("llm/train_CoT_*.json"), key=lambda path: int(path.stem.rpartition("_")[2]))
    texts = [text for path in files for text in json.loads(path.read_text())]
    (target / "llm").mkdir(parents=True)
    for word in ("valid", "test"):
        for path in (*source.glob(f"esnli_{word}.json"), *source.glob(f"llm/{word}_CoT_*.json")):
            shutil.copy(path, target / path.relative_to(source))
    with (target / "esnli_train.json").open("w") as file:
        for row in islice(repeated(lines), rows):
            file.write(json.dumps(row) + "\n")
    for number, start in enumerate(range(0, rows, CHUNK)):
        part = [texts[i % len(lines)] for i in range(start, min(start + CHUNK, rows))]
        (target / "llm" / f"train_CoT_{number}.json").write_text(json.dumps(part))


def repeated(lines: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, again and again, with the number of the repeat as a word."""
    yield from lines
    for number in count(1):
        for line in lines:
            yield line | {"premise": f"{line['premise']} ({number})"}


def run_stage(stage: str, options: argparse.Namespace, data: Path, cache: Path) -> dict[str, Any]:
    """Measure a stage in a process of its own, whose memory is read from outside."""
    if stage == "cold":
        shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, __file__, f"--in_process={stage}", f"--rows={options.rows}"]
    command += [f"--data_dir={data if data.exists() else options.data_dir}", f"--tokenizer={options.tokenizer}"]
    environment = os.environ | {"LIT_DISTILL_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:  # noqa: S603
        assert process.stdout is not None  # noqa: S101
        process.stdout.readline()  # the imports are done
        before = peak = private(process.pid)
        while not select.select([process.stdout], [], [], POLL)[0]:
            peak = max(peak, *map(private, processes(process.pid)))
        # how long it took, and after that, whatever memory it takes, whether it was right
        lines = [process.stdout.readline(), process.stdout.read()]
    if process.returncode:
        sys.exit(f"data_scale: {stage} failed")
    measured, checked = (dict(json.loads(line)) for line in lines)
    return measured | {"private_mb": round((peak - before) / 2**20, 1)} | checked


def processes(root: int) -> list[int]:
    """A process and those that it started."""
    found = [root]
    for process in found:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue  # ended
    return found


def private(process: int) -> int:
    """Bytes that a process has for itself, without what is mapped from files; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def measure(options: argparse.Namespace) -> None:
    """One stage in this process: a line after the imports, one with the figures, one that says whether it was right."""
    from lit_distill.commands import inspect
    from lit_distill.data import ESNLIDataModule

    stage = options.in_process
    print("ready", flush=True)
    time.sleep(10 * POLL)  # the memory before is read now
    start, cpu = time.perf_counter(), cpu_seconds()
    check: Callable[[], dict[str, bool]] = dict
    if stage == "order":
        check = start_orders(options.rows)
    elif stage == "streaming":
        check = start_streaming(Path(options.data_dir) / "esnli", options.tokenizer)
    else:
        batching: Any = "by_length" if stage == "by_length" else "shuffled"
        data = ESNLIDataModule(options.data_dir, options.tokenizer, BATCH_SIZE, tasks=TASKS, batching=batching)
        if stage == "inspect":
            inspect.inspect_data(data)
        else:
            data.prepare_data()
            data.setup("fit")
            loader = data.train_dataloader()
            next(iter(loader))
            check = partial(check_resume, stage, loader)
    print(json.dumps({"seconds": time.perf_counter() - start, "cpu": cpu_seconds() - cpu}), flush=True)
    print(json.dumps(check()))


def start_orders(rows: int) -> Callable[[], dict[str, bool]]:
    """Start an epoch of every kind, and one from its middle, with lengths in a mapped file; no data is read."""
    import numpy as np

    from lit_distill.data.batches import EpochSampler

    with tempfile.TemporaryFile() as file:
        lengths: Any = np.memmap(file, np.int32, "w+", shape=rows)
    draw = np.random.default_rng(0)
    for start in range(0, rows, CHUNK):
        lengths[start : start + CHUNK] = draw.lognormal(4, 0.5, len(lengths[start : start + CHUNK])).astype(np.int32)
    kinds = [(own, world) for own in (None, lengths) for world in (1, 3)]
    samplers = [
        EpochSampler(range(rows), world, world - 1, lengths=own, batch_size=BATCH_SIZE, seed=5) for own, world in kinds
    ]
    longest = EpochSampler(range(rows), shuffle=False, lengths=lengths)
    for sampler in (*samplers, longest):
        next(iter(sampler))
        next(sampler.after(sampler.num_samples // 2))

    def check() -> dict[str, bool]:
        same = list(longest) == sorted(range(rows), key=lengths.tolist().__getitem__, reverse=True)
        for (own, world), sampler in zip(kinds, samplers, strict=True):
            expected = plain_order(rows, 5, None if own is None else own.tolist(), world, world - 1)
            middle = len(expected) // 2
            same &= list(sampler) == expected and list(sampler.after(middle)) == expected[middle:]
        return {"same_order": same}

    return check


def start_streaming(folder: Path, tokenizer: str) -> Callable[[], dict[str, bool]]:
    """Stream the rows' labels from their file, one shard, up to the first batch."""
    import torch

    from lit_distill.data import JSONLDataModule

    files: dict[str, Any] = {"train": folder / "esnli_train.json", "val": folder / "esnli_valid.json"}
    template = "{premise} {hypothesis}"
    data = JSONLDataModule(**files, input_template=template, streaming=True, tokenizer=tokenizer, batch_size=BATCH_SIZE)
    data.prepare_data()
    data.setup("fit")
    loader, resumed = data.train_dataloader(), data.train_dataloader()
    batches = iter(loader)
    next(batches)

    def check() -> dict[str, bool]:
        for _ in range(200):
            next(batches)
        resumed.load_state_dict(loader.state_dict())
        same = [
            torch.equal(one["label"]["input_ids"], other["label"]["input_ids"])
            for one, other in zip(islice(batches, 20), resumed, strict=False)
        ]
        return {"same_streaming": all(same)}

    return check


def check_resume(stage: str, loader: Any) -> dict[str, bool]:
    """Whether the first batch after the middle is that of the plain order."""
    middle = len(loader) // 2
    loader.load_state_dict({"epoch": 0, "batches": middle})
    resumed = next(iter(loader))["label"]["index"].tolist()
    lengths = loader.sampler.lengths
    expected = plain_order(len(loader.dataset), 0, None if lengths is None else list(lengths))
    return {f"same_{stage}": resumed == expected[middle * BATCH_SIZE :][:BATCH_SIZE]}


def plain_order(rows: int, seed: int, lengths: Sequence[int] | None, world: int = 1, rank: int = 0) -> list[int]:
    """The first epoch's order on a rank as lists, the way it was first written."""
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003)
    order = torch.randperm(rows, generator=generator).tolist()
    order += order[: -rows % world]
    if lengths is not None:
        size = BATCH_SIZE * world
        whole = len(order) - len(order) % size
        window = size * min(50, max(1, whole // size // 4))
        for start in range(0, len(order), window):
            end = min(start + window, whole) if start < whole else len(order)
            order[start:end] = sorted(order[start:end], key=lengths.__getitem__)
            order[end : start + window] = sorted(order[end : start + window], key=lengths.__getitem__)
        batches = torch.randperm(whole // size, generator=generator).tolist()
        order = [row for i in batches for row in order[i * size : (i + 1) * size]] + order[whole:]
    return order[rank::world]


def cpu_seconds() -> float:
    """Of this process and those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
