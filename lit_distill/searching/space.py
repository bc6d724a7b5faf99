"""The space of students: shapes, each a part of one whole student, and those of a budget among them."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from lit_distill.checks import check_int
from lit_distill.errors import UserError
from lit_distill.shrinking.layers import kept_layers
from lit_distill.shrinking.structure import WIDTHS as CHANGING
from lit_distill.shrinking.structure import Keep, Structure, owner, sizes
from lit_distill.students import Student
from lit_distill.students.base import Stack

LAYERS: Mapping[str, Stack] = {"encoder_layers": "encoder", "decoder_layers": "decoder"}
WIDTHS = ("d_model", "d_ff", "heads")

TRIES = 1000
"""Maximum shapes that are drawn to find those of the budget."""

_SHORT = {"encoder_layers": "e", "decoder_layers": "d", "d_model": "m", "d_ff": "f", "heads": "h"}

Shape = dict[str, int]
"""The sizes of a student: ``encoder_layers``, ``decoder_layers``, ``d_model``, ``d_ff`` and ``heads``."""


def name_of(shape: Shape) -> str:
    """A shape as a name of files, such as ``e2-d1-m40-f96-h1``."""
    return "-".join(f"{_SHORT[size]}{value}" for size, value in shape.items())


class Space:
    """The shapes to choose from.

    Args:
        student: the whole student, of which each shape is a part; may be without weights.
        choices: the values of each size, at most the student's own, which stays where none are given. A decoder-only
            student has no ``encoder_layers``.

    Raises:
        UserError: a size is unknown, beyond the student, or cannot change in this kind of model.
    """

    def __init__(self, student: Student, choices: Mapping[str, Sequence[int]]) -> None:
        own, structure = sizes(student.network.config), Structure(student)
        whole = {size: student.layers(stack) for size, stack in LAYERS.items() if stack in structure.stacks}
        # all widths can change, or none
        whole |= {size: own[size] for size in WIDTHS if structure.config.model_type in CHANGING}
        for size, values in choices.items():
            if size in WIDTHS:
                structure.check_widths(f"space: {size}")
            if size not in whole:
                raise UserError(f"space: {size!r} is no size of this student; allowed are {', '.join(whole)}")
            if not values:
                raise UserError(f"space: {size}: needs at least one value")
            for value in values:
                check_int(f"space: {size}", value, 1, whole[size])
                if size == "heads" and value % structure.queries:
                    shared = f"as {structure.queries} heads share their keys and values"
                    raise UserError(f"space: heads: {value} must be a multiple of {structure.queries}, {shared}")
        self.choices = {size: sorted(set(choices.get(size, [whole[size]]))) for size in whole}

    def __len__(self) -> int:
        return prod(map(len, self.choices.values()))

    def __getitem__(self, number: int) -> Shape:
        shape = {}
        for size, values in self.choices.items():
            number, place = divmod(number, len(values))
            shape[size] = values[place]
        return shape

    @property
    def smallest(self) -> Shape:
        """The least of each size."""
        return {size: values[0] for size, values in self.choices.items()}

    @property
    def largest(self) -> Shape:
        """The most of each size."""
        return {size: values[-1] for size, values in self.choices.items()}


@dataclass(frozen=True)
class Budget:
    """What a student may cost."""

    most: float
    at_least: float  # the share of it below which a student wastes it
    unit: str  # ``parameters`` or ``ms``

    def draw(self, space: Space, number: int, seed: int, cost: Callable[[Shape], float]) -> list[Shape]:
        """So many different shapes of the budget, uniformly among them.

        Raises:
            UserError: there are fewer among `TRIES` shapes of the space.
        """
        order = random.Random(seed).sample(range(len(space)), min(len(space), TRIES))  # noqa: S311 - no secret
        found: list[Shape] = []
        costs: list[float] = []
        for place in order:
            costs.append(cost(space[place]))
            if self.at_least * self.most <= costs[-1] <= self.most:
                found.append(space[place])
            if len(found) == number:
                return found
        raise UserError(
            f"candidates: {number} are wanted, and of {len(order):,} students drawn from the space {len(found)} have"
            f" {self.at_least * self.most:,.6g} to {self.most:,.6g} {self.unit}; theirs are {min(costs):,.6g} to"
            f" {max(costs):,.6g}: change space, the budget or at_least"
        )


def part_of(student: Student, shape: Shape) -> tuple[Structure, Keep]:
    """The part of a student that has a shape: its first units, heads and channels, and layers by the uniform map.

    Layers are spread evenly, as in ``shrink``: the first of a T5's stack, which has the position biases, always stays.
    """
    kept = {
        stack: kept_layers(size, f"uniform:{shape[size]}", student.layers(stack))
        for size, stack in LAYERS.items()
        if size in shape
    }
    structure = Structure(student, kept)
    if "d_model" not in shape:
        return structure, Keep()
    units, heads = torch.arange(shape["d_ff"]), torch.arange(shape["heads"] // structure.queries)
    return structure, Keep(
        units={owner(name): units for name in structure.outputs("unit")},
        heads={owner(name): heads for name in structure.outputs("head")},
        d_model=torch.arange(shape["d_model"]),
    )
