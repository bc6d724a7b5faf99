"""What the throughput benchmarks take on the command line, and how they refuse it: in one line."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from workers import WorkerError

from lit_distill.errors import UserError

# nothing here imports torch: the process that the user starts only waits for those that do
DATASETS = ("cqa", "svamp", "esnli", "anli")
Precision = Literal["32", "bf16"]
Side = Literal["recipe", "lit_distill"]
SIDES: tuple[Side, ...] = ("recipe", "lit_distill")


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    dataset: str
    data_dir: str
    student: str
    batch_size: int
    precision: Precision
    device: str
    steps: int
    """Batches of one measurement that count."""
    warmup: int
    """Batches at the beginning of each process that do not."""
    pairs: int
    seed: int
    threads: int | None
    """Of PyTorch on CPU; ``None`` for PyTorch's own choice."""
    fast: str | None = None
    """How lit_distill computes; ``None`` for its default."""

    @property
    def from_scratch(self) -> bool:
        """Whether the student is a folder without weights."""
        return lacks_weights(self.student)


@dataclass(frozen=True)
class Asked:
    """What an evaluation does."""

    stop_at_gold: bool = False
    """End each text at the length of its gold target."""
    rationales: bool = False
    """Also generate rationales, which goes with their loss."""
    every_loss: bool = False
    """Also compute the rationales' loss."""


class OneLineParser(argparse.ArgumentParser):
    """Refuses arguments in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def lacks_weights(student: str) -> bool:
    """Whether a student is a folder without weights."""
    folder = Path(student)
    return folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin"))


def with_weights(student: str, folder: str) -> str:
    """A student's folder without weights as one with random ones, made in ``folder``; any other student as it is."""
    place = Path(student).absolute()
    if not lacks_weights(student):
        return str(place) if place.is_dir() else student
    from quiet import quiet

    from lit_distill import students

    made = Path(folder) / place.name
    with quiet(None):
        students.load(place, from_scratch=True).save(made)
    return str(made)


def make_parser(program: str, description: str | None, *, batch_size: int, steps: str) -> OneLineParser:
    """The options that both benchmarks have.

    Args:
        program: the benchmark's name.
        description: what the benchmark does.
        batch_size: its default.
        steps: the help of ``--steps``, which says what its default is.
    """
    parser = OneLineParser(prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DATASETS, default="cqa")
    parser.add_argument("--data_dir", default="data", help="folder that holds the datasets' folders")
    parser.add_argument(
        "--student",
        default="google/t5-v1_1-small",
        help="hub name or folder; a folder without weights is built from scratch",
    )
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--precision", choices=["32", "bf16"], help="default: 32 on CPU, bf16 on CUDA")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, help=steps)
    parser.add_argument("--pairs", type=int, default=10, help="measurements of each side, in turn")
    parser.add_argument("--seed", type=int, default=0, help="draws rows and weights")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on CPU; default: PyTorch's own")
    parser.add_argument("--fast", help="how lit_distill computes: plain, packed or compiled; default: as it would")
    parser.add_argument("--peak_tflops", type=float, help="what the device's maker states, for a share of that as well")
    return parser


def read_settings(arguments: argparse.Namespace, steps: Callable[[int, str], int]) -> Settings:
    """Check the options and fill in what depends on others.

    Args:
        arguments: the parsed options.
        steps: ``(batch size, device) -> `` the default of ``--steps``.

    Raises:
        UserError: a value is out of its range, or there is no such device.
    """
    for name in ("batch_size", "steps", "pairs", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if arguments.seed < 0:
        raise UserError(f"seed must be at least 0, got {arguments.seed}")
    if arguments.peak_tflops is not None and arguments.peak_tflops <= 0:
        raise UserError(f"peak_tflops must be above 0, got {arguments.peak_tflops}")
    on_cuda = arguments.device == "cuda"
    if on_cuda:
        import torch

        if not torch.cuda.is_available():
            raise UserError("device: cuda is not available here")
    return Settings(
        dataset=arguments.dataset,
        data_dir=arguments.data_dir,
        student=arguments.student,
        batch_size=arguments.batch_size,
        precision=arguments.precision or ("bf16" if on_cuda else "32"),
        device=arguments.device,
        steps=arguments.steps or steps(arguments.batch_size, arguments.device),
        # the second step is the first one with the optimizer's state in memory
        warmup=5 if on_cuda else 2,
        pairs=arguments.pairs,
        seed=arguments.seed,
        threads=arguments.threads,
        fast=arguments.fast,
    )


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Say in one line what is wrong: with code 2 the arguments, with code 1 what a process stumbled over."""
    try:
        yield
    except (UserError, WorkerError) as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from error
    except KeyboardInterrupt as stopped:
        # as a shell says it
        raise SystemExit(130) from stopped


def contenders(settings: Settings) -> dict[str, tuple[Side, Precision]]:
    """Those that are measured in turn, by name; on CUDA also the recipe in the other precision."""
    found: dict[str, tuple[Side, Precision]] = {side: (side, settings.precision) for side in SIDES}
    if settings.device == "cuda":
        other: Precision = "32" if settings.precision == "bf16" else "bf16"
        found[f"recipe_{other}"] = ("recipe", other)
    return found
