"""Trimmed vocabularies: the same pieces of the same texts, and the same logits of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_distill.errors import UserError
from lit_distill.shrinking.shrink import shrink
from lit_distill.shrinking.structure import Keep, Structure
from lit_distill.shrinking.vocabulary import check_same, lines_of, texts_of, trim, used_pieces
from lit_distill.students import Tokens, load_tokens
from lit_distill.students.tokens import CausalTokens, save_tokenizer
from tests.runs import REPOSITORY
from tests.shrinking.test_shrink import student_of
from tests.students import make_student_folder

SHARED = REPOSITORY.parent / "shared" / "models"
TEXTS = [
    "the lower the widest newest lowest wide new old",
    "wider and newer, 12 of 305 are older!\tYes",
    "naïve 中文 the the lowlands",
]
CORPUS = ["the newest wide lowlands", "12 naïve older ones"]


def bpe(texts: list[str] = TEXTS) -> PreTrainedTokenizerFast:
    """Byte-level byte pair encoding, as GPT-2's, with special tokens after the pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts * 5, trainer)
    tokenizer.add_special_tokens(["<s>", "</s>", "<|user|>"])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's unigram model, as T5's, with two sentinels."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    tokenizer.add_special_tokens(["<extra_id_1>", "<extra_id_0>"])
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_texts_of_the_corpus_stay_in_the_same_pieces(kind: str, tmp_path: Path) -> None:
    old = CausalTokens(bpe()) if kind == "bpe" else Tokens(unigram())
    # a character that the vocabulary lacks, too
    corpus = [texts_of([*CORPUS, "new ☃"])]
    kept = used_pieces(old, corpus, sentinels=False)
    tokenizer = trim(old.tokenizer, kept)
    check_same(old, type(old)(tokenizer), kept, corpus)
    assert len(tokenizer) == len(kept) < len(old.tokenizer)
    assert len(kept) % 8 == 0
    assert tokenizer.convert_ids_to_tokens(list(range(len(kept)))) == old.tokenizer.convert_ids_to_tokens(kept)
    for text in CORPUS:
        assert tokenizer.tokenize(text) == old.tokenizer.tokenize(text)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == old.tokenizer.decode(old.tokenizer(text)["input_ids"])
    # other texts, in smaller pieces
    other = "the oldest 305"
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in tokenizer(other)["input_ids"]
    assert tokenizer.decode(tokenizer(other)["input_ids"], skip_special_tokens=True) == other
    assert "<extra_id_0>" not in tokenizer.get_vocab()
    assert [tokenizer.eos_token, tokenizer.pad_token] == [old.tokenizer.eos_token, old.tokenizer.pad_token]
    save_tokenizer(tokenizer, tmp_path)
    assert not (tmp_path / "spiece.model").exists()
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_sentinels_on_request() -> None:
    old = Tokens(unigram())
    kept = used_pieces(old, [texts_of(CORPUS)], sentinels=True)
    first = kept.index(old.tokenizer.get_vocab()["<extra_id_0>"])
    assert trim(old.tokenizer, kept)("<extra_id_0> new")["input_ids"][0] == first


def test_all_that_a_piece_is_merged_from_is_kept() -> None:
    old = CausalTokens(bpe(["abcd abcd ab cd"]))
    vocabulary = old.tokenizer.get_vocab()
    assert {"ab", "cd", "Ġab", "Ġabcd", "abcd"} <= vocabulary.keys()
    kept = used_pieces(old, [texts_of(["x abcd"])], sentinels=False)
    names = set(old.tokenizer.convert_ids_to_tokens(kept))
    assert "Ġabcd" in names
    # its merges, of which the first word alone needs another
    merges = json.loads(trim(old.tokenizer, kept).backend_tokenizer.to_str())["model"]["merges"]
    assert {a + b for a, b in merges} <= names
    assert "abcd" not in names


def test_a_corpus_that_becomes_other_pieces_is_refused() -> None:
    old = Tokens(unigram())
    kept = used_pieces(old, [texts_of(CORPUS)], sentinels=False)
    with pytest.raises(UserError, match=r"^vocabulary: without the other pieces, '.* would be other pieces$"):
        check_same(old, Tokens(trim(old.tokenizer, kept)), kept, [texts_of(TEXTS)])


def test_a_corpus_without_pieces_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("\n7\n")
    with pytest.raises(UserError, match=r"^vocabulary: the corpus uses no piece besides the \d+ that are always kept"):
        used_pieces(CausalTokens(bpe()), [lines_of([str(tmp_path / "text")])], sentinels=False)


@pytest.mark.parametrize("kind", ["t5", "tied-t5", "llama", "qwen2", "gpt2"])
def test_logits_of_kept_ids_are_the_same_to_the_bit(tmp_path: Path, kind: str) -> None:
    student = student_of(tmp_path, kind)
    kept = [0, 1, 2, *range(5, 44, 3)]
    smaller = shrink(Structure(student), Keep(vocabulary=torch.tensor(kept)))
    ids = torch.tensor([range(len(kept))])
    own: Any = ({"decoder_input_ids": ids.flip(1)}, {"decoder_input_ids": torch.tensor([kept[::-1]])})
    new, old = own if "t5" in kind else ({}, {})
    with torch.no_grad():
        logits = smaller(input_ids=ids, **new).logits
        expected = student.network(input_ids=torch.tensor([kept]), **old).logits[..., kept]
        assert logits.equal(expected)
        # one vector is multiplied in another way
        states = torch.randn(1, 24 if kind != "gpt2" else 16)
        head, own_head = (model.get_output_embeddings() for model in (student.network, smaller))
        assert own_head(states).equal(head(states)[:, kept])
    assert smaller.config.vocab_size == len(kept)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the tokenizer of T5 v1.1 is not here")
def test_t5s_own_tokenizer_is_no_longer_one_with_sentinels(tmp_path: Path) -> None:
    old = load_tokens(SHARED / "t5-v1_1-small")
    corpus = (REPOSITORY / "README.md").read_text().splitlines()[:60]
    kept = used_pieces(old, [texts_of(corpus)], sentinels=False)
    save_tokenizer(trim(old.tokenizer, kept), make_student_folder(tmp_path))
    new = load_tokens(tmp_path)
    vocabulary = new.tokenizer.get_vocab()
    assert len(vocabulary) == len(new.tokenizer) == len(kept) < 3000
    assert not [piece for piece in vocabulary if "extra_id" in piece]
    assert not (tmp_path / "spiece.model").exists()
    assert [new.tokenizer.tokenize(text) for text in corpus] == [old.tokenizer.tokenize(text) for text in corpus]
    assert new.decode(new.targets(corpus, 10**9).ids) == old.decode(old.targets(corpus, 10**9).ids)
