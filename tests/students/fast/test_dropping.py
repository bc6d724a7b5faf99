"""Dropping source tokens, against a loop over transformers' own layers, row by row without padding."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as with_examples
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from lit_distill.errors import UserError
from lit_distill.students.fast.dropping import most_attended
from lit_distill.students.seq2seq import Seq2SeqStudent
from tests.students import test_causal, test_seq2seq
from tests.students.test_seq2seq import BATCH, ROWS


@with_examples(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(1, 10)
)
def test_the_most_attended(rows: list[list[int]], tenths: int) -> None:
    width = max(map(len, rows))
    # what padding receives counts for nothing
    received = torch.tensor([[*map(float, row), *[9.0] * (width - len(row))] for row in rows])
    found = most_attended(received, torch.tensor([len(row) for row in rows]), tenths / 10)
    for row, stays in zip(rows, found.tolist(), strict=True):
        first = sorted(range(len(row)), key=lambda place: (-row[place], place))[: -(-tenths * len(row) // 10)]
        assert [place for place, one in enumerate(stays) if one] == sorted(first)


@torch.no_grad()
def encoded(student: Seq2SeqStudent, source: list[int], after: int, share: float) -> Tensor:
    """The encoder's states of a row, ``(1, kept tokens, d_model)``, by transformers' layers."""
    model: Any = copy.deepcopy(student.model).eval()
    model.set_attn_implementation("eager")
    x, bias = model.encoder.embed_tokens(torch.tensor([source])), None
    for number, block in enumerate(model.encoder.block, start=1):
        own = block.layer[0]
        _, bias, weights = own.SelfAttention(own.layer_norm(x), position_bias=bias)
        x = block(x, position_bias=bias)[0]
        if number == after:
            received = [sum(float(weights[0, :, q, k].sum()) for q in range(len(source))) for k in range(len(source))]
            number_kept = math.ceil(share * len(source))
            kept = sorted(sorted(range(len(source)), key=lambda place: -received[place])[:number_kept])
            x, bias = x[:, kept], bias[:, :, kept][..., kept]
    states: Tensor = model.encoder.final_layer_norm(x)
    return states


@pytest.mark.parametrize("kind", ["v1.0", "v1.1", "mt5"])
@pytest.mark.parametrize(("after", "share"), [(1, 0.5), (2, 0.3), (3, 0.7)])
def test_a_shorter_input(kind: str, after: int, share: float) -> None:
    student = test_seq2seq.make_student(kind, num_layers=3).eval()
    with torch.no_grad(), student.drop_tokens(after, share):
        found = student(BATCH)
        losses = {task: found.token_losses(task) for task in BATCH}
        texts = {task: student(BATCH).generate(task, max_new_tokens=6) for task in BATCH}
        scores = student(BATCH).score("label", [("cat", "dog red")] * len(ROWS["label"]))
    model: Any = student.model
    for task, rows in ROWS.items():
        expected_states, expected_losses = [], []
        for number, (source, target) in enumerate(rows):
            states = encoded(student, source, after, share)
            assert states.shape[1] == math.ceil(share * len(source))
            expected_states.append(states[0])
            with torch.no_grad():
                given = {"encoder_outputs": BaseModelOutput(states), "attention_mask": torch.ones(states.shape[:2])}
                logits = model(**given, labels=torch.tensor([target])).logits[0]
                expected_losses.append(F.cross_entropy(logits, torch.tensor(target), reduction="none"))
                [ids] = model.generate(**given, max_new_tokens=6, do_sample=False).tolist()
            assert texts[task][number] == ids[1:]
        torch.testing.assert_close(found.encoder(task), torch.cat(expected_states), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses[task], torch.cat(expected_losses), rtol=1e-4, atol=1e-4)
    assert len({score for row in scores for score in row}) == 2 * len(scores)


def test_with_all_tokens_it_is_the_student() -> None:
    student = test_seq2seq.make_student().eval()
    with torch.no_grad():
        expected = student(BATCH)
        with student.drop_tokens(1, 1.0):
            whole = student(BATCH)
        # so close to 1 that no row loses a token
        with student.drop_tokens(1, 0.99):
            kept = student(BATCH)
            kept.states("label")
        for task in BATCH:
            for found in (whole, kept):
                assert torch.equal(found.encoder(task), expected.encoder(task))
                assert torch.equal(found.logits(task), expected.logits(task))
    assert student.dropping is None


def test_what_cannot_drop_tokens() -> None:
    student = test_seq2seq.make_student().eval()
    with student.drop_tokens(1, 0.5):
        with pytest.raises(UserError, match=r"^drop_tokens: texts are generated greedily"):
            student(BATCH).generate("label", max_new_tokens=2, num_beams=2)
        student.record_attention("test")
        with pytest.raises(UserError, match=r"^drop_tokens: only the packed path drops tokens, which is off: an obj"):
            student(BATCH)
        with pytest.raises(RuntimeError, match="evaluation mode"):
            student.train()(BATCH)
    for after, share, line in [
        (3, 0.5, r"after must be an integer in \[1, 2\], got 3"),
        (1, 0, r"share must be in \(0"),
    ]:
        with pytest.raises(UserError, match=f"^drop_tokens: {line}"), student.drop_tokens(after, share):
            pass
    causal = test_causal.make_student("llama")
    with pytest.raises(UserError, match=r"^drop_tokens: a decoder-only"), causal.drop_tokens(1, 0.5):
        pass
