"""GGUF files: what gguf's own reader finds in them, and what is refused."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from transformers import T5Tokenizer

from lit_distill.errors import UserError
from lit_distill.exporting.gguf import check_gguf, same_pieces, write_gguf
from lit_distill.students import Student, StudentFiles, load
from tests.students import WORDS, add_weights, make_causal_folder, make_student_folder

TEXTS = [" ".join(WORDS[3 + (3 * i + j) % 27] for j in range(2 + i)) for i in range(9)]
SIZES = {"vocab_size": 64, "d_model": 32, "num_layers": 3}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A SentencePiece model that normalises a ligature and tabs, as T5's does; T5's whole rules are read slowly."""
    made, rules = io.BytesIO(), tmp_path_factory.mktemp("rules") / "rules.tsv"
    rules.write_text("FB01\t66 69\n9\t20\n")
    settings: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_writer=made, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_tsv=str(rules), **settings,
    )  # fmt: skip
    return ModelProto.FromString(made.getvalue())


def make(folder: Path, pieces: Any, **changes: Any) -> Student:
    vocabulary = [(one.piece, one.score) for one in pieces.pieces]
    tokenizer = T5Tokenizer(
        vocab=[*vocabulary, ("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)],
        _spm_precompiled_charsmap=pieces.normalizer_spec.precompiled_charsmap,
        extra_ids=2,
    )
    return load(add_weights(make_student_folder(folder, **SIZES | changes), tokenizer)).eval()


def written(student: Student, folder: Path, quantization: str = "float32") -> GGUFReader:
    folder.mkdir()
    write_gguf(student.network, student.tokenizer, quantization, folder)
    return GGUFReader(folder / "model.gguf")


def logits(student: Student) -> torch.Tensor:
    ids, labels = torch.tensor([[5, 9, 12, 1], [7, 1, 0, 0]]), torch.tensor([[8, 6, 1], [9, 1, -100]])
    network: Any = student.network
    found: torch.Tensor = network(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels).logits
    return found


def in_blocks(raw: Any) -> Any:
    """Q8_0: blocks of a scale in 16 bits and 32 numbers in 8."""
    blocks = raw.reshape(-1, 34)
    return (blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].copy().view(np.int8)).reshape(-1)


@pytest.mark.parametrize("quantization", ["float32", "bf16", "int8"])
def test_weights_by_another_reader(quantization: str, pieces: Any, tmp_path: Path) -> None:
    student = make(tmp_path / "student", pieces)
    tensors = {one.name: one for one in written(student, tmp_path / "small", quantization).tensors}
    own = student.network.state_dict()
    for name, key in {
        "token_embd": "shared",
        "output": "lm_head",
        "enc.output_norm": "encoder.final_layer_norm",
        "enc.blk.0.attn_rel_b": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "enc.blk.2.attn_o": "encoder.block.2.layer.0.SelfAttention.o",
        "enc.blk.1.ffn_gate": "encoder.block.1.layer.1.DenseReluDense.wi_0",
        "dec.blk.1.cross_attn_k": "decoder.block.1.layer.1.EncDecAttention.k",
        "dec.blk.1.ffn_down": "decoder.block.1.layer.2.DenseReluDense.wo",
    }.items():
        found, weight = tensors[f"{name}.weight"], own[f"{key}.weight"]
        assert list(found.shape) == list(weight.shape)[::-1]
        plain = weight.ndim == 1 or "rel_b" in name or (quantization == "int8" and weight.shape[1] % 32)
        assert found.tensor_type.name == ("F32" if plain else {"bf16": "BF16", "int8": "Q8_0"}.get(quantization, "F32"))
        if found.tensor_type.name == "F32":
            assert np.array_equal(found.data, weight)
        elif found.tensor_type.name == "BF16":
            bits = found.data.view(np.uint16).astype(np.uint32).reshape(weight.shape) << 16
            assert np.array_equal(bits.view(np.float32), weight.bfloat16().float())
        else:
            blocks = weight.reshape(-1, 32)
            apart = (torch.from_numpy(in_blocks(found.data)).view(-1, 32) - blocks).abs().amax(dim=1)
            # half a step, and what its 16 bits round of up to 127 steps
            assert (apart <= blocks.abs().amax(dim=1) * (0.5 / 127 + 2**-11) + 1e-7).all()
    assert len(tensors) == len([name for name in own if "embed_tokens" not in name])


def test_sizes_and_tokenizer(pieces: Any, tmp_path: Path) -> None:
    reader = written(make(tmp_path / "student", pieces), tmp_path / "small", "int8")

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    sizes = {
        "context_length": 512, "embedding_length": 32, "feed_forward_length": 32, "block_count": 3,
        "decoder_block_count": 2, "attention.head_count": 2, "attention.key_length": 8, "attention.value_length": 8,
        "attention.relative_buckets_count": 32, "decoder_start_token_id": 0,
    }  # fmt: skip
    assert {name: field(f"t5.{name}") for name in sizes} == sizes
    assert field("t5.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert (field("general.architecture"), field("general.file_type")) == ("t5", 7)
    own = pieces.pieces
    rest = range(len(own), 64)
    assert field("tokenizer.ggml.tokens") == [*(one.piece for one in own), *(f"[PAD{number}]" for number in rest)]
    assert field("tokenizer.ggml.token_type") == [*(one.type for one in own), *(5 for _ in rest)]
    assert field("tokenizer.ggml.scores")[: len(own)] == pytest.approx([one.score for one in own])
    assert bytes(field("tokenizer.ggml.precompiled_charsmap")) == pieces.normalizer_spec.precompiled_charsmap
    names = ("model", "eos_token_id", "padding_token_id", "unknown_token_id", "add_eos_token", "add_space_prefix")
    assert [field(f"tokenizer.ggml.{name}") for name in names] == ["t5", 1, 0, 2, True, True]
    assert field("tokenizer.ggml.remove_extra_whitespaces")


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True, "feed_forward_proj": "relu"}, {"model_type": "mt5"}]
)
def test_a_file_is_the_student(changes: dict[str, Any], pieces: Any, tmp_path: Path) -> None:
    student = make(tmp_path / "student", pieces, **changes)
    written(student, tmp_path / "small")
    torch.testing.assert_close(logits(load(tmp_path / "small").eval()), logits(student), rtol=1e-5, atol=1e-5)


