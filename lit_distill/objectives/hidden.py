r"""Learning from a teacher's hidden states, :math:`h^T`, of which the student's :math:`h^S` may have fewer dimensions.

The functions take states of the same width, ``(tokens, d_model)``, the student's first, and give ``(tokens,)``. What
projects the student's states to the teacher's width belongs to the objective: it trains with the student and is saved
in checkpoints, but not in the exported student.
"""

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lit_distill.batch import PADDING_ROW, TaskBatch, TaskInputs
from lit_distill.checks import check_choice, check_range
from lit_distill.errors import UserError
from lit_distill.objectives.base import Objective, Step
from lit_distill.objectives.chunks import wide
from lit_distill.objectives.layers import Layers, map_layers
from lit_distill.students import Pass, Student
from lit_distill.students.base import Stack
from lit_distill.teachers.models import Teachers


def l1_cosine(student: Tensor, teacher: Tensor, cosine_weight: float = 1.0) -> Tensor:
    r""":math:`\frac{1}{d} \|h^S - h^T\|_1 - \lambda \log \sigma(\cos(h^S, h^T))`: DistilHuBERT (2110.01900) Eq. 1."""
    cosine = F.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).abs().mean(-1) - cosine_weight * F.logsigmoid(cosine)


def cosine_smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    r""":math:`\frac{1}{2} (1 - \cos(h^S, h^T))` plus half the smooth L1, a mean over dimensions: UNIC (2408.05088)."""
    smooth = F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)
    return (1 - F.cosine_similarity(student, teacher, dim=-1) + smooth) / 2


