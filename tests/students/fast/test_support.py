"""What is served and what is not."""

from copy import deepcopy
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import T5ForConditionalGeneration

from lit_distill.batch import IGNORE_INDEX
from lit_distill.students.fast.support import fits, reason_against
from tests.students.fast.examples import TASKS, VARIANTS, checkpointed, make_student, make_task


@pytest.mark.parametrize("kind", VARIANTS)
def test_plain_students(kind: str) -> None:
    student = make_student(**VARIANTS[kind])
    assert reason_against(student) is None
    assert reason_against(student.eval()) is None
    assert reason_against(checkpointed(student)) is None
    assert reason_against(nn.Module.to(student, torch.bfloat16)) is None
    assert reason_against(deepcopy(student)) is None
    student.requires_grad_(False)
    assert reason_against(student) is None


def nothing(*rest: object) -> None:
    return None


PLACES = {
    "the model": "",
    "the encoder": "encoder",
    "a block": "decoder.block.1",
    "a layer": "encoder.block.0.layer.1",
    "an attention": "decoder.block.0.layer.1.EncDecAttention",
    "a feed-forward": "encoder.block.1.layer.1.DenseReluDense",
    "a norm": "decoder.final_layer_norm",
    "a dropout": "encoder.dropout",
}
LEAVES = {
    "head": "lm_head",
    "queries": "encoder.block.0.layer.0.SelfAttention.q",
    "keys of the encoder's states": "decoder.block.0.layer.1.EncDecAttention.k",
    "values of the encoder's states": "decoder.block.1.layer.1.EncDecAttention.v",
    "position biases": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "activation": "decoder.block.0.layer.2.DenseReluDense.act",
    "feed-forward": "decoder.block.0.layer.2.DenseReluDense.wo",
}
HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_would_not_be_called(place: str, hook: str) -> None:
    student = make_student()
    handle = getattr(student.get_submodule(place), hook)(nothing)
    assert reason_against(student) is not None
    handle.remove()
    assert reason_against(student) is None


@pytest.mark.parametrize("place", LEAVES.values(), ids=LEAVES)
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_what_is_called_with_packed_rows(place: str, hook: str) -> None:
    student = make_student()
    handle = getattr(student.get_submodule(place), hook)(nothing)
    assert reason_against(student) == f"{place} has hooks"
    handle.remove()
    assert reason_against(student) is None


def test_embeddings_may_have_hooks() -> None:
    # transformers' activation checkpointing puts them there
    student = make_student()
    student.shared.register_forward_hook(nothing)
    assert reason_against(student) is None


GLOBAL = ["register_module_forward_hook", "register_module_forward_pre_hook", "register_module_full_backward_hook"]


@pytest.mark.parametrize("hook", GLOBAL)
def test_hooks_on_every_module(hook: str) -> None:
    student = make_student()
    handle = getattr(nn.modules.module, hook)(nothing)
    try:
        assert reason_against(student) == "every module has hooks"
    finally:
        handle.remove()
    assert reason_against(student) is None


def test_a_subclass() -> None:
    class Own(T5ForConditionalGeneration):
        pass

    student = make_student()
    student.__class__ = Own
    assert "Own" in str(reason_against(student))


@pytest.mark.parametrize("place", ["encoder.block.0", "decoder", "decoder.block.1.layer.2.layer_norm", "encoder"])
def test_a_subclassed_layer(place: str) -> None:
    student = make_student()
    layer: Any = student.get_submodule(place)
    layer.__class__ = type("Own", (type(layer),), {})
    assert reason_against(student) is not None


def test_a_subclassed_head() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    student = make_student()
    student.lm_head.__class__ = Scaled
    assert reason_against(student) is not None


def test_a_head_with_a_bias() -> None:
    student = make_student()
    student.lm_head = nn.Linear(16, 60, bias=True)
    assert reason_against(student) is not None


def test_a_wrapped_stack() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    student: Any = make_student()
    student.encoder = Wrapped(student.encoder)
    assert reason_against(student) is not None
    student = make_student()
    student.decoder.block[0] = Wrapped(student.decoder.block[0])
    assert reason_against(student) is not None


def test_a_wrapped_model() -> None:
    other: Any = nn.Sequential(make_student())
    assert reason_against(other) is not None


@pytest.mark.parametrize("place", ["", "encoder", "decoder.block.0", "encoder.block.1.layer.0.SelfAttention"])
def test_a_forward_of_the_objects_own(place: str) -> None:
    # as accelerate and some quantisers put it there
    student = make_student()
    module: Any = student.get_submodule(place)
    module.forward = MethodType(type(module).forward, module)
    assert reason_against(student) is not None


def test_an_embedding_of_its_own() -> None:
    class Own(nn.Embedding):
        pass

    student = make_student()
    student.decoder.embed_tokens = Own(60, 16)
    assert reason_against(student) is not None


@pytest.mark.parametrize(
    "settings", [{"padding_idx": 0}, {"max_norm": 0.5}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
@pytest.mark.parametrize("which", ["encoder", "decoder", "both"])
def test_embeddings_that_do_more_than_look_up(settings: dict[str, Any], which: str) -> None:
    student = make_student()
    if which == "both":
        student.set_input_embeddings(nn.Embedding(60, 16, **settings))
    else:
        getattr(student, which).embed_tokens = nn.Embedding(60, 16, **settings)
    assert "is not what T5 has there" in str(reason_against(student))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_precisions_that_are_not_served(dtype: torch.dtype) -> None:
    assert reason_against(nn.Module.to(make_student(), dtype)) is not None


def test_parametrised_norms() -> None:
    student = make_student()
    layer = student.get_submodule("encoder.final_layer_norm")
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert reason_against(student) is not None


def test_parametrised_projections_are_served() -> None:
    # their own forward runs
    student = make_student()
    parametrizations.weight_norm(student.get_submodule("encoder.block.0.layer.0.SelfAttention.q"))
    assert reason_against(student) is None


# ------------------------------------------------------------------------------------------------ batches


def test_rows_padded_on_the_right() -> None:
    assert fits(TASKS)
    assert fits([make_task([3, 1], [2, 1], extra=4)])
    assert fits([make_task([3, 1], [2, 0])])
    # targets may have holes
    assert fits([make_task([3, 1], [9, 9], holes=0.5)])


def test_left_padding() -> None:
    task = make_task([3, 1], [2, 1])
    task["attention_mask"] = task["attention_mask"].flip(1)
    assert not fits([task])
    assert not fits([TASKS[0], task])


def test_holes() -> None:
    task = make_task([3, 5], [2, 1])
    task["attention_mask"][1, 2] = 0
    assert not fits([task])


def test_empty_sources() -> None:
    task = make_task([3, 5], [2, 1])
    task["attention_mask"][0] = 0
    assert not fits([task])
    assert not fits([make_task([3, 0], [2, 1])])


def test_shapes_that_do_not_agree() -> None:
    # the plain forward says what is wrong
    for name in ("input_ids", "attention_mask"):
        task = make_task([3, 5], [2, 1])
        task[name] = task[name][:, :4]
        assert not fits([task])
    task = make_task([3, 5], [2, 1])
    task["labels"] = task["labels"][:1]
    assert not fits([task])


def test_targets_do_not_matter() -> None:
    task = make_task([3, 5], [2, 1])
    task["labels"].fill_(IGNORE_INDEX)
    assert fits([task])
