"""``check``: whether the losses of a config are right, on a few rows of its data; and on two processes."""

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
import transformers
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from rich.console import Console
from torch.multiprocessing.spawn import ProcessContext, spawn

from lit_distill.batch import target_tokens
from lit_distill.checking import Checker, Finding, Measured, Precision, pick_rows
from lit_distill.checks import check_range
from lit_distill.commands.settings import parse_settings, settle
from lit_distill.commands.train import build, train_parser
from lit_distill.tables import console_table

WORLD = 2
_LONGEST = 600.0
"""Seconds after which the two processes count as stuck."""

Job = tuple[list[str], Path]
"""The arguments of a check, and the folder where its step is found and its results are put."""


def check(args: list[str]) -> None:
    """Run ``check``; ends with code 1 if a check fails."""
    checker, two_ranks = make_checker(args)
    # the steps of this process are taken meanwhile
    if two_ranks and checker.reference.is_finite and torch.distributed.is_gloo_available():
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            save_step(checker, folder)
            processes = start_ranks([(args, folder)])
            findings = list(checker.run())
            end_ranks(processes)
            findings += rank_findings(checker, folder)
    else:
        findings = list(checker.run())
        why = "left out" if torch.distributed.is_gloo_available() else "this PyTorch has no gloo"
        findings.append(Finding("two ranks", None, why))
    show(checker, findings)
    if any(finding.passed is False for finding in findings):
        raise SystemExit(1)


def make_checker(args: list[str], *, on_rank: bool = False) -> tuple[Checker, bool]:
    """Build what ``fit`` builds, on the CPU, and choose rows; and whether two ranks are asked for."""
    parser = train_parser("check")
    parser.add_argument("--rows", type=int, default=8, help="Rows of train to check on; short ones are taken.")
    parser.add_argument("--two_ranks", type=bool, default=True, help="Also train a step on two processes.")
    text = "Precision of the checks: float64 tells rounding from a wrong loss best."
    parser.add_argument("--dtype", type=Precision, default="float64", help=text)
    config = parse_settings(parser, args)
    check_range("rows", config["rows"], at_least=2, below=1025, whole=True)
    settle(config, "fit")
    seed = config["seed_everything"]
    if seed is not False:
        pl.seed_everything(0 if seed is True else seed, workers=True)
    if config["cpu_threads"] is not None and not on_rank:
        torch.set_num_threads(config["cpu_threads"])
    # steps are taken by trainers of the checks' own
    config["trainer"] = parser.get_defaults()["trainer"]
    config["trainer"].update(Namespace(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False))
    trainer, module, data = build(parser, config, [])
    module.check_teachers(trainer, "fit")
    data.prepare_data()
    data.setup("fit")
    # a store holds the targets of the data alone
    stored = any(module.teachers.store(name) for name in module.teachers.models)
    batch = {} if on_rank else pick_rows(data.train_dataloader(), config["rows"], cut=not stored)
    return Checker(module, data, batch, config["dtype"]), config["two_ranks"]


def show(checker: Checker, findings: Sequence[Finding]) -> None:
    """Print the findings as a table."""
    module, reference = checker.module, checker.reference
    counts = [f"{task} {target_tokens(inputs)}" for task, inputs in checker.batch.items()]
    terms = [f"{name} {value:.4g}" for name, value in reference.terms.items()]
    console = Console(soft_wrap=True)
    console.print(
        f"{type(module).__name__} on {checker.rows} rows (target tokens: {', '.join(counts)}),"
        f" in {checker.precision} on CPU, dropout off\nterms: {', '.join(terms)}"
    )
    table = console_table("", ["check", "", "found"], ["difference"])
    results = {True: "passed", False: "[bold red]FAILED[/]", None: "-"}
    for finding in findings:
        number = "" if finding.difference is None else f"{finding.difference:.0e}".replace("0e+00", "0")
        table.add_row(finding.check, results[finding.passed], finding.found, number)
    Console().print(table)
    failed = sum(finding.passed is False for finding in findings)
    told = f"{failed} of {len(findings)} checks failed" if failed else "all checks passed"
    console.print(f"{told}; relative differences up to {checker.allowed:.0e} are rounding")


# ---------------------------------------------------------------------------------------------- two processes


def save_step(checker: Checker, folder: Path) -> None:
    """Save what two ranks need for a checker's step, of which each gets a part of the rows."""
    # takes the reference, for which objectives prepare the rows
    only = checker.exact
    step = {"state": checker.module.state_dict(), "parts": checker.parts(checker.uneven), "only": only}
    torch.save(step, folder / "step.pt")


def start_ranks(jobs: Sequence[Job]) -> ProcessContext:
    """Start two processes for the steps that `save_step` saved."""
    return cast(ProcessContext, spawn(_rank, (find_free_network_port(), list(jobs)), nprocs=WORLD, join=False))


def end_ranks(context: ProcessContext) -> None:
    """Wait for the processes, and end those that are stuck."""
    for process in context.processes:
        process.join(_LONGEST)
    for process in context.processes:
        if process.is_alive():
            process.kill()
            process.join()


def rank_findings(checker: Checker, folder: Path) -> Iterator[Finding]:
    """Whether the step of two ranks is that of one process."""
    name = f"two ranks of {checker.uneven} and {checker.rows - checker.uneven} rows"
    files = [folder / f"rank{rank}.pt" for rank in range(WORLD)]
    found: list[dict[str, Any]] = [torch.load(file) if file.exists() else {"error": "ended"} for file in files]
    errors = [f"rank {rank}: {each['error']}" for rank, each in enumerate(found) if "error" in each]
    if errors:
        yield Finding(name, False, "; ".join(errors))
        return
    # a rank's own share of a term, which Lightning averages
    terms = {term: sum(each["terms"][term] for each in found) / WORLD for term in checker.reference.terms}
    yield from checker.split(name, Measured(terms, found[0]["gradients"]))


def _rank(rank: int, port: int, jobs: Sequence[Job]) -> None:
    """One of two processes: the steps of all jobs, by DDP as the trainer has it."""
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": WORLD, "NODE_RANK": 0, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in names.items()})
    # both are on one machine
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    # what the first process has said
    logging.disable(logging.WARNING)
    for args, folder in jobs:
        result: dict[str, Any]
        try:
            step = torch.load(folder / "step.pt")
            checker, _ = make_checker(args, on_rank=True)
            checker.module.load_state_dict(step["state"])
            found = checker.measure([step["parts"][rank]], only=step["only"], strategy="ddp", devices=WORLD)
            result = {"terms": found.terms, "gradients": {} if rank else found.gradients}
        except Exception as error:  # noqa: BLE001 - told in the table
            result = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        torch.save(result, folder / f"rank{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
