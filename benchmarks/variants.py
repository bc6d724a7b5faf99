"""What does a loss of one's own cost? The variants of `tests/variants` beside the plain label-plus-rationale step.

    python benchmarks/variants.py --data_dir data --student google/t5-v1_1-small --wide google/t5-v1_1-base

Each pair is one optimizer step of the plain method and one of a variant on the same batch, in turn, and the teacher's
own forward on it: to the logits of all target tokens for the KL divergence, to the hidden states for the match with a
wider teacher. The cost is the variant's time less its teacher's, over the plain step's; medians over the pairs. The
goal is at most 1.35. The last line is a JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from options import with_weights
from quiet import quiet

sys.path.insert(0, str(Path(__file__).parents[1]))

from lit_distill import students
from lit_distill.batch import TaskBatch
from lit_distill.data import CQADataModule
from lit_distill.modules import DistillModule, StepByStepModule
from tests.variants.hidden import HiddenMatch
from tests.variants.kl import KL
from tests.variants.smoothed import SmoothedModule

GOAL = 1.35


class Contender:
    """A module with its optimizer.

    Args:
        module: what is trained.
        teacher: the name of its teacher.
        logits: whether the teacher is read to its logits.
    """

    def __init__(self, module: DistillModule, teacher: str | None = None, *, logits: bool = False) -> None:
        self.module, self.teacher, self.logits = module, teacher, logits
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step(self, batch: TaskBatch) -> float:
        """Seconds of one optimizer step."""
        return seconds(lambda: self._step(batch))

    def _step(self, batch: TaskBatch) -> None:
        self.module.total_loss(self.module.loss_terms(self.module.step(batch))).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward(self, batch: TaskBatch) -> float:
        """Seconds of the teacher's own forward; 0 without one."""
        return 0.0 if self.teacher is None else seconds(lambda: self._forward(batch, str(self.teacher)))

    def _forward(self, batch: TaskBatch, name: str) -> None:
        read = self.module.step(batch).teacher(name)
        for task in batch:
            _ = read.logits(task) if self.logits else read.states(task)


def seconds(run: Callable[[], None]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(settings: argparse.Namespace, folder: str) -> dict[str, dict[str, float]]:
    """Each variant's medians."""
    shared: dict[str, Any] = {"student": with_weights(settings.student, folder)}
    wide = with_weights(settings.wide, folder)
    same = {"same": {"model": shared["student"]}}
    widths = {
        f"{name}_width": students.read_config(student)["d_model"]
        for name, student in (("student", shared["student"]), ("teacher", wide))
    }
    plain = Contender(StepByStepModule(**shared))
    tasks = plain.module.tasks
    data = CQADataModule(
        settings.data_dir, shared["student"], settings.batch_size, tasks=tasks, allow_extra_outputs=True
    )
    data.setup("fit")
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(settings.pairs + 2), strict=False)]
    found = {}
    makers: dict[str, Callable[[], Contender]] = {
        "entropy bonus (SmoothedModule)": lambda: Contender(SmoothedModule(**shared)),
        "KL to a teacher": lambda: Contender(
            StepByStepModule(**shared, objectives=[KL(teacher="same")], teachers=same), "same", logits=True
        ),
        "hidden states of a wider teacher": lambda: Contender(
            StepByStepModule(
                **shared, objectives=[HiddenMatch(teacher="wide", **widths)], teachers={"wide": {"model": wide}}
            ),
            "wide",
        ),
    }
    for name, make in makers.items():
        variant = make()
        times = [(plain.step(batch), variant.step(batch), variant.forward(batch)) for batch in batches][2:]
        ratios = [(own - teacher) / step for step, own, teacher in times]
        step, own, teacher = (statistics.median(values) for values in zip(*times, strict=True))
        found[name] = {"plain": step, "variant": own, "teacher": teacher, "ratio": statistics.median(ratios)}
        print(
            f"{name:<34} plain {step:.2f} s, variant {own:.2f} s, teacher {teacher:.2f} s;"
            f" ratio {found[name]['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), goal {GOAL}",
            flush=True,
        )
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data", help="folder that holds the datasets' folders")
    parser.add_argument("--student", default="google/t5-v1_1-small", help="also the KL's teacher")
    parser.add_argument("--wide", default="google/t5-v1_1-base", help="teacher of the hidden states")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, help="threads of PyTorch on CPU; default: PyTorch's own")
    given = parser.parse_args()
    with quiet(given.threads), tempfile.TemporaryDirectory() as made:
        result = measure(given, made)
    print(json.dumps(result))