def test_pieces_are_compared(pieces: Any, tmp_path: Path) -> None:
    student = make(tmp_path / "student", pieces)
    written(student, tmp_path / "small")
    texts = [*TEXTS, "the ﬁve  cats\tare"]
    assert same_pieces(student.tokens, tmp_path / "small", texts) == 1
    other = ModelProto.FromString(pieces.SerializeToString())
    longest = max(other.pieces, key=lambda one: len(one.piece))
    before, longest.score = longest.piece, -1000.0
    written(make(tmp_path / "other", other), tmp_path / "damaged")
    held = [before.lstrip("▁") in text for text in texts]
    assert same_pieces(student.tokens, tmp_path / "damaged", texts) == 1 - sum(held) / len(held) < 1


def test_refusals(pieces: Any, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj of the student must be one of relu, gated-gelu"),
        ({"relative_attention_max_distance": 64}, "relative_attention_max_distance of the student must be one of 128"),
        ({"num_decoder_layers": 4}, "transformers, which has to read the file, takes no more layers of a decoder"),
    ]
    for number, (changes, line) in enumerate(cases):
        make(tmp_path / str(number), pieces, **changes)
        with pytest.raises(UserError, match=f"to: gguf: {line}"):
            check_gguf(StudentFiles(tmp_path / str(number)))
    with pytest.raises(UserError, match="to: gguf is for t5 and mt5 students, this one is 'llama'; llama"):
        check_gguf(StudentFiles(make_causal_folder(tmp_path / "llama")))
    with pytest.raises(UserError, match="to: gguf needs a tokenizer of SentencePiece's unigram pieces"):
        check_gguf(StudentFiles(make_student_folder(tmp_path / "words")))


def test_a_file_that_lacks_a_weight_is_not_loaded(pieces: Any, tmp_path: Path) -> None:
    # of which transformers' reader leaves out the decoder's last layer, without a word
    student = make(tmp_path / "student", pieces, num_decoder_layers=4)
    written(student, tmp_path / "small")
    with pytest.raises(UserError, match=r"student: cannot load .* \(model.gguf lacks decoder.block.3.layer.0"):
        load(tmp_path / "small")
