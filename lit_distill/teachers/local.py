"""A teacher run by transformers in this process: any causal or encoder-decoder model, on GPU or CPU."""

import gc
import hashlib
import math
from collections.abc import Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_distill.errors import UserError
from lit_distill.questions import Layout, Prompt, Question, Reply, turns
from lit_distill.teachers.base import BatchTeacher, TeacherError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase


class TransformersTeacher(BatchTeacher):
    """A model from the Hugging Face hub or a folder, in this process.

    Only the end-of-sequence and padding tokens of ``generation_config.json`` are used, no sampling settings. Samples
    depend on the prompts and seeds of their batch, not on the global random generators.

    If a chat template refuses a system turn (Gemma's does), the instruction goes before the first question.

    Args:
        model: a hub name, or a folder in the Hugging Face format.
        batch_size: questions per batch; halved when out of memory.
        layout: prompts are the turns of a ``chat`` or a text for ``completion``; by default a chat if the tokenizer has
            a template.
        dtype: of the weights; ``auto`` is the stored one.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; by default ``cuda`` if available.
        logprobs: add the mean log-probability of an answer's tokens, including end-of-sequence, before temperature and
            ``top_p``.
        **kwargs: as in `Teacher`.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 8,
        layout: Layout | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        device: str | None = None,
        logprobs: bool = False,
        **kwargs: Any,
    ) -> None:
        self._layout: Layout | None = layout
        super().__init__(model, batch_size, **kwargs)
        self._layout = layout
        self.dtype, self.device, self.logprobs = dtype, device, logprobs
        self._network: Any = None

    @property
    def layout(self) -> Layout:
        """Chat or completion; by default depends on the tokenizer."""
        if self._layout is None:
            self._layout = "chat" if self.tokenizer.chat_template else "completion"
        return self._layout

    @layout.setter
    def layout(self, value: Layout) -> None:
        self._layout = value

    @property
    def settings(self) -> dict[str, Any]:
        """With the dtype of the weights."""
        return super().settings | {"dtype": self.dtype}

    @cached_property
    def config(self) -> "PreTrainedConfig":
        """The model's configuration."""
        from transformers import AutoConfig

        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(self.model, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable("its configuration", error) from error
        return config

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer."""
        from transformers import AutoTokenizer, PreTrainedTokenizerBase

        # without files transformers would create an empty one from `model_type`
        files, folder = ("tokenizer*", "*.model", "vocab*", "*.tiktoken"), Path(self.model)
        if folder.is_dir() and not any(path for pattern in files for path in folder.glob(pattern)):
            raise UserError(f"model: no tokenizer in the folder {self.model!r}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable("its tokenizer", error) from error
        assert isinstance(tokenizer, PreTrainedTokenizerBase)  # noqa: S101 - for mypy
        return tokenizer

    def count_tokens(self, prompt: Prompt) -> int:
        """Exact tokens of a prompt."""
        return len(self._encode(prompt))

    def load(self) -> None:
        """Load the weights onto the device."""
        import torch
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        if self.layout == "chat" and not self.tokenizer.chat_template:
            raise UserError(f"layout: {self.model!r} has no chat template, so it has to be completion")
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"device: {name!r} cannot be used here ({_first_line(error)})") from error
        kind: Any = AutoModelForSeq2SeqLM if self.config.is_encoder_decoder else AutoModelForCausalLM
        try:
            network, found = kind.from_pretrained(
                self.model,
                dtype=self.dtype,
                trust_remote_code=False,
                # transformers only warns about missing weights
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            self._network = network.to(name).eval()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise UserError(f"model: {self.model!r} does not fit into the memory of {name}") from error
        except (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError) as error:
            raise self._unreadable("its weights", error) from error
        for trouble, what in (("missing_keys", "does not hold"), ("mismatched_keys", "has in another size")):
            if names := sorted(one if isinstance(one, str) else str(one[0]) for one in found.get(trouble) or ()):
                few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise UserError(f"model: {self.model!r} {what} the weights {few}, which would be drawn at random")
        network.generation_config = self._special_tokens(network.generation_config)

    def unload(self) -> None:
        """Free the memory of the device."""
        self._network = None
        _free_memory()

    def answer_batch(self, questions: Sequence[Question]) -> list[Reply | TeacherError]:
        """Answer a batch, grouped by sampling settings, halved while out of memory."""
        replies: dict[int, Reply | TeacherError] = {}
        groups: dict[Hashable, list[tuple[int, list[int]]]] = {}
        for i, question in enumerate(questions):
            sampling = question.sampling
            try:
                ids = self._encode(question.prompt)
                self._check_length(len(ids), sampling.max_new_tokens)
            except TeacherError as error:
                replies[i] = error
                continue
            alike = (sampling.temperature, sampling.top_p, sampling.max_new_tokens, question.stop)
            groups.setdefault(alike, []).append((i, ids))
        for rows in groups.values():
            answers = self._generate_fitting([questions[i] for i, _ in rows], [ids for _, ids in rows])
            replies |= zip((i for i, _ in rows), answers, strict=True)
        return [replies[i] for i in range(len(questions))]

    def _special_tokens(self, own: "GenerationConfig") -> "GenerationConfig":
        """A generation configuration with the model's special tokens only."""
        from transformers import GenerationConfig

        names = ["decoder_start_token_id", "eos_token_id", "bos_token_id", "pad_token_id", "forced_bos_token_id"]
        names += ["suppress_tokens", "begin_suppress_tokens"]
        kept = {name: getattr(own, name, None) for name in names}
        kept |= {name: getattr(self.config, name, None) for name in names if kept[name] is None}
        ends = kept["eos_token_id"] or []
        ends = {self.tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends)} - {None}
        kept["eos_token_id"] = sorted(ends) or None
        pads = (kept["pad_token_id"], self.tokenizer.pad_token_id, *sorted(ends), 0)
        kept["pad_token_id"] = next(pad for pad in pads if pad is not None and pad >= 0)
        return GenerationConfig(**kept)

    def _encode(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt. Raises a ``TeacherError`` if the chat template refuses its turns."""
        from jinja2 import TemplateError

        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        chat = turns(prompt)
        tries = [chat]
        if [turn["role"] for turn in chat[:2]] == ["system", "user"]:
            tries.append([{"role": "user", "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}, *chat[2:]])
        refusals = []
        for attempt in tries:
            try:
                text = self.tokenizer.apply_chat_template(attempt, tokenize=False, add_generation_prompt=True)
            except (TemplateError, ValueError) as error:
                refusals.append(error)
            else:
                # the template includes special tokens
                return list(self.tokenizer(str(text), add_special_tokens=False)["input_ids"])
        raise TeacherError(f"the chat template of {self.model} refuses the prompt: {_first_line(refusals[0])}")

    def _check_length(self, prompt: int, answer: int) -> None:
        if not prompt:
            raise TeacherError("the prompt is empty")
        limit = getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)
        # encoder and decoder lengths are separate; the decoder's start token is no part of the answer
        needed = max(prompt, answer + 1) if self.config.is_encoder_decoder else prompt + answer
        if isinstance(limit, int) and needed > limit:
            asked = f"a prompt of {prompt} tokens and {answer} new ones"
            raise TeacherError(f"{asked} do not fit into the model's context of {limit}")

    def _generate_fitting(
        self, questions: Sequence[Question], prompts: Sequence[list[int]]
    ) -> list[Reply | TeacherError]:
        try:
            return [*self._generate(questions, prompts)]
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        # outside of `except`, whose traceback keeps tensors alive
        _free_memory()
        if len(questions) == 1:
            return [TeacherError(f"out of memory with a prompt of {len(prompts[0])} tokens on its own")]
        half = (len(questions) + 1) // 2
        first = self._generate_fitting(questions[:half], prompts[:half])
        return first + self._generate_fitting(questions[half:], prompts[half:])

    def _generate(self, questions: Sequence[Question], prompts: Sequence[list[int]]) -> list[Reply]:
        """Generate for questions that differ only in prompt and seed."""
        import torch
        from transformers import GenerationConfig

        network, sampling, stop = self._network, questions[0].sampling, questions[0].stop
        # right padding for an encoder, left padding for continuation
        left = not self.config.is_encoder_decoder
        width, pad = max(map(len, prompts)), network.generation_config.pad_token_id
        rows, mask = torch.full((len(prompts), width), pad), torch.zeros(len(prompts), width, dtype=torch.long)
        for i, ids in enumerate(prompts):
            place = slice(width - len(ids), width) if left else slice(len(ids))
            rows[i, place], mask[i, place] = torch.tensor(ids), 1
        start = width if left else 1
        draws: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            draws = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        ends = _StopTexts(self.tokenizer, stop, start)
        devices = [network.device] if network.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices):
            torch.manual_seed(_seed(questions))
            made = network.generate(
                input_ids=rows.to(network.device),
                attention_mask=mask.to(network.device),
                generation_config=GenerationConfig(max_new_tokens=sampling.max_new_tokens, **draws),
                stopping_criteria=[ends] if stop else [],
                return_dict_in_generate=True,
                output_logits=self.logprobs,
            )
        steps = zip(made.logits if self.logprobs else (), made.sequences[:, start:].unbind(1), strict=False)
        logprobs = [logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0].tolist() for logits, ids in steps]
        eos = set(network.generation_config.eos_token_id or ())
        replies = []
        for i, answer in enumerate(made.sequences[:, start:].tolist()):
            first = next((n + 1 for n, token in enumerate(answer) if token in eos), len(answer) + 1)
            length = min(first, ends.lengths.get(i, len(answer) + 1))
            finish = "stop" if length <= len(answer) else "length"
            length = min(length, len(answer))
            text = _decode(self.tokenizer, answer[: length - (answer[length - 1] in eos)])
            if cuts := [at for at in map(text.find, stop) if at >= 0]:
                text, finish = text[: min(cuts)], "stop"
            mean = math.fsum(step[i] for step in logprobs[:length]) / length if self.logprobs else None
            replies.append(Reply(text, finish, len(prompts[i]), length, mean))
        return replies

    def _unreadable(self, what: str, error: Exception) -> UserError:
        hint = "" if Path(self.model).exists() else "; it is no folder here, so it has to be a name on the hub"
        return UserError(f"model: cannot load {what} from {self.model!r} ({_first_line(error)}){hint}")


class _StopTexts:
    """Stopping criterion: a row ends when its answer contains a stop text; ``lengths`` are the tokens until then.

    (transformers' own also finds stop texts that begin in the prompt.)
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: tuple[str, ...], start: int) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, stop, start
        # up to four tokens per character with byte fallback
        self._tail = 4 * max(map(len, stop), default=0) + 8
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: "Tensor", scores: object, **kwargs: object) -> "Tensor":
        """Which rows of ``input_ids`` ``(batch, len)`` have ended, ``(batch,)``."""
        import torch

        length = input_ids.shape[1] - self._start
        for i, tail in enumerate(input_ids[:, self._start :][:, -self._tail :].tolist()):
            if i not in self.lengths and any(stop in _decode(self._tokenizer, tail) for stop in self._stop):
                self.lengths[i] = length
        return torch.tensor([i in self.lengths for i in range(len(input_ids))], device=input_ids.device)


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _seed(questions: Sequence[Question]) -> int:
    asked = repr([(question.prompt, question.sampling.seed) for question in questions])
    return int.from_bytes(hashlib.sha256(asked.encode("utf-8", "surrogatepass")).digest()[:8]) >> 1


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    # only CUDA has its own exception; the last text is the CPU allocator's
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "can't allocate memory" in said


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0]
