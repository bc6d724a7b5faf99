"""Does speculative decoding with a small draft pay for a student's rationales, one row at a time?

    python -m lit_distill fit --config quickstart
    python -m lit_distill fit --config quickstart --model.student LARGER --model.learning_rate 1e-3
    python benchmarks/assisted.py --student RUN_OF_LARGER --draft RUN --export EXPORT_OF_LARGER

Both students are trained on the toy. Each way writes the same rows' rationales greedily, one after the other, in turns:
transformers' ``generate``, the same with the draft as ``assistant_model`` (Leviathan et al. 2023, 2211.17192), the
engine that `serve` runs, and CTranslate2 if an export is given. The last line is a JSON object. Exits with 1 if the
draft changes a text.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from options import OneLineParser, one_line_errors

from lit_distill.data.toy import toy_example
from lit_distill.errors import UserError
from lit_distill.exporting.engine import TransformersEngine
from lit_distill.exporting.predictor import Predictor, load_predictor
from lit_distill.tasks import rationale_task


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``argv`` are its arguments, by default the process's."""
    parser = OneLineParser(prog="assisted", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "draft"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--export", help="the student for CTranslate2")
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    with one_line_errors(parser.prog):
        found = run(asked)
    print(json.dumps({"benchmark": "assisted", **vars(asked), **found}))
    if found["changed"]:
        raise SystemExit(1)


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Write the rows' rationales in each way, in turns, and tell."""
    predictor, draft = load_predictor(asked.student), load_predictor(asked.draft)
    if not isinstance(predictor.engine, TransformersEngine) or not isinstance(draft.engine, TransformersEngine):
        raise UserError("student and draft must be of transformers, not exports")
    task = rationale_task(predictor.tasks)
    if task is None:
        raise UserError("student: must write rationales")
    inputs = [toy_example(1, "test", row).input for row in range(asked.rows)]
    network: Any = predictor.engine.student.network
    settings = {"max_new_tokens": task.max_length(), "do_sample": False, "num_beams": 1}

    def generate(text: str, **assistant: Any) -> str:
        source = torch.tensor(predictor.sources([text], task.name))
        ids = network.generate(input_ids=source, attention_mask=torch.ones_like(source), **settings, **assistant)
        return predictor.tokens.decode(ids[:, 1:].tolist() if network.config.is_encoder_decoder else ids.tolist())[0]

    def engine(of: Predictor) -> Callable[[str], str]:
        return lambda text: of.generate([text], task.name, num_beams=1)[0]

    ways: dict[str, Callable[[str], str]] = {
        "generate": generate,
        "assisted": lambda text: generate(text, assistant_model=draft.engine.student.network),
        "engine": engine(predictor),
    }
    if asked.export is not None:
        ways["ctranslate2"] = engine(load_predictor(asked.export, "ctranslate2"))
    texts = {name: [way(text) for text in inputs] for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(asked.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            for text in inputs:
                way(text)
            seconds[name].append((time.perf_counter() - started) / len(inputs))
    medians = {name: statistics.median(each) * 1000 for name, each in seconds.items()}
    lengths = [len(ids) for ids in predictor.tokens.targets(texts["generate"], 10**9).ids]
    for name, median in medians.items():
        ratio = medians["generate"] / median
        print(f"{name:<12} {median:8.1f} ms a rationale, {ratio:5.2f} times as fast as generate")
    same = {name: sum(a == b for a, b in zip(texts["generate"], each, strict=True)) for name, each in texts.items()}
    own = [draft.generate([text], task.name)[0] for text in inputs]
    agrees = sum(a == b for a, b in zip(own, texts["generate"], strict=True))
    mean = statistics.mean(lengths)
    print(f"{mean:.1f} tokens a rationale; equal texts of {len(inputs)}: {same}; of the draft alone {agrees}")
    return {
        "ms": medians, "equal": same, "draft_equal": agrees, "tokens": mean,
        "changed": len(inputs) - same["assisted"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
