"""Does `annotate` keep a teacher busy, and does its memory stay flat?

    python benchmarks/annotate_throughput.py

First a server on this machine that answers each question after a fixed delay, however many are under way: with C of
them at a time, N rows take ceil(N / C) delays at least. The ratio is that time over the time of the whole job, from the
call of `annotate` to its return, each in a process of its own. The same server without a delay tells how many questions
a second the command manages. Then jobs of several sizes with a teacher that answers at once, each in a process of its
own: the peak of its memory above what it held with its rows loaded, while it asks and in all. The last line is a JSON
object. Exits with 0 also where the goal is missed.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from measure import spread
from options import OneLineParser, one_line_errors
from report import PACKAGES, Goal, print_goals
from workers import running

from lit_distill.errors import UserError

GOAL = 0.95
"""The share of what the delay allows that is aimed at, with the defaults."""

ROWS, CONCURRENCY, DELAY = 3200, 32, 0.5


@dataclass(frozen=True)
class Asked:
    """What is measured, and how."""

    rows: int
    concurrency: int
    delay: float
    runs: int
    memory_rows: tuple[int, ...]

    @property
    def ideal(self) -> float:
        """Seconds that the delay alone takes."""
        return -(-self.rows // self.concurrency) * self.delay


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``argv`` are its arguments, by default the process's."""
    parser = OneLineParser(
        prog="annotate_throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the toy that the server is asked about")
    parser.add_argument("--concurrency", type=int, default=CONCURRENCY)
    parser.add_argument("--delay", type=float, default=DELAY, help="seconds that the server takes for an answer")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--memory_rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    arguments = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        for name in ("rows", "concurrency", "runs"):
            if getattr(arguments, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(arguments, name)}")
        if arguments.delay <= 0:
            raise UserError(f"delay must be above 0, got {arguments.delay:g}")
        if min(arguments.memory_rows) < 1:
            raise UserError(f"memory_rows must be at least 1, got {min(arguments.memory_rows)}")
        sizes = tuple(sorted(set(arguments.memory_rows)))
        run(Asked(arguments.rows, arguments.concurrency, arguments.delay, arguments.runs, sizes))


def run(asked: Asked) -> None:
    """Measure everything, print the tables and the JSON line."""
    throughput = measure_throughput(asked)
    memory = [measure_memory(rows, asked.concurrency) for rows in asked.memory_rows]
    a_row = print_memory(memory)
    ratio = throughput["ratio"]
    defaults = (asked.rows, asked.concurrency, asked.delay) == (ROWS, CONCURRENCY, DELAY)
    goals = [Goal("share of what the delay allows", ratio["median"], GOAL)] if defaults else []
    print_goals(goals)
    content = {
        "benchmark": "annotate_throughput",
        "settings": asdict(asked),
        **throughput,
        "memory": memory,
        "bytes_a_row": a_row,
        "goals": [asdict(goal) | {"met": goal.met} for goal in goals],
    }
    print(json.dumps(content), flush=True)


def measure_throughput(asked: Asked) -> dict[str, Any]:
    """Jobs against the server with its delay, and one without."""
    jobs: list[dict[str, float]] = []
    on: dict[str, Any] = {}
    servers = {"server": ("waiting:serve", asked.delay), "server at once": ("waiting:serve", 0.0)}
    with running(servers) as found:
        server, at_once = found.values()
        ports = [one.answer() for one in (server, at_once)]
        busy = server.ask()
        for number in range(asked.runs + 1):
            with running({"job": ("annotating:ask_server", ports[number == 0], asked.rows, asked.concurrency)}) as own:
                on = own["job"].answer()
                if number == 0:
                    print_head(asked, on)
                jobs.append(own["job"].ask())
            if jobs[-1]["answers"] != asked.rows:
                raise RuntimeError(f"{jobs[-1]['answers']} of {asked.rows} questions were answered")
            if number:
                print_job(asked, number, jobs[-1])
        busy = server.ask() - busy
    without, *jobs = jobs
    ratio = spread([asked.ideal / job["seconds"] for job in jobs])
    seconds = [job["seconds"] for job in jobs]
    figures = {
        "machine": on,
        "ratio": ratio,
        "ratio_asking": spread([asked.ideal / job["asking"] for job in jobs]),
        "seconds": seconds,
        "ideal_seconds": asked.ideal,
        "cpu_ms_a_question": 1000 * statistics.median(job["cpu_seconds"] for job in jobs) / asked.rows,
        "server_share_of_core": busy / sum(seconds),
        "questions_per_second_without_delay": asked.rows / without["asking"],
    }
    print_throughput(asked, figures)
    return figures


