"""Controls: the rationales of other rows, or with their words in random order."""

import random
from dataclasses import replace

import numpy as np

from lit_distill.data.selection import UsedRows
from lit_distill.data.store import Array, Lazy, of_each, read
from lit_distill.errors import UserError
from lit_distill.tasks import Row, TeacherOutput


def shuffle_rationales(used: UsedRows, seed: int, *, teacher_labels: bool = False) -> UsedRows:
    """Control: the same teacher outputs, each paired with another row's input.

    The rows with a text form a random cycle (by ``seed``), along which outputs move by one. Labels to train on stay.
    Raises a ``UserError`` if fewer than two rows have a text.
    """
    found = used.with_rationale
    if len(found) < 2:
        raise UserError(f"rationale_pairing: shuffled needs rationales of two rows or more, and {len(found)} has one")
    ring = np.random.RandomState(seed).permutation(found)
    givers = np.arange(len(used.rows))
    givers[np.roll(ring, -1)] = ring

    def paired(row: Row, giver: Row) -> Row:
        # with a teacher's labels, that of an output would be the target's; the row has its own already
        given = [replace(one, label=None) if teacher_labels else one for one in giver.outputs]
        return replace(row, outputs=tuple(given))

    def some(at: Array) -> list[Row]:
        both = zip(read(used.rows, at), read(used.rows, givers[at]), strict=True)
        return [row if giver.id == row.id else paired(row, giver) for row, giver in both]

    return replace(used, rows=Lazy(len(givers), some), counts=used.counts | {"rationale_shuffled": len(found)})


def permute_rationales(used: UsedRows, seed: int) -> UsedRows:
    """Control: the same teacher outputs, the words of each text in a random order (by ``seed``).

    The permutation of tokens of arXiv 2406.14511, with words for tokens.
    """

    def permuted(row: Row) -> Row:
        draw = random.Random(f"{seed}-{row.id}")  # noqa: S311 - no secret

        def of(output: TeacherOutput) -> TeacherOutput:
            words = (output.text or "").split()
            draw.shuffle(words)
            return output if output.text is None else replace(output, text=" ".join(words))

        return replace(row, outputs=tuple(map(of, row.outputs)))

    counts = used.counts | {"rationale_permuted": len(used.with_rationale)}
    return replace(used, rows=of_each(used.rows, permuted), counts=counts)
