"""A teacher that vLLM runs in this process: a large model on the GPUs of one machine."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lit_distill import checks
from lit_distill.errors import UserError
from lit_distill.questions import Layout, Question, Reply, turns
from lit_distill.secrets import INSTEAD, secret_names
from lit_distill.teachers.base import BatchTeacher, TeacherError

ENGINE_SETTINGS = (
    *("chat_template", "dtype", "generation_config", "hf_overrides", "kv_cache_dtype", "load_format", "max_model_len"),
    *("quantization", "revision", "tokenizer", "tokenizer_mode", "tokenizer_revision"),
)
"""Arguments of an engine that its answers depend on; the others are about speed, memory or access."""


class VLLMTeacher(BatchTeacher):
    """An offline engine of vLLM (0.11 or later), which batches as it goes.

    Every question brings its own sampling settings and its own seed; what a model's ``generation_config.json`` says of
    temperature or penalties is not used. A JSON schema is held to by structured outputs.

    Args:
        model: a name on the hub, or a folder in the Hugging Face format.
        batch_size: questions that the engine is given at a time; with few of them it runs empty at the end of each.
        layout: prompts as the turns of a ``chat`` or as a text for ``completion``.
        engine: arguments of ``vllm.LLM`` beside the model, such as ``tensor_parallel_size``, ``max_model_len`` or
            ``quantization``.
        logprobs: also give the mean log-probability of an answer's tokens, its end among them, as the engine says it
            (before temperature and ``top_p``, unless ``engine`` sets another ``logprobs_mode``).
        **kwargs: the arguments of `Teacher`.
    """

    follows_schema: ClassVar[bool] = True
    windows: ClassVar[int] = 1

    def __init__(
        self,
        model: str,
        batch_size: int = 1024,
        layout: Layout = "chat",
        engine: dict[str, Any] | None = None,
        logprobs: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, batch_size, layout=layout, **kwargs)
        self.engine = check_engine(engine)
        self.logprobs = checks.check_bool("logprobs", logprobs)
        self._llm: Any = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the answers depend on beside the question."""
        return super().settings | {"engine": engine_settings(self.engine)}

    def load(self) -> None:
        """Start the engine."""
        try:
            from vllm import LLM  # type: ignore[import-not-found, unused-ignore] # an extra
        except ImportError as error:
            raise UserError(f'vllm cannot be imported ({error}): pip install "lit_distill[vllm]"') from error
        try:
            self._llm = LLM(model=self.model, **self.engine)
        except (OSError, ValueError, TypeError) as error:
            reason = str(error).strip().split("\n", maxsplit=1)[0]
            raise UserError(f"model: vllm cannot start an engine for {self.model!r} ({reason})") from error

    def unload(self) -> None:
        """Let the engine go, which ends its processes."""
        self._llm = None

    def answer_batch(self, questions: Sequence[Question]) -> list[Reply | TeacherError]:
        """Answer a batch; where the engine refuses it, one half after the other until the question is found."""
        if self._llm is None:
            raise RuntimeError(f"{type(self).__name__} answers between open() and close()")
        replies: list[Reply | TeacherError | None] = [None] * len(questions)
        # a chat and a text are asked by methods of their own
        for chat in (True, False):
            rows = [i for i, question in enumerate(questions) if isinstance(question.prompt, tuple) is chat]
            for i, reply in zip(rows, self._ask([questions[i] for i in rows], chat), strict=True):
                replies[i] = reply
        return [reply for reply in replies if reply is not None]

    def _ask(self, questions: Sequence[Question], chat: bool) -> list[Reply | TeacherError]:
        if not questions:
            return []
        try:
            params = [self._params(question) for question in questions]
            if chat:
                chats = [turns(question.prompt) for question in questions]
                outputs = self._llm.chat(chats, params, use_tqdm=False)
            else:
                outputs = self._llm.generate([question.prompt for question in questions], params, use_tqdm=False)
        except ValueError as error:
            # a prompt beyond the context, or a schema that it cannot follow: the engine takes back the whole call
            if len(questions) == 1:
                return [TeacherError(f"vllm refuses the question: {str(error).strip().splitlines()[0]}")]
            half = len(questions) // 2
            return [*self._ask(questions[:half], chat), *self._ask(questions[half:], chat)]
        if len(outputs) != len(questions):
            raise RuntimeError(f"vllm gave {len(outputs)} answers to {len(questions)} questions")
        return [self._reply(output) for output in outputs]

    def _params(self, question: Question) -> Any:  # noqa: ANN401 - a class of an extra
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams  # type: ignore[import-not-found, unused-ignore]

        settings = sampling_settings(question, self.logprobs)
        if question.schema is not None:
            settings["structured_outputs"] = StructuredOutputsParams(json=dict(question.schema))
        return SamplingParams(**settings)

    def _reply(self, output: Any) -> Reply:  # noqa: ANN401
        answer = output.outputs[0]
        tokens, total = len(answer.token_ids), answer.cumulative_logprob
        return Reply(
            text=answer.text,
            finish=answer.finish_reason if answer.finish_reason in ("stop", "length") else None,
            input_tokens=None if output.prompt_token_ids is None else len(output.prompt_token_ids),
            output_tokens=tokens,
            logprob=None if total is None or not tokens else total / tokens,
        )


def check_engine(engine: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of an engine: a mapping that leaves the model to ``model``.

    Raises:
        UserError: it is not.
    """
    # a value is not shown, as it may be a key
    if found := next(secret_names(engine), None):
        raise UserError(f"engine.{found}: {INSTEAD}")
    if engine is not None and (not isinstance(engine, dict) or "model" in engine):
        raise UserError("engine must map arguments of vllm's engine other than the model to values")
    return dict(engine or {})


def engine_settings(engine: Mapping[str, Any]) -> dict[str, Any]:
    """What of an engine's arguments its answers depend on."""
    return {name: engine[name] for name in ENGINE_SETTINGS if name in engine}


def sampling_settings(question: Question, logprobs: bool) -> dict[str, Any]:
    """Arguments of ``vllm.SamplingParams`` in plain values, without the schema.

    Args:
        question: the question.
        logprobs: ask for those of the tokens taken; 0 of the likeliest ones stand beside them.
    """
    sampling = question.sampling
    settings: dict[str, Any] = {
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        "max_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
    }
    if question.stop:
        settings["stop"] = list(question.stop)
    if logprobs:
        settings["logprobs"] = 0
    return settings
