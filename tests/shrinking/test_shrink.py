"""Cut models against weights sliced by hand, and against transformers' forward of the larger model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_distill.errors import UserError
from lit_distill.shrinking.importance import Scores, best, best_heads, features, magnitude, representative
from lit_distill.shrinking.layers import kept_layers
from lit_distill.shrinking.shrink import shrink
from lit_distill.shrinking.structure import Keep, Structure
from lit_distill.students import Student, load
from tests.students import add_weights, make_causal_folder, make_causal_tokenizer, make_student_folder

SMALL = {"d_model": 24, "d_ff": 20, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 3, "vocab_size": 72}
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24, "num_hidden_layers": 3, "head_dim": 8}


@pytest.mark.parametrize(
    ("text", "total", "expected"),
    [
        # DistilBERT's
        ("uniform:6", 12, [0, 2, 4, 7, 9, 11]),
        # of the code of 2010.13002, for BART and Pegasus
        ("uniform:3", 12, [0, 6, 11]),
        ("uniform:6", 16, [0, 3, 6, 9, 12, 15]),
        ("uniform:4", 16, [0, 5, 10, 15]),
        ("uniform:3", 16, [0, 8, 15]),
        ("uniform:2", 16, [0, 15]),
        ("uniform:1", 8, [0]),
        ("uniform:8", 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("first:2", 8, [0, 1]),
        ("last:3", 8, [5, 6, 7]),
        ("0, 2,7", 8, [0, 2, 7]),
        ("3", 8, [3]),
    ],
)
def test_maps(text: str, total: int, expected: list[int]) -> None:
    assert kept_layers("layers", text, total) == expected


@pytest.mark.parametrize(
    "text", ["uniform:9", "uniform:0", "first:", "middle:2", "0,8", "2,1", "1,1", "-1", "", "1.5", "٣"]
)
def test_maps_beyond_the_layers(text: str) -> None:
    with pytest.raises(UserError, match=r"^layers: .*(8|uniform:N)"):
        kept_layers("layers", text, 8)


def student_of(tmp_path: Path, kind: str, **changes: Any) -> Student:
    """A tiny student with weights in which no norm is 1, so that each place matters."""
    if kind in ("t5", "tied-t5"):
        folder = add_weights(
            make_student_folder(tmp_path / kind, **SMALL | {"tie_word_embeddings": kind != "t5"} | changes)
        )
    else:
        sizes = changes if kind == "gpt2" else GROUPED | {"vocab_size": 72} | changes
        folder = add_weights(make_causal_folder(tmp_path / kind, kind, **sizes), make_causal_tokenizer())
    student = load(folder, fast=False).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in student.network.parameters():
            weight.mul_(torch.rand_like(weight) + 0.5)
    return student


def logits_of(model: Any) -> Tensor:
    """Transformers' own forward over ids of every row."""
    ids = torch.arange(2, 32).reshape(3, 10)
    inputs = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False, **inputs).logits  # type: ignore[no-any-return]


KINDS = ["t5", "tied-t5", "llama", "qwen2"]


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_nothing_removed_is_the_same_to_the_bit(tmp_path: Path, kind: str) -> None:
    student = student_of(tmp_path, kind)
    every = range(student.layers("decoder"))
    structure = Structure(student, dict.fromkeys(("encoder", "decoder"), every))
    scores = magnitude(structure) if kind != "gpt2" else Scores()
    keep = Keep(
        units={name: best(own, len(own)) for name, own in scores.units.items()},
        heads=best_heads(structure, scores.heads, 3) if scores.heads else {},
        d_model=None if scores.d_model is None or kind == "gpt2" else best(scores.d_model, 24),
        vocabulary=torch.arange(student.network.config.vocab_size),
    )
    model = shrink(structure, keep)
    assert logits_of(model).equal(logits_of(student.network))
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in student.network.state_dict().items()
    }


