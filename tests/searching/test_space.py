"""Shapes against models of transformers that are built by hand, and draws against the whole space."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config, T5ForConditionalGeneration

from lit_distill.errors import UserError
from lit_distill.searching.cost import config_of, milliseconds, parameters, random_student
from lit_distill.searching.space import Budget, Space, name_of, part_of
from lit_distill.shrinking.shrink import shrink
from lit_distill.students import Student, load
from lit_distill.students.loading import load_model
from lit_distill.students.mimetic import FromScratch
from lit_distill.students.models import save_description
from tests.students import (
    CONFIG,
    WORDS,
    add_weights,
    causal_config,
    make_causal_folder,
    make_causal_tokenizer,
    make_student_folder,
)

LARGE = {"num_layers": 3, "num_decoder_layers": 3, "num_heads": 4, "d_model": 16}
SHAPE = {"encoder_layers": 2, "decoder_layers": 1, "d_model": 12, "d_ff": 20, "heads": 3}
LLAMA: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture
def whole(tmp_path: Path) -> Student:
    return load(add_weights(make_student_folder(tmp_path, **LARGE))).eval()


def test_a_t5s_parameters_are_those_of_a_built_model(whole: Student) -> None:
    sizes = {"num_layers": 2, "num_decoder_layers": 1, "d_model": 12, "d_ff": 20, "num_heads": 3}
    built: Any = T5ForConditionalGeneration(T5Config(**CONFIG | sizes))
    # which transformers ties whatever the configuration says
    assert parameters(whole, SHAPE) == sum(p.numel() for p in built.parameters()) + len(WORDS) * 12


def test_a_llamas_parameters_are_those_of_a_built_model(tmp_path: Path) -> None:
    whole = load(make_causal_folder(tmp_path, **LLAMA), from_scratch=True, meta=True)
    space = Space(whole, {"decoder_layers": [2], "d_model": [8], "d_ff": [20], "heads": [2]})
    assert space.largest == {"decoder_layers": 2, "d_model": 8, "d_ff": 20, "heads": 2}
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = causal_config(**sizes, hidden_size=8, intermediate_size=20)
    built: Any = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    assert parameters(whole, space.largest) == sum(p.numel() for p in built.parameters())


def test_a_part_is_a_hand_built_t5_with_copied_weights(whole: Student) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in whole.network.parameters():
            weight.mul_(torch.rand_like(weight) + 0.5)
    given: dict[str, Tensor] = whole.network.state_dict()
    layers = {"encoder": [0, 2], "decoder": [0]}
    sizes = {"num_layers": 2, "num_decoder_layers": 1, "d_model": 12, "d_ff": 20, "num_heads": 3}
    # a norm over fewer channels divides by the root of another mean
    made: Any = T5ForConditionalGeneration(T5Config(**CONFIG | sizes, layer_norm_epsilon=1e-6 * 16 / 12)).eval()
    made.lm_head.weight = torch.nn.Parameter(torch.empty(len(WORDS), 12))
    made.config.scale_decoder_outputs = False
    with torch.no_grad():
        for name, weight in made.state_dict().items():
            old = name
            for stack, kept in layers.items():
                for new, number in reversed(list(enumerate(kept))):
                    if not name.endswith("relative_attention_bias.weight"):
                        old = old.replace(f"{stack}.block.{new}.", f"{stack}.block.{number}.")
            cut = given[old][tuple(slice(size) for size in weight.shape)]
            weight.copy_(cut * (16 / 12) ** 0.5 if "norm" in name else cut)
    model: Any = shrink(*part_of(whole, SHAPE))
    ids = torch.arange(2, 26).reshape(3, 8)
    inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, made(**inputs).logits, rtol=0, atol=1e-5)


def test_draws_are_of_the_budget_different_and_repeatable(whole: Student) -> None:
    space = Space(whole, {"d_model": [4, 8, 12, 16], "d_ff": [8, 32, 16, 8], "heads": [1, 4]})
    every = [space[number] for number in range(len(space))]
    assert len(space) == len({name_of(shape) for shape in every}) == 4 * 3 * 2
    assert (space.smallest["d_ff"], space.largest["d_ff"], space.largest["encoder_layers"]) == (8, 32, 3)
    budget = Budget(6000, 0.5, "parameters")
    fitting = [shape for shape in every if 3000 <= parameters(whole, shape) <= 6000]
    drawn = budget.draw(space, len(fitting), 0, lambda shape: parameters(whole, shape))
    assert sorted(map(name_of, drawn)) == sorted(map(name_of, fitting))
    two = [budget.draw(space, 2, seed, lambda shape: parameters(whole, shape)) for seed in (0, 0, 1)]
    assert two[0] == two[1] == drawn[:2] != two[2]
    with pytest.raises(UserError, match=r"^candidates: 24 are wanted, .* of 24 students .* 3,000 to 6,000 parameters"):
        budget.draw(space, 24, 0, lambda shape: parameters(whole, shape))


def test_random_students_begin_as_a_run_would(whole: Student, tmp_path: Path) -> None:
    save_description(config_of(whole, SHAPE), whole.tokenizer, tmp_path)
    kinds: tuple[FromScratch, ...] = (True, "mimetic")
    for from_scratch in kinds:
        found = random_student(whole, SHAPE, 5, from_scratch=from_scratch).network.state_dict()
        torch.manual_seed(5)
        expected = load_model(tmp_path, from_scratch=from_scratch).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_time_is_measured_with_as_many_tokens_as_the_longest_target(
    whole: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, labels = torch.tensor([[3, 5, 1], [4, 6, 1]]), torch.tensor([[7, 8, 9, 1], [7, 1, -100, -100]])
    batch: Any = {"label": {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}}
    # a student that would end at once
    student = random_student(whole, SHAPE, 0)
    with torch.no_grad():
        student.network.get_output_embeddings().weight.zero_()
    monkeypatch.setattr(student.network.generation_config, "eos_token_id", 0)
    kind: Any = type(student({"label": batch["label"]}))
    generate, found = kind.generate, []

    def generate_and_tell(*given: Any, **settings: Any) -> Any:
        found.append(generate(*given, **settings))
        return found[-1]

    monkeypatch.setattr(kind, "generate", generate_and_tell)
    assert milliseconds(student, batch, "label") > 0
    assert {len(row) for rows in found for row in rows} == {4}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"width": [8]}, "space: 'width' is no size of this student; allowed are decoder_layers, d_model, d_ff, heads"),
        ({"encoder_layers": [1]}, "space: 'encoder_layers' is no size"),
        ({"d_ff": []}, "space: d_ff: needs at least one value"),
        ({"d_ff": [64]}, r"space: d_ff must be an integer in \[1, 32\], got 64"),
        ({"decoder_layers": [0]}, "space: decoder_layers must be"),
        ({"heads": [3]}, "space: heads: 3 must be a multiple of 2"),
    ],
)
def test_what_is_refused(choices: dict[str, list[int]], message: str, tmp_path: Path) -> None:
    whole = load(make_causal_folder(tmp_path, **LLAMA), from_scratch=True, meta=True)
    with pytest.raises(UserError, match=f"^{message}"):
        Space(whole, choices)


def test_the_width_of_some_models_cannot_change(tmp_path: Path) -> None:
    whole = load(make_causal_folder(tmp_path, "gpt2"), from_scratch=True, meta=True)
    with pytest.raises(UserError, match=r"^space: d_model: the width of a 'gpt2' cannot change"):
        Space(whole, {"d_model": [8]})
    one = Space(whole, {"decoder_layers": [1]}).largest
    assert one == {"decoder_layers": 1}
    assert shrink(*part_of(load(add_weights(tmp_path, make_causal_tokenizer())), one)).config.n_layer == 1
