"""A teacher that transformers runs in this process: any causal or encoder-decoder model, on a GPU or without one."""

import gc
import hashlib
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_distill import checks
from lit_distill.errors import UserError
from lit_distill.questions import Layout, Prompt, Question, Reply, turns
from lit_distill.teachers.base import BatchTeacher, TeacherError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

DType = Literal["auto", "float32", "bfloat16", "float16"]

_VOCABULARY = (
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens"),
)
"""What is kept of a model's generation configuration: what its tokens are, not how to draw them."""


class TransformersTeacher(BatchTeacher):
    """A model of the Hugging Face hub, or of a folder, that answers in this process.

    An answer depends on what is asked alone. Of the ``generation_config.json`` that comes with the model only the
    tokens are kept (which end an answer, which pad it): its own temperature, top-k or repetition penalty would give
    other answers than the same question asked of another teacher. A sample is drawn by noise that follows from the
    question's seed and prompt, row by row: it is the same in whatever batch the question stands, as far as the
    numbers of the model are (padding and the batch's size change them in their last digits), and the random
    generators of the process are not touched. Another device draws other noise.

    Where a chat template refuses the system's turn, as Gemma's does, the instruction stands before the first question.

    Args:
        model: a name on the hub, or a folder in the Hugging Face format.
        batch_size: questions in a batch; one that does not fit into memory is halved.
        layout: prompts as the turns of a ``chat`` or as a text for ``completion``; if not given, a chat where the
            tokenizer has a template for one.
        dtype: type of the weights; ``auto`` takes the one that they are stored in.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; if not given, ``cuda`` where there is one, else ``cpu``.
        logprobs: also give the mean log-probability of an answer's tokens, its end among them, as the model has them
            before temperature and ``top_p``.
        **kwargs: the arguments of `Teacher`.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 8,
        layout: Layout | None = None,
        dtype: DType = "auto",
        device: str | None = None,
        logprobs: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, batch_size, **kwargs)
        self._layout: Layout | None = checks.check_choice("layout", layout, ("chat", "completion", None))
        self.dtype: DType = checks.check_choice("dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
        self.device = None if device is None else checks.check_text("device", device)
        self.logprobs = checks.check_bool("logprobs", logprobs)
        self._network: Any = None

    @property
    def layout(self) -> Layout:
        """Prompts as the turns of a chat or as a text to go on with; reads the tokenizer where it was not given."""
        if self._layout is None:
            self._layout = "chat" if self.tokenizer.chat_template else "completion"
        return self._layout

    @layout.setter
    def layout(self, value: Layout) -> None:
        self._layout = value

    @property
    def settings(self) -> dict[str, Any]:
        """What the answers depend on beside the question."""
        return super().settings | {"dtype": self.dtype}

    @cached_property
    def config(self) -> "PreTrainedConfig":
        """The model's configuration.

        Raises:
            UserError: there is none.
        """
        from transformers import AutoConfig

        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(self.model, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable("its configuration", error) from error
        return config

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer.

        Raises:
            UserError: there is none.
        """
        from transformers import AutoTokenizer, PreTrainedTokenizerBase

        # without its files transformers would make an empty one from the configuration's `model_type`
        folder = Path(self.model)
        if folder.is_dir() and not any(
            [*folder.glob("tokenizer*"), *folder.glob("*.model"), *folder.glob("vocab*"), *folder.glob("*.tiktoken")]
        ):
            raise UserError(f"model: no tokenizer in the folder {self.model!r}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable("its tokenizer", error) from error
        assert isinstance(tokenizer, PreTrainedTokenizerBase)  # noqa: S101 - for mypy
        return tokenizer

    def count_tokens(self, prompt: Prompt) -> int:
        """Tokens of a prompt, exactly."""
        return len(self._encode(prompt))

    def load(self) -> None:
        """Load the weights onto the device."""
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        if self.layout == "chat" and not self.tokenizer.chat_template:
            raise UserError(f"layout: {self.model!r} has no chat template, so it has to be completion")
        device = self._device()
        kind: Any = AutoModelForSeq2SeqLM if self.config.is_encoder_decoder else AutoModelForCausalLM
        try:
            network, found = kind.from_pretrained(
                self.model,
                dtype=self.dtype,
                trust_remote_code=False,
                # both are told in a line of our own
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            self._check_weights(found)
            network = network.to(device).eval()
        except UserError:
            raise
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise UserError(f"model: {self.model!r} does not fit into the memory of {device}") from error
        except (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError) as error:
            raise self._unreadable("its weights", error) from error
        network.generation_config = self._vocabulary(network.generation_config)
        self._network = network

    def _check_weights(self, found: Mapping[str, Any]) -> None:
        """See that no weight is one that transformers has drawn at random, of which it only warns."""
        for kind, what in (("missing_keys", "does not hold"), ("mismatched_keys", "has in another size")):
            # a mismatch comes with its sizes
            names = sorted(name if isinstance(name, str) else str(name[0]) for name in found.get(kind) or ())
            if names:
                few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise UserError(f"model: {self.model!r} {what} the weights {few}, which would be drawn at random")

    def unload(self) -> None:
        """Free the device."""
        self._network = None
        _free_memory()

    def answer_batch(self, questions: Sequence[Question]) -> list[Reply | TeacherError]:
        """Answer a batch: what is drawn alike together, what does not fit halved."""
        if self._network is None:
            raise RuntimeError(f"{type(self).__name__} answers between open() and close()")
        replies: dict[int, Reply | TeacherError] = {}
        groups: dict[Hashable, list[tuple[int, list[int]]]] = {}
        for i, question in enumerate(questions):
            ids = self._encode(question.prompt)
            if problem := self._too_long(len(ids), question.sampling.max_new_tokens):
                replies[i] = TeacherError(problem)
                continue
            sampling = question.sampling
            alike = (sampling.temperature, sampling.top_p, sampling.max_new_tokens, question.stop)
            groups.setdefault(alike, []).append((i, ids))
        for rows in groups.values():
            answers = self._generate_fitting([questions[i] for i, _ in rows], [ids for _, ids in rows])
            replies |= zip((i for i, _ in rows), answers, strict=True)
        return [replies[i] for i in range(len(questions))]

    def _device(self) -> "torch.device":
        import torch

        if self.device is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            # a name alone says nothing of what is here
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"device: {self.device!r} cannot be used here ({_first_line(error)})") from error
        return device

    def _vocabulary(self, own: "GenerationConfig") -> "GenerationConfig":
        """A generation configuration that holds tokens only."""
        from transformers import GenerationConfig

        kept = {name: getattr(own, name, None) for name in _VOCABULARY}
        for name in ("decoder_start_token_id", "eos_token_id", "bos_token_id", "pad_token_id"):
            if kept[name] is None:
                kept[name] = getattr(self.config, name, None)
        ends = kept["eos_token_id"]
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        if self.tokenizer.eos_token_id is not None:
            ends.add(self.tokenizer.eos_token_id)
        kept["eos_token_id"] = sorted(ends) or None
        pads = (kept["pad_token_id"], self.tokenizer.pad_token_id, *sorted(ends), 0)
        kept["pad_token_id"] = next(pad for pad in pads if pad is not None and pad >= 0)
        return GenerationConfig(**kept)

    def _encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt.

        Raises:
            TeacherError: the chat template has no place for these turns.
        """
        from jinja2 import TemplateError

        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        chat = turns(prompt)
        try:
            text = self._templated(chat)
        except (TemplateError, ValueError) as error:
            refusal = TeacherError(f"the chat template of {self.model} refuses the prompt: {_first_line(error)}")
            if [turn["role"] for turn in chat[:2]] != ["system", "user"]:
                raise refusal from error
            instruction, first, *others = chat
            folded = {"role": "user", "content": f"{instruction['content']}\n\n{first['content']}"}
            try:
                text = self._templated([folded, *others])
            except (TemplateError, ValueError):
                raise refusal from error
        # the template has written the special tokens
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _templated(self, chat: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def _too_long(self, prompt: int, answer: int) -> str | None:
        """Why a prompt of so many tokens cannot be answered in so many."""
        if not prompt:
            return "the prompt is empty"
        limit = getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if not isinstance(limit, int):
            return None
        # an encoder and its decoder count on their own, and a decoder's first token is no part of the answer
        needed = max(prompt, answer + 1) if self.config.is_encoder_decoder else prompt + answer
        if needed <= limit:
            return None
        return f"a prompt of {prompt} tokens and {answer} new ones do not fit into the model's context of {limit}"

    def _generate_fitting(
        self, questions: Sequence[Question], prompts: Sequence[list[int]]
    ) -> list[Reply | TeacherError]:
        """Generate; where memory does not suffice, one half after the other."""
        try:
            return [*self._generate(questions, prompts)]
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        # beyond the `except`, whose traceback holds the tensors of the attempt
        _free_memory()
        if len(questions) == 1:
            return [TeacherError(f"out of memory with a prompt of {len(prompts[0])} tokens on its own")]
        half = (len(questions) + 1) // 2
        return [
            *self._generate_fitting(questions[:half], prompts[:half]),
            *self._generate_fitting(questions[half:], prompts[half:]),
        ]

    def _generate(self, questions: Sequence[Question], prompts: Sequence[list[int]]) -> list[Reply]:
        """Generate for questions that differ in prompt and seed alone."""
        import torch
        from transformers import (
            GenerationConfig,
            LogitsProcessorList,
            StoppingCriteriaList,
            TemperatureLogitsWarper,
            TopPLogitsWarper,
        )

        network, sampling, stop = self._network, questions[0].sampling, questions[0].stop
        width = max(map(len, prompts))
        pad = network.generation_config.pad_token_id
        rows, mask = [], []
        for ids in prompts:
            padding = width - len(ids)
            # an encoder is padded behind its text; what is gone on with has to stand at the end
            left, right = (0, padding) if self.config.is_encoder_decoder else (padding, 0)
            rows.append([pad] * left + ids + [pad] * right)
            mask.append([0] * left + [1] * len(ids) + [0] * right)
        processors = LogitsProcessorList()
        watch = _LogProbs()
        if self.logprobs:
            processors.append(watch)
        if sampling.temperature > 0:
            processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(float(sampling.top_p)))
            processors.append(_Noise(questions, network.device))
        start = 1 if self.config.is_encoder_decoder else width
        ends = _StopTexts(self.tokenizer, stop, start)
        with torch.inference_mode():
            sequences = network.generate(
                input_ids=torch.tensor(rows, device=network.device),
                attention_mask=torch.tensor(mask, device=network.device),
                # the noise makes the likeliest token a drawn one
                generation_config=GenerationConfig(
                    do_sample=False, num_beams=1, max_new_tokens=sampling.max_new_tokens, use_cache=True
                ),
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([ends] if stop else []),
            )
            logprobs = watch.finish(sequences) if self.logprobs else None
        eos = set(network.generation_config.eos_token_id or ())
        replies = []
        for i, answer in enumerate(sequences[:, start:].tolist()):
            length, finish = _end(answer, eos, ends.lengths.get(i))
            text_ids = answer[: length - 1] if answer[length - 1] in eos else answer[:length]
            text = _decode(self.tokenizer, text_ids)
            cut = min((at for at in map(text.find, stop) if at >= 0), default=None)
            replies.append(
                Reply(
                    text=text[:cut],
                    finish=finish if cut is None else "stop",
                    input_tokens=len(prompts[i]),
                    output_tokens=length,
                    logprob=None if logprobs is None else math.fsum(logprobs[i][:length]) / length,
                )
            )
        return replies

    def _unreadable(self, what: str, error: Exception) -> UserError:
        hint = "" if Path(self.model).exists() else "; it is no folder here, so it has to be a name on the hub"
        return UserError(f"model: cannot load {what} from {self.model!r} ({_first_line(error)}){hint}")


class _LogProbs:
    """Keeps what the model gave each token that was taken; as a logits processor it sees each step's logits."""

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._taken: list[Tensor] = []

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        """Look at a step: ``input_ids``, ``(batch, len)``, ends with the token of the last one."""
        self._take(input_ids[:, -1:])
        self._last = scores.float().log_softmax(-1)
        return scores

    def finish(self, sequences: "Tensor") -> list[list[float]]:
        """The log-probability of each generated token, row by row.

        Args:
            sequences: all tokens, ``(batch, len)``.
        """
        import torch

        self._take(sequences[:, -1:])
        rows: list[list[float]] = torch.cat(self._taken, dim=1).tolist()
        return rows

    def _take(self, tokens: "Tensor") -> None:
        if self._last is not None:
            self._taken.append(self._last.gather(-1, tokens))


class _Noise:
    r"""Makes the likeliest token a sample, by noise of each row's own.

    With :math:`g_i` drawn from the Gumbel distribution, :math:`\arg\max_i (s_i + g_i)` is distributed as the softmax of
    the scores :math:`s` (Maddison et al., 2014, "A* sampling", section 2).
    """

    def __init__(self, questions: Sequence[Question], device: "torch.device") -> None:
        import torch

        self._generators = [torch.Generator(device).manual_seed(_seed(question)) for question in questions]

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        """Add the noise of a step to ``scores``, ``(batch, vocabulary)``."""
        import torch

        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.clamp_min_(torch.finfo(torch.float32).tiny).log_()


class _StopTexts:
    """Ends a row once its answer, never its prompt, holds a stop text; notes how many tokens that took.

    (The criterion that transformers has for it also finds a text that begins in the prompt.)
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: tuple[str, ...], start: int) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, stop, start
        # up to four tokens for a character, where a vocabulary falls back on bytes
        self._tail = 4 * max(map(len, stop), default=0) + 8
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: "Tensor", scores: Any, **kwargs: Any) -> "Tensor":  # noqa: ANN401 - not looked at
        """Which rows of ``input_ids``, ``(batch, len)``, have ended: ``(batch,)``."""
        import torch

        length = input_ids.shape[1] - self._start
        tails = input_ids[:, max(self._start, input_ids.shape[1] - self._tail) :].tolist()
        for i, tail in enumerate(tails):
            if i not in self.lengths:
                text = _decode(self._tokenizer, tail)
                if any(stop in text for stop in self._stop):
                    self.lengths[i] = length
        return torch.tensor([i in self.lengths for i in range(len(tails))], device=input_ids.device)


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    # a list is for several rows
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _end(answer: Sequence[int], eos: set[int], stopped: int | None) -> tuple[int, str]:
    """How many tokens of a row are its answer, the one that ends it among them, and why it ended."""
    first = next((i + 1 for i, token in enumerate(answer) if token in eos), None)
    lengths = [length for length in (first, stopped) if length is not None]
    return (min(lengths), "stop") if lengths else (len(answer), "length")


def _seed(question: Question) -> int:
    """A seed that two questions share only if they are the same; of 63 bits."""
    prompt = question.prompt
    asked = prompt if isinstance(prompt, str) else [[message.role, message.content] for message in prompt]
    digest = hashlib.sha256(json.dumps([question.sampling.seed, asked]).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    # only CUDA's has a class of its own; the second is what the allocator of the CPU says
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "can't allocate memory" in said


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0]