@pytest.mark.parametrize(("kind", "kept"), [("t5", [1, 2]), ("tied-t5", [0, 2]), ("llama", [0, 2]), ("gpt2", [1])])
def test_layers_are_those_of_the_larger_model(tmp_path: Path, kind: str, kept: list[int]) -> None:
    student = student_of(tmp_path, kind)
    model = shrink(Structure(student, {"encoder": kept, "decoder": kept}), Keep())
    network: Any = student.network
    stacks = {"llama": [(network.model, "layers")] if kind == "llama" else [], "gpt2": []}
    if kind == "gpt2":
        stacks["gpt2"] = [(network.transformer, "h")]
    of_t5 = [(network.encoder, "block"), (network.decoder, "block")] if "t5" in kind else []
    for stack, name in stacks.get(kind, of_t5):
        layers = getattr(stack, name)
        if "t5" in kind and 0 not in kept:
            # the bias stays with the first, whichever that is
            first, new = (layers[i].layer[0].SelfAttention for i in (0, kept[0]))
            new.has_relative_attention_bias, new.relative_attention_bias = True, first.relative_attention_bias
        setattr(stack, name, nn.ModuleList(layers[i] for i in kept))
    if "t5" not in kind:
        network.config.num_hidden_layers = len(kept)
    assert logits_of(model).equal(logits_of(network))


def test_weights_sliced_by_hand(tmp_path: Path) -> None:
    student = student_of(tmp_path, "t5")
    old = student.network.state_dict()
    units, heads, cross = torch.tensor([1, 4, 19]), torch.tensor([0, 2]), torch.tensor([1, 2])
    channels = torch.tensor([*range(2, 22)])
    structure = Structure(student, {"decoder": [2]})
    by_place = {name: heads if "SelfAttention" in name else cross for name in magnitude(structure).heads}
    keep = Keep(
        dict.fromkeys(magnitude(structure).units, units),
        {**by_place, "decoder.block.0.layer.0.SelfAttention": heads},
        channels,
    )
    new = shrink(structure, keep).state_dict()
    # heads of 8
    own = torch.tensor([*range(8), *range(16, 24)])
    of_cross = torch.tensor([*range(8, 24)])
    start, old_start = "decoder.block.0.layer.", "decoder.block.2.layer."
    assert new[f"{start}0.SelfAttention.q.weight"].equal(old[f"{old_start}0.SelfAttention.q.weight"][own][:, channels])
    assert new[f"{start}1.EncDecAttention.o.weight"].equal(
        old[f"{old_start}1.EncDecAttention.o.weight"][channels][:, of_cross]
    )
    assert new[f"{start}2.DenseReluDense.wi_1.weight"].equal(
        old[f"{old_start}2.DenseReluDense.wi_1.weight"][units][:, channels]
    )
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert new[bias].equal(old[bias][:, heads])
    assert new["lm_head.weight"].equal(old["lm_head.weight"][:, channels])
    norm = "decoder.final_layer_norm.weight"
    # the mean over fewer channels is larger
    assert new[norm].allclose(old[norm][channels] * (24 / 20) ** 0.5)
    assert len(new) == len(old) - 2 * len([name for name in old if name.startswith("decoder.block.1.")])


def test_magnitudes_are_products_of_norms(tmp_path: Path) -> None:
    student = student_of(tmp_path, "qwen2", num_key_value_heads=2, num_attention_heads=4, tie_word_embeddings=True)
    network: Any = student.network
    scores = magnitude(Structure(student))
    layer = network.model.layers[2]
    mlp, attention = layer.mlp, layer.self_attn
    into = mlp.gate_proj.weight[5].norm() * mlp.up_proj.weight[5].norm()
    torch.testing.assert_close(scores.units["model.layers.2.mlp"][5], into * mlp.down_proj.weight[:, 5].norm())
    # the second head of keys, of 8, with the third and fourth of queries
    values = torch.cat([attention.v_proj.weight[8:16].flatten(), attention.v_proj.bias[8:16]]).norm()
    expected = values * attention.o_proj.weight[:, 16:32].norm()
    torch.testing.assert_close(scores.heads["model.layers.2.self_attn"][1], expected)
    # a tied embedding writes a channel and reads it
    written, read = ([network.model.embed_tokens.weight[:, 7]] for _ in range(2))
    for one in network.model.layers:
        written += [one.self_attn.o_proj.weight[7], one.mlp.down_proj.weight[7]]
        matrices = (
            one.self_attn.q_proj,
            one.self_attn.k_proj,
            one.self_attn.v_proj,
            one.mlp.gate_proj,
            one.mlp.up_proj,
        )
        read += [matrix.weight[:, 7] for matrix in matrices]
    assert scores.d_model is not None
    torch.testing.assert_close(scores.d_model[7], torch.cat(written).norm() * torch.cat(read).norm())


