"""Does the rationale term help on the toy? Step-by-step beside labels only, over several seeds.

    python benchmarks/toy_seeds.py --seeds 1 2 3 4 5 6

Runs `configs/quickstart.yaml` once a seed (the seed draws the rows, their order and the initialisation), at the same
data and number of optimizer steps, and prints test accuracies with the paired difference.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml

from lit_distill.callbacks import ValidateEverySteps
from lit_distill.commands.dispatch import quieten
from lit_distill.data import ToyDataModule
from lit_distill.modules import DistillModule, StandardModule, StepByStepModule

ROOT = Path(__file__).parents[1]


def accuracy(method: type[DistillModule], seed: int, config: dict[str, dict[str, dict[str, object]]]) -> float:
    """Train one student as the quickstart does and return its test accuracy (of the last step)."""
    shared = dict(config["model"]["init_args"])
    shared["student"] = str(ROOT / str(shared["student"]))
    pl.seed_everything(seed, workers=True, verbose=False)
    module = method(**shared)  # type: ignore[arg-type]
    settings = dict(config["data"]["init_args"]) | {"seed": seed, "toy_seed": seed}
    data = ToyDataModule(tokenizer=shared["student"], tasks=module.tasks, test_size=1000, **settings)
    trainer = pl.Trainer(
        **config["trainer"],  # type: ignore[arg-type]
        max_epochs=-1,
        check_val_every_n_epoch=None,
        callbacks=[ValidateEverySteps(None)],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    assert module.evaluation is not None  # noqa: S101 - for the type checker
    return module.evaluation.metrics["accuracy"]


def main() -> None:
    """Run all seeds and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    seeds: list[int] = parser.parse_args().seeds
    quieten()
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    torch.set_num_threads(config["cpu_threads"])
    print(f"{'seed':>5} {'labels only':>12} {'step-by-step':>13} {'difference':>11} {'seconds':>8}")
    rows: list[tuple[float, float]] = []
    for seed in seeds:
        started = time.perf_counter()
        pair = accuracy(StandardModule, seed, config), accuracy(StepByStepModule, seed, config)
        rows.append(pair)
        seconds = time.perf_counter() - started
        print(f"{seed:5d} {pair[0]:12.3f} {pair[1]:13.3f} {pair[1] - pair[0]:+11.3f} {seconds:8.0f}", flush=True)
    differences = [after - before for before, after in rows]
    means = [statistics.mean(column) for column in zip(*rows, strict=True)]
    spread = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    print(
        f" mean {means[0]:12.3f} {means[1]:13.3f} {statistics.mean(differences):+11.3f} (standard error {spread:.3f})"
    )
    print(json.dumps({"seeds": seeds, "labels_only": [r[0] for r in rows], "step_by_step": [r[1] for r in rows]}))


if __name__ == "__main__":
    main()
