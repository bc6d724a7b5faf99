"""Is the memory that `lit-distill plan` tells what a training run takes?

    python benchmarks/plan_memory.py --data_dir data --student google/t5-v1_1-small

Each setting trains a few optimizer steps on the epoch's largest batch, in a process of its own: the peak of its
resident memory above what it held before the student was built, beside the plan's for the CPU. The decoder-only student
is a Qwen2 of about the same size, with random weights and the T5's tokenizer. The last line is a JSON object.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import MemoryProbe, spread
from options import lacks_weights, one_line_errors, with_weights
from workers import Turn, running

CONFIGS = Path(__file__).parents[1] / "configs"

STEPS = 2
"""Optimizer steps; the second is the first with the optimizer's states."""

LORA = ["model.adapter.r=16"]

SETTINGS: dict[str, list[str]] = {
    "T5, batch 4": ["data.batch_size=4"],
    "T5, batch 16": [],
    "T5, short rows": ["data.max_source_length=24", "data.max_target_length=16"],
    "T5, plain path": ["model.fast=false", "data.batch_size=8"],
    "T5, adafactor": ["model.optimizer=adafactor"],
    "T5, 4 x batch 4": ["data.batch_size=4", "trainer.accumulate_grad_batches=4"],
    "T5, checkpointing": ["model.activation_checkpointing=true"],
    "T5, bf16-mixed": ["trainer.precision=bf16-mixed", "data.batch_size=8"],
    "T5, LoRA": LORA,
    "T5, LoRA, bfloat16": [*LORA, "model.dtype=bfloat16", "data.batch_size=8"],
    "T5, KL to a teacher": ["kl"],
    "Qwen2, batch 4": ["decoder", "data.batch_size=4"],
    "Qwen2, LoRA": ["decoder", *LORA, "data.batch_size=8"],
    "Qwen2, LoRA, checkpointing": ["decoder", *LORA, "model.activation_checkpointing=true", "data.batch_size=8"],
}
"""Name -> arguments without ``--``, beside ``decoder`` for that student and ``kl`` for a teacher."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``argv`` are its arguments, by default the process's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cqa")
    parser.add_argument("--data_dir", default="data", help="folder that holds the datasets' folders")
    parser.add_argument("--student", default="google/t5-v1_1-small")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="settings to measure")
    given = parser.parse_args(argv)
    with one_line_errors("plan_memory"), tempfile.TemporaryDirectory() as folder:
        decoder = make_decoder(given.student, Path(folder) / "decoder")
        arguments = {name: of_setting(name, given, decoder, folder) for name in given.only}
        found: dict[str, dict[str, Any]] = {}
        print(f"{'setting':<28}{'plan, MiB':>12}{'measured':>12}{'ratio':>8}", flush=True)
        with running({"the plan": ("plan_memory:plan_side",)}) as planning:
            for name, own in arguments.items():
                with running({name: ("plan_memory:train_side", own)}) as training:
                    measured = training[name].answer()
                    told = planning["the plan"].ask(own)
                total = sum(told.values())
                found[name] = {"plan": total, "measured": measured, "ratio": total / measured, "parts": told}
                print(f"{name:<28}{total:>12,.0f}{measured:>12,.0f}{total / measured:>8.2f}", flush=True)
        ratios = [each["ratio"] for each in found.values()]
        within = sum(abs(ratio - 1) <= 0.15 for ratio in ratios)
        print(f"within 15 %: {within} of {len(ratios)}")
        print(json.dumps({"settings": found, "ratio": spread(ratios), "within": within}))


def of_setting(name: str, given: argparse.Namespace, decoder: str, folder: str) -> list[str]:
    """The arguments of a setting's ``fit``."""
    words = SETTINGS[name]
    student = decoder if "decoder" in words else given.student
    base = [
        f"--config={CONFIGS / given.dataset / 'step_by_step.yaml'}", f"--data.data_dir={given.data_dir}",
        f"--data.batch_size={given.batch_size}", f"--model.student={student}", "--trainer.accelerator=cpu",
        f"--model.from_scratch={str(lacks_weights(student)).lower()}", "--model.effective_batch_size=null",
    ]  # fmt: skip
    if "kl" in words:
        teacher = with_weights(student, folder)
        base += [f"--config={CONFIGS / 'method' / 'kl.yaml'}", f"--model.teachers.teacher.model={teacher}"]
    return [*base, *(f"--{word}" for word in words if "=" in word)]


def make_decoder(student: str, folder: Path) -> str:
    """The folder of a decoder-only student without weights, with another student's tokenizer."""
    from transformers import Qwen2Config

    from lit_distill.students import load_tokenizer

    tokenizer = load_tokenizer(student)
    config = Qwen2Config(
        vocab_size=32128,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _planner(arguments: list[str]) -> tuple[Any, Any, Any]:
    """The parser, the config and a planner for the CPU."""
    from lit_distill.commands.dispatch import quieten
    from lit_distill.commands.plan import make_planner
    from lit_distill.commands.settings import parse_settings, settle
    from lit_distill.commands.train import train_parser
    from lit_distill.planning.machine import Machine

    quieten()
    parser = train_parser("plan")
    config = parse_settings(parser, arguments)
    settle(config, "fit")
    return parser, config, make_planner(parser, config, Machine("cpu", 2**40))


def plan_side(turn: Turn) -> None:
    """Tell the parts of each setting that is asked for, in MiB."""
    from lit_distill.planning.plan import AS_IT_IS

    while True:
        _, _, planner = _planner(turn.wait())
        turn.answer({part: size / 2**20 for part, size in planner.estimate(AS_IT_IS).parts.items()})


def train_side(turn: Turn, arguments: list[str]) -> None:
    """Tell the peak of a setting's training, in MiB, above what was held before its student was built."""
    from lightning.pytorch.callbacks import Callback

    from lit_distill.commands.train import build
    from lit_distill.planning.plan import AS_IT_IS, settings_of
    from lit_distill.planning.trainer import silent, take_steps

    parser, config, planner = _planner(arguments)
    _, largest = planner.batches(planner.batch_size, AS_IT_IS)
    probe = MemoryProbe("cpu")
    with silent():
        _, module, _ = build(parser, config, [])
        take_steps(module, planner.data, largest.tasks, settings_of(config), Callback(), steps=STEPS)
    turn.answer(probe.read()["growth"])


if __name__ == "__main__":
    main()
