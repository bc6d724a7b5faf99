"""Tiny models that teachers run: made on the spot, in a second or a few."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} says {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<go>{% endif %}"
)
"""Writes a chat for a talker; ``<go>`` is what its own tokenizer puts behind a text."""


def make_talker(folder: Path, text: str, words: Iterable[str] = (), *, chat: bool = False) -> Path:
    """A causal model that answers whatever it is asked with one text, word for word, and ends.

    Nothing is trained: a layer whose outputs are zero leaves a network that sees the last token alone, and its head is
    written by hand. The words of the answer are tokens of their own, one for each place, so that each is followed by
    one other; they are decoded as the words that they stand for.

    Args:
        folder: where it is saved.
        text: the answer; words between single spaces.
        words: the words of prompts; others are unknown to it, and answered all the same.
        chat: give its tokenizer a chat template.
    """
    places = [f"{word}@{i}" for i, word in enumerate(text.split(" "))]
    known = list(dict.fromkeys([*words, "system", "user", "assistant", "says"]))
    vocabulary = ["<pad>", "</s>", "<unk>", "<go>", *places, *known]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A <go>", special_tokens=[("<go>", 3)])
    # the second puts the spaces between
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(Regex(r"@\d+$"), ""), decoders.WordPiece(prefix="##", cleanup=False)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<go>"],
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.normal_()
        seen = model.model.norm(model.model.embed_tokens.weight)
        model.lm_head.weight.zero_()
        order = [3, *range(4, 4 + len(places)), 1]
        for now, after in pairwise(order):
            model.lm_head.weight[after] = seen[now]
    return _save(folder, model, fast)


def make_memory(folder: Path, answers: Mapping[str, str], *, steps: int = 150) -> Path:
    """A causal model (GPT-2) that has learnt answers to prompts by heart.

    It knows absolute positions alone, and its tokenizer has no token for padding. Its generation configuration is one
    that would spoil every answer.

    Args:
        folder: where it is saved.
        answers: prompt -> answer; words between single spaces.
        steps: of training.
    """
    tokenizer = _word_tokenizer([*answers, *answers.values()], ["</s>", "<unk>"], eos="</s>", unk_token="<unk>")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=48,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    rows, labels = [], []
    for prompt, answer in answers.items():
        asked = tokenizer(prompt)["input_ids"]
        said = [*tokenizer(answer)["input_ids"], 0]
        rows.append(torch.tensor([*asked, *said]))
        labels.append(torch.tensor([-100] * len(asked) + said))
    pad = torch.nn.utils.rnn.pad_sequence
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        # padding stands behind, where a causal model does not see it
        inputs, targets = pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=-100)
        _train(model, {"input_ids": inputs, "labels": targets}, steps)
    model.generation_config.update(
        do_sample=True, temperature=9.0, top_k=3, repetition_penalty=50.0, no_repeat_ngram_size=1, max_length=3
    )
    return _save(folder, model, tokenizer)


def make_reader(folder: Path, answers: Mapping[str, str], *, steps: int = 240) -> Path:
    """An encoder-decoder (T5) that has learnt answers to prompts by heart.

    Args:
        folder: where it is saved.
        answers: prompt -> answer; words between single spaces.
        steps: of training.
    """
    tokenizer = _word_tokenizer(
        [*answers, *answers.values()], ["<pad>", "</s>", "<unk>"], eos="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    # as T5's own does
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,  # type: ignore[call-arg] # kept with the rest
        pad_token_id=0,
        eos_token_id=1,
    )
    pad = torch.nn.utils.rnn.pad_sequence
    asked = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in answers]
    said = [torch.tensor(tokenizer(answer)["input_ids"]) for answer in answers.values()]
    inputs = pad(asked, batch_first=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config)
        _train(
            model,
            {
                "input_ids": inputs,
                "attention_mask": (inputs != 0).long(),
                "labels": pad(said, batch_first=True, padding_value=-100),
            },
            steps,
        )
    return _save(folder, model, tokenizer)


def _word_tokenizer(texts: Sequence[str], special: list[str], *, eos: str, **names: str) -> PreTrainedTokenizerFast:
    words = list(dict.fromkeys([*special, *(word for text in texts for word in text.split())]))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, **names)


def _train(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], steps: int) -> None:
    """Until it knows the batch by heart."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        slower.step()
    assert loss.item() < 0.1, f"not learnt by heart: {loss.item():.3f}"


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
