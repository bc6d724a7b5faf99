"""Cut a smaller model out of a student."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedModel

from lit_distill.errors import UserError
from lit_distill.shrinking.importance import best, best_heads, magnitude
from lit_distill.shrinking.structure import Keep, Structure, owner, positions
from lit_distill.students import Student
from lit_distill.students.models import build_model, true_config


def shrink(structure: Structure, keep: Keep) -> PreTrainedModel:
    """A model with copies of the weights that are kept, in the student's dtype.

    Norms divide by the root of a mean over d_model, so with fewer channels their weights grow by the square root of the
    ratio, and their epsilon by the ratio: channels without any value can go without a trace.

    Raises:
        UserError: the model cannot be built with other sizes.
    """
    config, weights = smaller_config(structure, keep), smaller_weights(structure, keep)
    dtype = str(next(structure.network.parameters()).dtype).removeprefix("torch.")
    try:
        return cast(PreTrainedModel, build_model(config, weights, dtype=cast(Any, dtype)).eval())
    except (StrictDataclassError, ValueError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"from: a {config['model_type']} of these sizes cannot be made ({told:.300})") from error


def smaller_config(structure: Structure, keep: Keep) -> dict[str, Any]:
    """The content of the smaller model's ``config.json``."""
    config = true_config(structure.network)
    _set_sizes(config, structure, keep)
    return config


def smaller_weights(structure: Structure, keep: Keep, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Copies of the weights that are kept, by their names in the smaller model.

    ``weights`` stand for the student's own; gradients of the copies reach those that require them.
    """
    given = structure.weights if weights is None else weights
    return {str(structure.name(name)): _cut(given[name], name, structure, keep) for name in structure.weights}


def without_zeros(student: Student) -> PreTrainedModel:
    """A student's model without the units and heads that are zero, as many of them as each layer has.

    Nothing else changes, and neither do the logits.
    """
    structure = Structure(student)
    scores = magnitude(structure)
    units = max(int(own.count_nonzero()) for own in scores.units.values())
    for number in range(1, structure.groups + 1):
        kept = best_heads(structure, scores.heads, number)
        if all(own[kept[name]].count_nonzero() == own.count_nonzero() for name, own in scores.heads.items()):
            break
    keep = Keep({name: best(own, max(units, 1)) for name, own in scores.units.items()}, kept)
    model = shrink(structure, keep)
    model.generation_config = student.network.generation_config
    return model


def _cut(value: Tensor, name: str, structure: Structure, keep: Keep) -> Tensor:
    """The part of a weight that is kept, as a copy."""
    module = name.rpartition(".")[0]
    for dim, axis in enumerate(structure.axes(name)):
        kept: Tensor | None = {
            "vocabulary": keep.vocabulary,
            "d_model": keep.d_model,
            "unit": keep.units.get(owner(module)),
            "head": keep.heads.get(owner(module)),
        }.get(axis or "")
        if kept is not None:
            size = value.shape[dim]
            places = positions(kept, structure.groups, size) if axis == "head" else kept
            value = value.index_select(dim, places.to(value.device))
    if keep.d_model is not None and structure.is_norm(name):
        # a tied T5's decoder divides what its head reads by the root of d_model itself
        scaled = name == "decoder.final_layer_norm.weight" and getattr(structure.config, "scale_decoder_outputs", False)
        value = value * (1.0 if scaled else (structure.student.width / len(keep.d_model)) ** 0.5)
    return value.clone()


def _set_sizes(config: dict[str, Any], structure: Structure, keep: Keep) -> None:
    """Write the sizes of what is kept into the content of a ``config.json``."""
    names: Mapping[str, str] = structure.config.attribute_map

    def put(name: str, size: int) -> None:
        config[names.get(name, name)] = size

    for stack, layers in structure.layers.items():
        total = structure.student.layers(stack)
        put("num_decoder_layers" if structure.is_seq2seq and stack == "decoder" else "num_hidden_layers", len(layers))
        if not structure.is_seq2seq:
            for name, value in config.items():
                # as `layer_types`
                if isinstance(value, list) and "layer" in name and len(value) == total:
                    config[name] = [value[layer] for layer in layers]
    if keep.units:
        put("d_ff" if structure.is_seq2seq else "intermediate_size", len(next(iter(keep.units.values()))))
    if keep.heads or keep.d_model is not None:
        own: Any = structure.config
        if not structure.is_seq2seq:
            # by default it is d_model divided by the heads
            config["head_dim"] = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    if keep.heads:
        number = len(next(iter(keep.heads.values())))
        put("num_attention_heads", number * structure.config.num_attention_heads // structure.groups)
        if not structure.is_seq2seq:
            put("num_key_value_heads", number)
    if keep.d_model is not None:
        put("hidden_size", len(keep.d_model))
        for name in ("layer_norm_epsilon", "rms_norm_eps"):
            if name in config:
                config[name] *= structure.student.width / len(keep.d_model)
    if keep.vocabulary is not None:
        put("vocab_size", len(keep.vocabulary))
        places = {int(old): new for new, old in enumerate(keep.vocabulary.tolist())}
        for name, value in config.items():
            if name.endswith("_token_id") and value is not None:
                ids = [places[one] for one in (value if isinstance(value, list) else [value]) if one in places]
                config[name] = ids if isinstance(value, list) else next(iter(ids), None)


def size_of(model: PreTrainedModel) -> dict[str, int]:
    """Numbers of parameters, and bytes of the weights; tied ones count once."""
    weights = list(model.parameters())
    embedded = {id(one): one for one in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    return {
        "parameters": sum(one.numel() for one in weights),
        "embeddings": sum(cast(torch.Tensor, one).numel() for one in embedded.values()),
        "bytes": sum(one.numel() * one.element_size() for one in weights),
    }
