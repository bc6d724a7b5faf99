"""What does it cost to measure the terms' shares of the gradient (`GradientShares`)?

    python benchmarks/gradient_shares.py --data_dir data --student google/t5-v1_1-small

The real trainer takes two optimizer steps on each batch, of which the first is measured and the second is not; of two
terms (label and rationale), and of three (with a KL divergence from the student's own weights as teacher). The cost is
the ratio of the two in seconds of CPU, which other work on the machine changes little; medians over the pairs. The last
line is a JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from options import with_weights
from quiet import quiet

from lit_distill.callbacks import GradientShares
from lit_distill.data import CQADataModule
from lit_distill.modules import StepByStepModule
from lit_distill.objectives import ForwardKL
from lit_distill.teachers.models import TeacherModel

EVERY = GradientShares().every_n_steps
WARMUP = 2
"""Pairs at the beginning that do not count."""


class Clock(Callback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Before the forward pass."""
        self._began = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        """After the optimizer's step."""
        self.seconds.append(time.process_time() - self._began)


def measure(settings: argparse.Namespace, folder: str) -> dict[str, dict[str, float]]:
    """The medians for each number of terms."""
    student = with_weights(settings.student, folder)
    makers: dict[str, dict[str, Any]] = {
        "label, rationale": {},
        "label, rationale, kl": {
            "objectives": [ForwardKL(teacher="same")], "teachers": {"same": TeacherModel(student)},
        },
    }  # fmt: skip
    found = {}
    for name, arguments in makers.items():
        module, clock = StepByStepModule(student, **arguments), Clock()
        data = CQADataModule(
            settings.data_dir, student, settings.batch_size, tasks=module.tasks, allow_extra_outputs=True
        )
        data.setup("fit")
        batches = [batch for batch, _ in zip(data.train_dataloader(), range(settings.pairs + WARMUP), strict=False)]
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            callbacks=[GradientShares(2), clock],
        )  # fmt: skip
        trainer.fit(module, _Twice(batches))
        pairs = list(zip(clock.seconds[::2], clock.seconds[1::2], strict=True))[WARMUP:]
        ratios = [measured / plain for measured, plain in pairs]
        ratio = statistics.median(ratios)
        found[name] = {"ratio": ratio, "low": min(ratios), "high": max(ratios), "amortised": 1 + (ratio - 1) / EVERY}
        print(
            f"{name:<22} a measured step {ratio:.2f} of a plain one ({min(ratios):.2f} to {max(ratios):.2f});"
            f" every {EVERY} steps {100 * (found[name]['amortised'] - 1):.1f} % more",
            flush=True,
        )
    return found


class _Twice:
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 2 * len(self.batches)

    def __iter__(self) -> Any:
        return (batch for batch in self.batches for _ in range(2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data", help="folder that holds the datasets' folders")
    parser.add_argument("--student", default="google/t5-v1_1-small", help="also the KL's teacher")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, help="threads of PyTorch on CPU; default: PyTorch's own")
    given = parser.parse_args()
    with quiet(given.threads), tempfile.TemporaryDirectory() as made:
        result = measure(given, made)
    print(json.dumps(result))