def unlabelled(student: Student) -> list[Any]:
    ids = torch.randint(4, 40, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return [{"label": {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.full((3, 1), -100)}}]


def by_features(structure: Structure) -> Scores:
    return features(structure, unlabelled(structure.student))


@pytest.mark.parametrize("score", [magnitude, by_features])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_zero_goes_without_a_trace(tmp_path: Path, kind: str, score: Callable[[Structure], Scores]) -> None:
    student = student_of(tmp_path, kind)
    structure = Structure(student)
    with torch.no_grad():
        for name, weight in structure.network.named_parameters():
            # another unit of each layer; T5's biases make all self-attentions of a stack keep the same heads
            module = name.rpartition(".")[0]
            place = sum(map(ord, module.rpartition(".")[0])) % 20
            for axis, at in enumerate(structure.axes(name)):
                size, groups = weight.shape[axis], structure.groups
                dead = {"unit": [place], "d_model": [3, 5, 9, 17], "head": [*range(size // groups, 2 * size // groups)]}
                if at in dead and "relative" not in name:
                    weight.index_fill_(axis, torch.tensor(dead[at]), 0.0)
    expected = logits_of(structure.network)
    scores = score(structure)
    units = structure.network.config.d_ff if "t5" in kind else 32
    keep = Keep(
        {name: best(own, units - 1) for name, own in scores.units.items()},
        best_heads(structure, scores.heads, 2),
        best(scores.d_model, 20) if scores.d_model is not None else None,
    )
    assert {len(own) for own in keep.heads.values()} == {2}
    # sums of fewer terms are rounded otherwise
    error = (logits_of(shrink(structure, keep)) - expected).abs().max()
    assert error <= 1e-6 * max(1.0, float(expected.abs().max()))


def test_features_are_means_over_real_tokens(tmp_path: Path) -> None:
    student = student_of(tmp_path, "llama")
    network: Any = student.network
    (batch,) = unlabelled(student)
    scores = by_features(Structure(student))
    read: dict[str, list[Tensor]] = {"mlp.down_proj": [], "self_attn.o_proj": []}
    layer = network.model.layers[1]
    rows = [batch["label"]["input_ids"][row : row + 1, :length] for row, length in enumerate([6, 4, 6])]
    texts = [network.generate(ids, max_new_tokens=32, do_sample=False) for ids in rows]
    for name, found in read.items():
        layer.get_submodule(name).register_forward_pre_hook(lambda _, given, found=found: found.extend(given[0][0]))
    with torch.no_grad():
        for text in texts:
            network(input_ids=text)
    units, heads = (torch.stack(found) for found in read.values())
    expected = units.abs().mean(dim=0) * representative(layer.mlp.down_proj.weight.T)
    torch.testing.assert_close(scores.units["model.layers.1.mlp"], expected)
    # three pairs of heads of 8
    added = [
        heads[:, 16 * i : 16 * i + 16] @ layer.self_attn.o_proj.weight[:, 16 * i : 16 * i + 16].T for i in range(3)
    ]
    norms = torch.stack([each.norm(dim=1).mean() for each in added])
    torch.testing.assert_close(scores.heads["model.layers.1.self_attn"], norms)


def test_masking_is_its_formula() -> None:
    filters = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    x = filters.double()
    pairs = [float((x[i] - x[j]).norm()) for i in range(7) for j in range(7) if i != j]
    width = sorted(pairs)[(len(pairs) - 1) // 2]
    kernel = [[float(torch.exp(-(((x[i] - x[j]).norm() / width) ** 2))) for j in range(7)] for i in range(7)]
    c = [[1 / 7] * 7 for _ in range(7)]
    while True:
        product = [[sum(kernel[i][k] * c[k][j] for k in range(7)) for j in range(7)] for i in range(7)]
        new = [[c[i][j] * (kernel[i][j] / product[i][j]) ** 0.5 for j in range(7)] for i in range(7)]
        before, after = (sum(map(sum, each)) for each in (c, new))
        c = new
        if abs(after - before) < 0.01 * before:
            break
    torch.testing.assert_close(representative(filters), torch.tensor([c[i][i] for i in range(7)]), rtol=1e-4, atol=1e-6)


def test_a_filter_that_others_give_counts_less() -> None:
    apart = torch.eye(6) * 3
    scores = representative(torch.cat([apart, apart[:1]]))
    assert scores[0] < scores[1:6].min()
    assert scores[6] < scores[1:6].min()


def test_widths_of_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^d_ff: the width of a 'gpt2' cannot change; allowed are t5, "):
        Structure(student_of(tmp_path, "gpt2")).check_widths("d_ff")