def measure_memory(rows: int, concurrency: int) -> dict[str, Any]:
    """A job with a teacher that answers at once."""
    with running({"job": ("annotating:ask_at_once", rows, concurrency)}) as own:
        found: dict[str, Any] = own["job"].answer()
    if found["answers"] != rows:
        raise RuntimeError(f"{found['answers']} of {rows} questions were answered")
    return found


# ---------------------------------------------------------------- what is printed


def print_head(asked: Asked, on: Mapping[str, Any]) -> None:
    """The machine and the setting."""
    print(f"machine  {on['cpu']}, {on['cores']} cores")
    print("versions " + ", ".join(f"{name} {on[name]}" for name in ("openai", *PACKAGES)))
    print(f"setting  {asked.rows:,} rows of the toy, {asked.concurrency} questions at a time, {asked.delay:g} s each")
    print(f"\n{'job':>4}{'seconds':>9}{'share':>8}{'asking':>9}{'share':>8}{'of a core':>11}", flush=True)


def print_job(asked: Asked, number: int, job: Mapping[str, float]) -> None:
    """One job against the server."""
    print(
        f"{number:4d}{job['seconds']:9.2f}{asked.ideal / job['seconds']:8.3f}{job['asking']:9.2f}"
        f"{asked.ideal / job['asking']:8.3f}{job['cpu_seconds'] / job['seconds']:11.1%}",
        flush=True,
    )


def print_throughput(asked: Asked, figures: Mapping[str, Any]) -> None:
    """What all of them say."""
    ratio = figures["ratio"]
    print(f"\nshare of what the delay allows ({asked.ideal:.1f} s): {ratio['median']:.3f}", end=" ")
    print(f"({ratio['min']:.3f} to {ratio['max']:.3f} over {ratio['pairs']} jobs)")
    print("asking: from the teacher's being ready to its last answer; the rest is imports, reading and writing files")
    print(f"the command takes {figures['cpu_ms_a_question']:.1f} ms of a core for a question; without a delay", end=" ")
    print(f"{figures['questions_per_second_without_delay']:.0f} questions/s")
    print(f"the server takes {figures['server_share_of_core']:.1%} of a core", flush=True)


def print_memory(memory: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """One row a size; returns bytes a row between the smallest and the largest."""
    print("\npeak MiB above what was held with the rows loaded")
    print(f"{'rows':>8}{'asking':>8}{'in all':>8}{'file':>8}{'seconds':>9}{'rows held':>11}")
    for own in memory:
        print(
            f"{own['rows']:8,d}{own['asking']:8.1f}{own['growth']:8.1f}{own['file']:8.1f}{own['seconds']:9.1f}"
            f"{own['before']:11.1f}"
        )
    first, last = memory[0], memory[-1]
    if first is last:
        return None
    between = last["rows"] - first["rows"]
    a_row = {name: (last[name] - first[name]) * 2**20 / between for name in ("asking", "growth")}
    print(f"from {first['rows']:,} to {last['rows']:,} rows: {a_row['asking']:.0f} bytes a row while asking", end=", ")
    print(f"{a_row['growth']:.0f} in all")
    return a_row


if __name__ == "__main__":
    main()
