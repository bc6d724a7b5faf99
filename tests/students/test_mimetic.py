"""Heads that look for like words before any training."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_distill.errors import UserError
from lit_distill.students.loading import load_model
from lit_distill.students.models import Dtype
from tests.students import make_causal_folder, make_student_folder

SIZE: dict[str, Any] = {"d_model": 64, "d_kv": 16, "num_heads": 4}


@pytest.mark.parametrize("model_type", ["t5", "mt5"])
def test_heads_look_for_the_same_word_on_their_side(tmp_path: Path, model_type: str) -> None:
    student = load_model(make_student_folder(tmp_path, model_type=model_type, **SIZE), from_scratch="mimetic")
    student.eval().set_attn_implementation("eager")
    # a word is twice in it, at the places 1 and 7
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 4, 10, 1]])
    with torch.no_grad():
        heads = student.encoder(ids, output_attentions=True).attentions[0][0]
    # (head, query, key): the first looks left, the second right, others at both
    assert heads[0, 7].argmax() == 1
    assert heads[1, 1].argmax() == 7
    assert (heads[0].triu(1).sum(-1) < 0.2)[1:].all()
    assert (heads[1].tril(-1).sum(-1) < 0.2)[:-1].all()
    for head in (2, 3):
        assert heads[head, 7].argmax() == 1
        assert heads[head, 1].argmax() == 7


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_a_heads_rows_are_at_right_angles(tmp_path: Path, dtype: Dtype, tolerance: float) -> None:
    student = load_model(make_student_folder(tmp_path, **SIZE), from_scratch="mimetic", dtype=dtype)
    weight = student.state_dict()["encoder.block.0.layer.0.SelfAttention.q.weight"].detach()
    assert weight.dtype == getattr(torch, dtype)
    for head in weight.float().split(16):
        assert (head @ head.T).allclose(torch.eye(16) * 3 / 16, atol=tolerance)


def test_only_the_encoders_heads_are_set(tmp_path: Path) -> None:
    folder = make_student_folder(tmp_path, **SIZE)
    torch.manual_seed(0)
    random = load_model(folder, from_scratch=True).state_dict()
    torch.manual_seed(0)
    student = load_model(folder, from_scratch="mimetic").state_dict()
    changed = {name for name in random if not random[name].equal(student[name])}
    ends = ("SelfAttention.q.weight", "SelfAttention.k.weight", "relative_attention_bias.weight")
    assert changed == {name for name in random if name.startswith("encoder.") and name.endswith(ends)}


def test_refuses_other_students(tmp_path: Path) -> None:
    folder = make_causal_folder(tmp_path, "llama")
    with pytest.raises(UserError, match="mimetic is for students like T5, not llama"):
        load_model(folder, from_scratch="mimetic", meta=True)
    with pytest.raises(UserError, match="from_scratch must be one of True, False, mimetic"):
        load_model(folder, from_scratch="other")  # type: ignore[arg-type]
