"""How similar a random student is to a teacher: DisWOT's training-free score, for texts."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.batch import TaskBatch, mean_rows
from lit_distill.students import Pass, Student


def similarity(teacher: Tensor, student: Tensor) -> float:
    r"""Minus the mean squared difference of two matrices of relations; at most 0, for equal ones.

    .. math:: -\frac{1}{n^2} \left\| \frac{A A^T}{\|A A^T\|} - \frac{B B^T}{\|B B^T\|} \right\|_F^2

    with norms by row, for the teacher's features :math:`A` and the student's :math:`B` of the same ``n`` things
    (Dong et al., DisWOT, arXiv 2303.15678, of relations between samples).

    Args:
        teacher: ``(n, d_teacher)``.
        student: ``(n, d_student)``.
    """
    one, other = (F.normalize(features.double() @ features.double().T, dim=1) for features in (teacher, student))
    return -float((one - other).square().mean())


def row_features(made: Pass, task: str) -> Tensor:
    """The mean of each row's encoder states (without an encoder of its prompt's), ``(rows, d_model)``.

    Images have the same positions, which DisWOT compares one by one; those of texts do not match, so their mean stands
    for a row.
    """
    mask = made.inputs(task)["attention_mask"] != 0
    return mean_rows(made.encoder(task).float(), mask.nonzero()[:, 0], len(mask))


def class_features(made: Pass, task: str) -> Tensor:
    """The gradient of the cross-entropy by the output head's weights of each token that is a target, ``(n, d_model)``.

    DisWOT takes an image's semantics from Grad-CAM, which is in its code the gradient by the classifier's weights, of
    each class a row; the places in the image that it would show have no counterpart. A language model's classes are
    tokens; those of the batch's targets are few. As the head is linear, their gradient is the mean over targets of
    ``(p - y) h``, for probabilities ``p``, the target ``y`` and the head's input ``h``.
    """
    labels, errors = made.labels(task), made.logits(task).float().softmax(dim=1)
    classes = labels.unique()
    errors = errors[:, classes] - (labels[:, None] == classes).float()
    gradient: Tensor = errors.T @ made.states(task).float() / max(len(labels), 1)
    return gradient


@torch.no_grad()
def scores(teacher: Pass, make: Callable[[int], Student], seeds: Sequence[int], batch: TaskBatch) -> dict[str, float]:
    """The similarities ``of_classes`` and ``of_rows``, and ``relations``, their sum as in DisWOT.

    Means over the batch's tasks and over so many random students.

    Args:
        teacher: its pass over the batch.
        make: makes a random student of a seed, in evaluation mode.
        seeds: one for each random student.
        batch: rows of train.
    """
    found = {"of_classes": 0.0, "of_rows": 0.0}
    tasks = [task for task, inputs in batch.items() if len(inputs["labels"])]
    for seed in seeds:
        made: Pass = make(seed)(batch)
        for task in tasks:
            for name, features in (("of_classes", class_features), ("of_rows", row_features)):
                found[name] += similarity(features(teacher, task), features(made, task)) / (len(tasks) * len(seeds))
    return {"relations": sum(found.values())} | found
