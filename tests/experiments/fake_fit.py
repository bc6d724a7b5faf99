"""Stands in for ``fit``: starts in no time, and does what its config says."""

import os
import signal
import sys
import time
from pathlib import Path

import yaml

from lit_distill.records import RunRecord, write_record


def main(path: Path) -> int:
    """Run.

    Args:
        path: the config: ``sleep`` (seconds), ``until`` (a file that is waited for), ``code`` (the exit code), ``say``
            (what is printed), ``saves`` (seconds that saving takes), ``deaf`` (does not stop), ``once`` (fails the
            first time only), ``forget`` (leaves no record).
    """
    # as `fit` does, which saves at both
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder, config = path.parent, yaml.safe_load(path.read_text())
    if config.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(config.get("say", "at work"))
    resumed = (folder / "checkpoint").exists()
    (folder / "environment.txt").write_text(
        f"{os.environ.get('OMP_NUM_THREADS')} {os.environ.get('CUDA_VISIBLE_DEVICES')}"
    )
    try:
        # from here on it may be stopped
        with (folder / "starts.txt").open("a") as file:
            file.write(f"{os.getpid()} {'resumed' if resumed else 'new'}\n")
        time.sleep(config.get("sleep", 0))
        while config.get("until") and not Path(config["until"]).exists():
            time.sleep(0.02)
    except KeyboardInterrupt:
        time.sleep(config.get("saves", 0))
        (folder / "checkpoint").write_text("what was trained so far")
        return 143
    first = len((folder / "starts.txt").read_text().splitlines()) == 1
    if config.get("code") and (first or not config.get("once")):
        return int(config["code"])
    if not config.get("forget"):
        write_record(folder, make_record(config.get("accuracy", 0.5)))
    return 0


def make_record(accuracy: float) -> RunRecord:
    """The record of a run."""
    return RunRecord(
        dataset="toy", method="Standard", student="tiny", label_source="gold", train_fraction=1.0, seed=0, data_seed=0,
        train_rows=4, test_rows=4, steps=2, metrics={"test/accuracy": accuracy}, wall_seconds=90.0,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[-1])))
