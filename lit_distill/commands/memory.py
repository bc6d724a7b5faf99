"""A ``fit`` that runs out of memory: in one line the part that does not fit, and the setting that would."""

import gc

import torch

from lit_distill.commands.plan import make_planner
from lit_distill.commands.settings import parse_settings
from lit_distill.commands.train import run_trainer, train_parser
from lit_distill.errors import UserError
from lit_distill.planning.advice import advice
from lit_distill.planning.machine import Machine, find_machine, free_memory
from lit_distill.planning.trainer import silent


def fit(args: list[str]) -> None:
    """Run ``fit``. Raises a ``UserError`` if memory runs out."""
    free = free_memory()
    try:
        return run_trainer("fit", args)
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        told = " ".join((str(error) or "a Python object could not be made").split())[:200]
    # the run is let go of with its error
    gc.collect()
    raise UserError(f"out of memory ({told}): {_explain(args, free)}")


def ran_out(error: BaseException) -> bool:
    """Whether an error is of memory, of a GPU's or the host's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error)


def _explain(args: list[str], free: int) -> str:
    try:
        with silent():
            parser = train_parser("fit")
            config = parse_settings(parser, args)
            machine = find_machine(config["trainer"]["accelerator"], None)
            # what was free before the run, as the C library keeps what it freed
            machine = machine if machine.kind == "gpu" else Machine("cpu", free)
            return advice(make_planner(parser, config, machine))
    except Exception as error:  # noqa: BLE001 - a plan needs memory, too, and an error in it is not the user's
        return (
            f"lower data.batch_size and raise trainer.accumulate_grad_batches, or set model.activation_checkpointing"
            f" true ({type(error).__name__}: the run could not be planned)"
        )
