"""How fast does a T5 read a corpus, beside a plain loop of transformers on the same batches?

    python benchmarks/reading.py --student FOLDER --corpus FILE

Trains a student from random weights by span corruption: once as `lit_distill fit` does, which reads, tokenises and
corrupts as it goes, and once by `T5ForConditionalGeneration` and PyTorch's AdamW as it comes, on the same batches,
which are ready in memory. Each in a process of its own, a block of steps at a time, in turn. The time is that of the
processor, which other programs on the machine hardly change; the seconds that passed are told, too. The last line is a
JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from measure import rotated, spread
from quiet import quiet
from workers import Turn, running

GOAL = 1.5


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``argv`` are its arguments, by default the process's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="folder of a T5's config.json and tokenizer, with sentinels")
    parser.add_argument("--corpus", required=True, help="file of `CorpusDataModule`")
    parser.add_argument("--column", default="text")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a block")
    parser.add_argument("--pairs", type=int, default=5, help="blocks of each side, after one that does not count")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--threads", type=int, default=1)
    given = vars(parser.parse_args(argv))
    sides = {name: (f"reading:{name}", given) for name in ("lit_distill", "plain")}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    with running(sides) as workers:
        for pair in range(given["pairs"] + 1):
            for name in rotated(list(sides), pair):
                found[name].append(workers[name].ask())
    blocks = {name: own[1:] for name, own in found.items()}
    if any(ours["tokens"] != plain["tokens"] for ours, plain in zip(*blocks.values(), strict=True)):
        raise RuntimeError("the sides' batches differ")
    result: dict[str, Any] = {"benchmark": "reading", "settings": given, "goal": GOAL}
    for unit in ("cpu", "seconds"):
        rates = {name: [block["tokens"] / block[unit] for block in own] for name, own in blocks.items()}
        ratio = spread([ours / plain for ours, plain in zip(*rates.values(), strict=True)])
        told = ", ".join(f"{name} {statistics.median(own):,.0f}" for name, own in rates.items())
        print(
            f"tokens a second of {unit}: {told}; ratio {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        )
        result[unit] = {"ratio": ratio, **rates}
    print(f"goal {GOAL}: {'met' if result['cpu']['ratio']['median'] >= GOAL else 'missed'}")
    print(json.dumps(result))


class _Turns:
    """Waits for its turn before each block of steps, and says what it took."""

    def __init__(self, turn: Turn, steps: int) -> None:
        self._turn, self._steps, self._done, self._tokens = turn, steps, 0, 0

    def begin(self) -> None:
        """Before the first step."""
        self._turn.wait()
        self._started, self._cpu = time.perf_counter(), time.process_time()

    def on_step(self, batch: Any) -> None:
        """After each."""
        self._done += 1
        self._tokens += int(batch["attention_mask"].sum()) + int((batch["labels"] != -100).sum())
        if self._done % self._steps == 0:
            seconds, cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
            self._turn.answer({"seconds": seconds, "cpu": cpu, "tokens": self._tokens})
            self._tokens = 0
            self.begin()


def _data(given: dict[str, Any], tokens: Any) -> Any:
    from lit_distill.data import CorpusDataModule

    names = ("column", "max_length", "batch_size")
    return CorpusDataModule(given["corpus"], tokenizer=tokens, val_documents=1, **{name: given[name] for name in names})


def _steps(given: dict[str, Any]) -> int:
    return int(given["steps"] * (given["pairs"] + 1))


def lit_distill(turn: Turn, given: dict[str, Any]) -> None:
    """The module under the trainer."""
    with quiet(given["threads"]):
        import lightning.pytorch as pl
        import torch
        from lightning.pytorch.callbacks import LambdaCallback

        from lit_distill.modules import SpanCorruptionModule

        torch.manual_seed(0)
        module = SpanCorruptionModule(given["student"], from_scratch=True, learning_rate=1e-4)
        turns = _Turns(turn, given["steps"])
        told = LambdaCallback(
            on_train_start=lambda *rest: turns.begin(),
            on_train_batch_end=lambda trainer, module, outputs, batch, number: turns.on_step(batch["text"]),
        )
        trainer = pl.Trainer(
            accelerator="cpu",
            precision="bf16-mixed" if given["precision"] == "bf16" else "32-true",
            max_steps=_steps(given),
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[told],
        )
        trainer.fit(module, datamodule=_data(given, module.student.tokens))


def plain(turn: Turn, given: dict[str, Any]) -> None:
    """The same model in a loop as its documentation has it."""
    with quiet(given["threads"]):
        import torch
        from transformers import AutoConfig, T5ForConditionalGeneration

        from lit_distill.students import load_tokens

        batches = list(_read(given, load_tokens(given["student"])))
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(AutoConfig.from_pretrained(given["student"])).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        turns = _Turns(turn, given["steps"])
        turns.begin()
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=given["precision"] == "bf16"):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            turns.on_step(batch)


def _read(given: dict[str, Any], tokens: Any) -> Iterator[dict[str, Any]]:
    """The batches of the other side."""
    data = _data(given, tokens)
    data.setup("validate")
    for _, batch in zip(range(_steps(given)), data.train_dataloader(), strict=False):
        yield {name: batch["text"][name] for name in ("input_ids", "attention_mask", "labels")}


if __name__ == "__main__":
    main()