class LayerPairs(Objective):
    """A term of pairs of a student's and a teacher's layer, the mean over the tokens of one stack."""

    reads_teacher = True
    first = 1
    """The first layer that it may read: 0 is the embeddings."""
    layers: Any

    def __init__(self, *, stack: Stack = "encoder", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stack: Stack = check_choice(f"objectives: {self.name}: stack", stack, get_args(Stack))
        self.pairs: list[tuple[int, int]] = []

    def layer_map(self, student: int, teacher: int) -> Layers:
        """The pairs of layers, for stacks of so many layers; by default as ``layers`` says."""
        found: Layers = self.layers
        return found

    def setup(self, student: Student, teachers: Teachers) -> None:
        who = f"objectives: {self.name}"
        teacher = teachers.single(who, str(self.teacher))
        depths = student.layers(self.stack), teacher.layers(self.stack)
        self.pairs = map_layers(who, self.layer_map(*depths), *depths, first=self.first)
        self.make(student.width, teacher.width)

    def make(self, width: int, teacher_width: int) -> None:
        """Shape the parameters."""
        raise NotImplementedError

    def counts(self, batch: TaskBatch) -> int | None:
        """The source tokens for the encoder's states, the target tokens for the decoder's."""
        if self.stack == "decoder":
            return super().counts(batch)
        return sum(int(_real(batch[task]).sum()) for task in self.about(batch))

    def read(self, side: Pass, step: Step, layer: int) -> Tensor:
        """The states of a layer at the tokens that count, ``(tokens, d_model)``."""
        tasks = self.about(step.batch)
        if self.stack == "decoder":
            return torch.cat([side.hidden(task, layer) for task in tasks])
        batch = step.student.batch
        counted = torch.cat([_real(batch[task])[batch[task]["attention_mask"] != 0] for task in tasks])
        return torch.cat([side.encoder(task, layer) for task in tasks])[counted]


def _real(inputs: TaskInputs) -> Tensor:
    """Whether a source token counts, ``(batch, source_len)``: in rows that pad a distributed sampler none does."""
    real = inputs["attention_mask"] != 0
    return real & (inputs["index"] != PADDING_ROW)[:, None] if "index" in inputs else real


class HiddenStates(LayerPairs):
    r"""Mean squared difference :math:`\frac{1}{d} \|h^S W - h^T\|^2` to mapped layers, summed over the pairs.

    TinyBERT (arXiv 1909.10351) Eq. 8 for layers, with one W for all of them, and Eq. 9 for embeddings, with a W of
    their own; its public code has a single W, with a bias, for both. Where student and teacher are equally wide, W
    starts as the identity. The states of a stack's last layer are those after its final norm.

    Args:
        stack: ``encoder``: the mean over source tokens; ``decoder``: over target tokens. A decoder-only model has one
            stack, of which ``encoder`` reads the prompt, and ``decoder`` the positions that predict the target.
        layers: ``uniform``, ``last``, or pairs of student and teacher layer (see `map_layers`); 0 is the embeddings.
        **kwargs: as in `Objective`.
    """

    term = "hidden"
    zero_at_teacher = True
    first = 0

    def __init__(self, *, stack: Stack = "encoder", layers: Layers = "uniform", **kwargs: Any) -> None:
        super().__init__(stack=stack, **kwargs)
        self.layers = layers
        self.maps = UninitializedParameter()  # of the embeddings and of the layers, or of one of them

    def make(self, width: int, teacher_width: int) -> None:
        kinds = len({own == 0 for own, _ in self.pairs})
        if shape(self, "maps", (kinds, teacher_width, width)):
            nn.init.normal_(self.maps, std=width**-0.5)
            if width == teacher_width:
                with torch.no_grad():
                    self.maps.copy_(torch.eye(width))

    def forward(self, step: Step) -> Tensor:
        teacher = self.teacher_pass(step)
        total = torch.zeros((), device=self.maps.device)
        for own, other in self.pairs:
            weight = self.maps[0 if own == 0 else -1]
            states = F.linear(self.read(step.student, step, own).to(weight.dtype), weight)
            values = (wide(states) - wide(self.read(teacher, step, other))).square().mean(-1)
            total = total + values.sum() / max(len(values), 1)
        return total


def shape(objective: Objective, name: str, wanted: tuple[int, ...]) -> bool:
    """Give a parameter its shape; whether it had none before. Raises a ``UserError`` if it has another one."""
    parameter: Any = objective.get_parameter(name)
    if isinstance(parameter, UninitializedParameter):
        parameter.materialize(wanted)
        return True
    if tuple(parameter.shape) != wanted:
        raise UserError(
            f"objectives: {objective.name}: it was trained with another student or teacher ({name} is"
            f" {'x'.join(map(str, parameter.shape))}, these models need {'x'.join(map(str, wanted))})"
        )
    return False


class _OfHeads(LayerPairs):
    """Two-layer networks from the student's states to the teacher's width, one a pair of layers."""

    def __init__(self, *, stack: Stack = "encoder", layers: list[int] | None = None, **kwargs: Any) -> None:
        super().__init__(stack=stack, **kwargs)
        if layers is not None and not layers:
            raise UserError(f"objectives: {self.name}: layers must name one at least")
        self.layers = layers
        # side by side, as a checkpoint is loaded before their number is known
        self.inner, self.outer = (
            nn.ParameterDict({"weight": UninitializedParameter(), "bias": UninitializedParameter()}) for _ in range(2)
        )

    def make(self, width: int, teacher_width: int) -> None:
        for name, outputs in (("inner", width), ("outer", teacher_width)):
            if shape(self, f"{name}.weight", (len(self.pairs), outputs, width)):
                nn.init.trunc_normal_(self.get_parameter(f"{name}.weight"), std=0.02)
            if shape(self, f"{name}.bias", (len(self.pairs), outputs)):
                nn.init.zeros_(self.get_parameter(f"{name}.bias"))

    def predictions(self, step: Step) -> Tensor:
        """What each pair's network makes of the student's layer, ``(pairs, tokens, teacher's d_model)``."""
        found, dtype = [], self.inner["weight"].dtype
        for i, (own, _) in enumerate(self.pairs):
            states = self.read(step.student, step, own).to(dtype)
            inner = F.gelu(F.linear(states, self.inner["weight"][i], self.inner["bias"][i]))
            found.append(F.linear(inner, self.outer["weight"][i], self.outer["bias"][i]))
        return wide(torch.stack(found))


class PredictionHeads(_OfHeads):
    r"""The student's last states predict several layers of the teacher, each through a head of its own.

    DistilHuBERT (arXiv 2110.01900) Eq. 1 and 2: `l1_cosine`, summed over the layers (its public code takes the mean).
    A head is, as there, linear, GELU, linear, and as wide inside as the student. Heads are not in the exported student.

    Args:
        stack: as in `HiddenStates`.
        layers: of the teacher; by default three, at a third, two thirds and the whole of its depth.
        cosine_weight: lambda.
        **kwargs: as in `Objective`.
    """

    term = "heads"

    def __init__(
        self, *, stack: Stack = "encoder", layers: list[int] | None = None, cosine_weight: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(stack=stack, layers=layers, **kwargs)
        check_range(f"objectives: {self.name}: cosine_weight", cosine_weight, at_least=0)
        self.cosine_weight = cosine_weight

    def layer_map(self, student: int, teacher: int) -> Layers:
        thirds = sorted({max(1, teacher * part // 3) for part in (1, 2, 3)})
        return [(-1, layer) for layer in self.layers or thirds]

    def forward(self, step: Step) -> Tensor:
        teacher = self.teacher_pass(step)
        states = torch.stack([self.read(teacher, step, layer) for _, layer in self.pairs])
        values = l1_cosine(self.predictions(step), wide(states), self.cosine_weight)
        return values.sum() / max(values.shape[1], 1)


class ProjectorLadder(_OfHeads):
    """Several layers of the student, each through a small network of its own, add up to the teacher's last states.

    UNIC (arXiv 2408.05088): `cosine_smooth_l1` of the sum. A network is linear, GELU, linear; that of the last layer
    is, unlike UNIC's, no wider inside than the others. UNIC compares an image's CLS and patch tokens with teachers
    standardised by running statistics; here every token of the stack counts alike, and teachers end in a norm anyway.
    Several teachers are several objectives, each with its ``teacher``.

    Args:
        stack: as in `HiddenStates`.
        layers: of the student; by default all, without the embeddings.
        **kwargs: as in `Objective`.
    """

    term = "ladder"

    def layer_map(self, student: int, teacher: int) -> Layers:
        return [(layer, -1) for layer in self.layers or range(1, student + 1)]

    def forward(self, step: Step) -> Tensor:
        states = self.read(self.teacher_pass(step), step, self.pairs[0][1])
        values = cosine_smooth_l1(self.predictions(step).sum(0), wide(states))
        return values.sum() / max(len(values), 1)
