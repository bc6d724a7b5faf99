"""Large teachers: vLLM's engine on one machine, or many of them on a Ray cluster."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from lit_distill import checks
from lit_distill.errors import UserError
from lit_distill.questions import Question, Reply, turns
from lit_distill.secrets import INSTEAD, secret_names
from lit_distill.teachers.base import BatchTeacher, TeacherError

_ENGINE_SETTINGS = (
    *("chat_template", "dtype", "generation_config", "hf_overrides", "kv_cache_dtype", "load_format", "max_model_len"),
    *("quantization", "revision", "tokenizer", "tokenizer_mode", "tokenizer_revision"),
)
"""Engine arguments that affect answers; others concern speed, memory or access."""

_Stage = Callable[[dict[str, Any]], dict[str, Any]]


class VLLMTeacher(BatchTeacher):
    """An offline engine of vLLM (0.11 or later).

    Every question has its own sampling settings and seed; those of ``generation_config.json`` are not used. JSON
    schemas use structured outputs.

    Args:
        model: a hub name, or a folder in the Hugging Face format.
        batch_size: questions given to the engine at a time; it drains at the end of each batch.
        engine: further arguments of ``vllm.LLM``, such as ``tensor_parallel_size``, ``max_model_len`` or
            ``quantization``.
        logprobs: add the mean log-probability of an answer's tokens, including end-of-sequence, as the engine reports
            it (before temperature and ``top_p``, unless ``engine`` sets ``logprobs_mode``).
        **kwargs: as in `Teacher`.
    """

    windows: ClassVar[int] = 1
    patience: ClassVar[float] = 1.0

    def __init__(
        self,
        model: str,
        batch_size: int = 1024,
        engine: dict[str, Any] | None = None,
        logprobs: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, batch_size, **kwargs)
        # do not show the value: it may be a key
        if found := next(secret_names(engine), None):
            raise UserError(f"engine.{found}: {INSTEAD}")
        if engine is not None and (not isinstance(engine, dict) or "model" in engine):
            raise UserError("engine must map arguments of vllm's engine other than the model to values")
        self.engine: dict[str, Any] = dict(engine or {})
        self.logprobs = logprobs
        self._llm: Any = None

    @property
    def settings(self) -> dict[str, Any]:
        """With the engine's arguments that affect answers."""
        return super().settings | {"engine": {k: self.engine[k] for k in _ENGINE_SETTINGS if k in self.engine}}

    def check_schema(self) -> None:
        """Every layout supports a schema."""

    def load(self) -> None:
        """Start the engine."""
        try:
            from vllm import LLM  # type: ignore[import-not-found, unused-ignore] # an extra
        except ImportError as error:
            raise UserError(f'vllm cannot be imported ({error}): pip install "lit_distill[vllm]"') from error
        try:
            self._llm = LLM(model=self.model, **self.engine)
        except (OSError, ValueError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"model: vllm cannot start an engine for {self.model!r} ({reason})") from error

    def unload(self) -> None:
        """Stop the engine and its processes."""
        self._llm = None

    def answer_batch(self, questions: Sequence[Question]) -> list[Reply | TeacherError]:
        """Answer a batch; if the engine refuses it, bisect it to find the refused question."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams  # type: ignore[import-not-found, unused-ignore]

        try:
            params = []
            for question in questions:
                settings = self._sampling(question)
                if question.schema is not None:
                    settings["structured_outputs"] = StructuredOutputsParams(json=dict(question.schema))
                params.append(SamplingParams(**settings))
            if self.layout == "chat":
                outputs = self._llm.chat([turns(one.prompt) for one in questions], params, use_tqdm=False)
            else:
                outputs = self._llm.generate([one.prompt for one in questions], params, use_tqdm=False)
        except ValueError as error:
            # a prompt beyond the context, or an unsupported schema
            if len(questions) == 1:
                reason = str(error).partition("\n")[0]
                return [TeacherError(f"vllm refuses the question: {reason}")]
            half = len(questions) // 2
            return [*self.answer_batch(questions[:half]), *self.answer_batch(questions[half:])]
        return [_reply(output) for output in outputs]

    def _sampling(self, question: Question) -> dict[str, Any]:
        """Arguments of ``vllm.SamplingParams`` in plain values, without the schema."""
        sampling = question.sampling
        settings: dict[str, Any] = {
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "max_tokens": sampling.max_new_tokens,
            "seed": sampling.seed,
        }
        if question.stop:
            settings["stop"] = list(question.stop)
        if self.logprobs:
            # of the sampled tokens, without alternatives
            settings["logprobs"] = 0
        return settings


def _reply(output: Any) -> Reply:
    """The reply in a ``vllm.RequestOutput``."""
    answer = output.outputs[0]
    tokens, total = len(answer.token_ids), answer.cumulative_logprob
    return Reply(
        text=answer.text,
        finish=answer.finish_reason,
        input_tokens=len(output.prompt_token_ids),
        output_tokens=tokens,
        logprob=None if total is None or not tokens else total / tokens,
    )


class RayTeacher(VLLMTeacher):
    """Replicas of vLLM's engine on a Ray cluster, by ``ray.data.llm``.

    A window of questions becomes a dataset, runs through the replicas, and is joined back by position. Ray restarts the
    engines for every dataset, so a window should have many thousands of questions. Uses the cluster of ``RAY_ADDRESS``,
    else a local one. (Ray's chat template stage may run code of the model's tokenizer: use models that you trust.)

    Ray does not report why an answer ended. It counts as cut if it is as long as ``max_new_tokens``, or fills the
    ``max_model_len`` of ``engine``.

    Args:
        model: a hub name, or a folder that every machine can read.
        batch_size: questions given to a replica at a time; several batches are in flight in each.
        window: questions of a dataset; all with a JSON schema or all without, and with the same stop texts.
        replicas: number of engines, each with ``tensor_parallel_size`` times ``pipeline_parallel_size`` GPUs.
        **kwargs: as in `VLLMTeacher` and `Teacher`.
    """

    patience: ClassVar[float] = 10.0

    def __init__(
        self, model: str, batch_size: int = 64, window: int = 10_000, replicas: int = 1, **kwargs: Any
    ) -> None:
        # a batch of `BatchTeacher` is a window
        super().__init__(model, checks.check_int("window", window, 1), **kwargs)
        self.replica_batch_size = checks.check_int("batch_size", batch_size, 1)
        self.replicas = checks.check_int("replicas", replicas, 1)

    def load(self) -> None:
        """Describe the engines, which start with the first window."""
        try:
            import ray.data.llm as ray_llm  # type: ignore[import-not-found, unused-ignore] # an extra
        except ImportError as error:
            raise UserError(f'ray.data.llm cannot be imported ({error}): pip install "lit_distill[ray]"') from error
        config = ray_llm.vLLMEngineProcessorConfig(
            model_source=self.model,
            # Ray writes into it
            engine_kwargs=dict(self.engine),
            concurrency=self.replicas,
            batch_size=self.replica_batch_size,
            chat_template_stage=self.layout == "chat",
            # the engine decodes, without the stop texts
            detokenize_stage=False,
            should_continue_on_error=True,
        )
        read_request, read_answer = _stages()
        self._llm = ray_llm.build_processor(config, preprocess=read_request, postprocess=read_answer)

    def answer_batch(self, questions: Sequence[Question]) -> list[Reply | TeacherError]:
        """Answer a window."""
        import ray

        rows = [{"position": i, "request": json.dumps(self._request(one))} for i, one in enumerate(questions)]
        replies: list[Reply | TeacherError] = [TeacherError("vllm on ray: no answer came back")] * len(rows)
        for row in self._llm(ray.data.from_items(rows)).take_all():
            if (position := row.get("position")) is None:
                continue
            if error := row.get("__inference_error__"):
                replies[position] = TeacherError(f"vllm on ray: {error}")
                continue
            read, written = int(row["input_tokens"]), int(row["output_tokens"])
            longest = self.engine.get("max_model_len", math.inf)
            cut = written >= questions[position].sampling.max_new_tokens or read + written >= longest
            replies[position] = Reply(row["text"], "length" if cut else "stop", read, written, row["logprob"])
        return replies

    def _request(self, question: Question) -> dict[str, Any]:
        """The input columns of Ray's stages."""
        settings, prompt = self._sampling(question), question.prompt
        if question.schema is not None:
            # as a text: its fields would become columns
            settings["guided_decoding"] = {"json": json.dumps(dict(question.schema))}
        asked: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"messages": turns(prompt)}
        return asked | {"sampling_params": settings}


def _stages() -> tuple[_Stage, _Stage]:
    """Functions before and after the engine; they hold nothing of this package, which a machine need not have."""

    def read_request(row: dict[str, Any]) -> dict[str, Any]:
        import json

        return dict(json.loads(row["request"]))

    def read_answer(row: dict[str, Any]) -> dict[str, Any]:
        # a step has the sampled token, and nulls where Ray merged columns of several steps
        steps = row.get("logprobs")
        steps = [] if steps is None else steps
        taken = [entry["logprob"] for step in steps for entry in step.values() if entry is not None]
        return {
            "position": row["position"],
            "text": row.get("generated_text") or "",
            "input_tokens": row.get("num_input_tokens") or 0,
            "output_tokens": row.get("num_generated_tokens") or 0,
            "logprob": sum(taken) / len(taken) if taken else None,
            "__inference_error__": row.get("__inference_error__"),
        }

    return read_request, read_answer
