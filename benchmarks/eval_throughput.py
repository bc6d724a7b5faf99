"""How fast does lit_distill evaluate, beside the published recipe on `Seq2SeqTrainer`, and does it say the same?

    python benchmarks/eval_throughput.py --data_dir data --student google/t5-v1_1-small

Evaluates the same student on the same rows of val with the one and with the other, each in a process of its own, as a
user runs it, in turn: as the published code does, the label's loss and a greedily generated label for each row
(`--losses all` adds the rationale's loss, on both sides; lit_distill computes it unless told otherwise). Random
weights never end a text and trained ones do, so that both sides are made to end each row at the length of its gold
target (`--stop never` lets them run on). The last line is a JSON object. Exits with 1 where the generated texts differ
in float32, with 0 also where a goal is missed.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence

from measure import rotated, spread
from operations import Texts, evaluation_flops, tokens_a_batch
from options import SIDES, Asked, Settings, contenders, make_parser, one_line_errors, read_settings
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

GOAL = 3.5
"""The ratio that is aimed at."""
EXAMPLES = 192
"""About as many rows a measurement evaluates unless told otherwise."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``argv`` are its arguments, by default the process's."""
    parser = make_parser(
        "eval_throughput",
        __doc__,
        batch_size=64,
        steps=f"batches of a measurement; default: {EXAMPLES} examples' worth, all on CUDA",
    )
    parser.add_argument(
        "--stop",
        choices=["gold", "never"],
        default="gold",
        help="end each generated text at its gold target's length, or leave it to the student",
    )
    parser.add_argument(
        "--losses",
        choices=["answer", "all"],
        default="answer",
        help="the losses that are computed: the label's, as in the published code, or both tasks'",
    )
    parser.add_argument("--rationales", action="store_true", help="generate rationales as well; goes with all losses")
    arguments = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        settings = read_settings(
            arguments, lambda size, device: max(1, (EXAMPLES if device == "cpu" else 10**6) // size)
        )
        every_loss = arguments.rationales or arguments.losses == "all"
        asked = Asked(arguments.stop == "gold", arguments.rationales, every_loss)
        with tempfile.TemporaryDirectory() as folder:
            sides = {
                name: ("evaluating:evaluate_side", settings, side, precision, folder, asked)
                for name, (side, precision) in contenders(settings).items()
            }
            with running(sides | {"ceiling": ("ceiling:ceiling_process", settings, False)}) as workers:
                run(workers, settings, asked, peak_tflops=arguments.peak_tflops)


def run(workers: Mapping[str, Worker], settings: Settings, asked: Asked, *, peak_tflops: float | None) -> None:
    """Measure, compare, and print.

    Raises:
        SystemExit: with code 1, where the texts differ in float32.
    """
    started = time.perf_counter()
    names = list(contenders(settings))
    ready = {name: workers[name].answer() for name in names}
    shape, lengths = ready["recipe"]["shape"], ready["recipe"]["lengths"]
    rows, batches = len(lengths), -(-len(lengths) // settings.batch_size)
    stop = "ended at the gold length" if asked.stop_at_gold else "ended by the student alone"
    print_head(
        settings,
        ready["recipe"]["machine"],
        f"{settings.pairs} pairs, {rows} rows of val, {'all losses' if asked.every_loss else 'loss of the label'},"
        f" {stop}, seed {settings.seed}",
    )
    workers["ceiling"].tell((shape, tokens_a_batch(lengths, batches)))
    ceilings = [workers["ceiling"].answer()]
    # not counted: the first passes of a process are slow
    last = {name: workers[name].ask() for name in names}
    notes = print_notes(last)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    texts: dict[str, list[Texts]] = {name: [last[name]["texts"]] for name in names}
    for pair in range(settings.pairs):
        for name in rotated(names, pair):
            last[name] = workers[name].ask()
            seconds[name].append(last[name]["seconds"])
            texts[name].append(last[name]["texts"])
        ceilings.append(workers["ceiling"].ask())
        told = ", ".join(f"{name} {own[-1]:.3f}" for name, own in seconds.items())
        print(f"pair {pair + 1:2d}, seconds: {told}", flush=True)

    ceiling = statistics.median(ceilings)
    flops = evaluation_flops(shape, lengths, rationales=asked.rationales)
    figures: dict[str, Figures] = {}
    for name in names:
        held, usual = ready[name]["content"], statistics.median(seconds[name])
        figures[name] = Figures(
            examples_per_second=held.examples / usual,
            tokens_per_second=held.real / usual,
            seconds_per_step=usual / batches,
            padding=held.padding,
            share_of_ceiling=flops / usual / ceiling,
            share_of_peak=None if peak_tflops is None else flops / usual / (peak_tflops * 1e12),
            memory=last[name]["memory"] if name in SIDES else None,
        )
    ratios = {
        "ratio" + name.removeprefix("recipe"): spread([a / b for a, b in zip(own, seconds["lit_distill"], strict=True)])
        for name, own in seconds.items()
        if name != "lit_distill"
    }
    at_ceiling = statistics.median(seconds["recipe"]) * ceiling / flops
    # nothing is learned in between: each pass has to say the same
    differing = differences(texts["recipe"], texts["lit_distill"])
    said = len(texts["recipe"]) * rows

    print_figures(figures)
    print_memory(figures)
    print_ratios(ratios)
    print_ceiling(ceiling, at_ceiling, "an evaluation")
    print(f"predictions: {said - len(differing)} of {said} identical, over {len(texts['recipe'])} passes")
    goals = []
    if is_goal_setting(settings, shape) and asked.stop_at_gold and not asked.every_loss:
        goals.append(Goal("ratio of evaluation", ratios["ratio"]["median"], GOAL))
        goals.append(Goal("share of identical predictions", 1 - len(differing) / said, 1))
    print_goals(goals)
    print(f"{time.perf_counter() - started:.0f} s in all")
    if differing:
        row, recipe, ours = differing[0]
        print(f"{len(differing)} predictions differ; row {row}: recipe {recipe!r}, lit_distill {ours!r}")
    print_json(
        "eval_throughput",
        settings,
        ready["recipe"]["machine"],
        ratios,
        figures,
        goals,
        identical=not differing,
        losses="all" if asked.every_loss else "answer",
        ceiling={"gflops": ceiling / 1e9, "ratio": at_ceiling},
        seconds=seconds,
        notes=notes,
    )
    if differing and settings.precision == "32":
        # in bfloat16 the order of a sum can decide between two tokens, in float32 it hardly ever does
        raise SystemExit(1)


def differences(recipe: Sequence[Texts], ours: Sequence[Texts]) -> list[tuple[int, tuple[str, ...], tuple[str, ...]]]:
    """Row and both sides' texts wherever these differ, over all passes."""
    return [
        (row, first, second)
        for theirs, own in zip(recipe, ours, strict=True)
        for row, (first, second) in enumerate(zip(theirs, own, strict=True))
        if first != second
    ]


if __name__ == "__main__":
    main()
