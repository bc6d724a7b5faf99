"""A teacher on more than one machine: vLLM's engines, as many as there are GPUs for, fed by Ray Data."""

import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from lit_distill import checks
from lit_distill.errors import UserError
from lit_distill.questions import Layout, Question, Reply, turns
from lit_distill.teachers.base import BatchTeacher, TeacherError
from lit_distill.teachers.vllm import check_engine, engine_settings, sampling_settings

Row = dict[str, Any]


class RayTeacher(BatchTeacher):
    """Replicas of a model on a Ray cluster, by ``ray.data.llm``.

    A window of questions becomes a dataset, runs through the replicas, and is joined back by position. Ray starts the
    engines again for every dataset, so that a window should hold many thousands of questions. It finds its cluster as
    always: by ``RAY_ADDRESS``, else one of this machine alone. (Its stage that applies the chat template may let the
    model's tokenizer run code of its own: take models that you trust.)

    Ray does not say why an answer ended. It is taken as cut where it is as long as ``max_new_tokens``, or fills the
    ``max_model_len`` of ``engine``. A version of Ray that knows no ``should_continue_on_error`` fails a whole window
    for one question that the engine refuses, such as one with too long a prompt.

    Args:
        model: a name on the hub, or a folder that every machine sees.
        batch_size: questions that a replica is given at a time; several such batches are in flight in each.
        window: questions of a dataset.
        replicas: engines, each with the GPUs that ``engine`` asks for (``tensor_parallel_size`` times
            ``pipeline_parallel_size``).
        layout: prompts as the turns of a ``chat`` or as a text for ``completion``.
        engine: arguments of vLLM's engine beside the model, such as ``tensor_parallel_size`` or ``max_model_len``.
        logprobs: also give the mean log-probability of an answer's tokens, its end among them, where Ray passes it on.
        **kwargs: the arguments of `Teacher`.
    """

    follows_schema: ClassVar[bool] = True
    windows: ClassVar[int] = 1

    def __init__(
        self,
        model: str,
        batch_size: int = 64,
        window: int = 10_000,
        replicas: int = 1,
        layout: Layout = "chat",
        engine: dict[str, Any] | None = None,
        logprobs: bool = False,
        **kwargs: Any,
    ) -> None:
        # what is a batch to `BatchTeacher` is a window here
        super().__init__(model, checks.check_int("window", window, 1), layout=layout, **kwargs)
        self.replica_batch_size = checks.check_int("batch_size", batch_size, 1)
        self.replicas = checks.check_int("replicas", replicas, 1)
        self.engine = check_engine(engine)
        self.logprobs = checks.check_bool("logprobs", logprobs)
        self._processors: dict[bool, Any] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What the answers depend on beside the question."""
        return super().settings | {"engine": engine_settings(self.engine)}

    def load(self) -> None:
        """Look whether Ray is there; the engines start with the first window."""
        try:
            import ray.data.llm  # type: ignore[import-not-found, unused-ignore] # noqa: F401 - an extra
        except ImportError as error:
            raise UserError(f'ray.data.llm cannot be imported ({error}): pip install "lit_distill[ray]"') from error

    def answer_batch(self, questions: Sequence[Question]) -> list[Reply | TeacherError]:
        """Answer a window."""
        # a column of structures that differ in their fields would be filled up with nulls
        groups: dict[tuple[bool, bool, bool], list[int]] = {}
        for i, question in enumerate(questions):
            alike = (isinstance(question.prompt, tuple), bool(question.stop), question.schema is not None)
            groups.setdefault(alike, []).append(i)
        replies: dict[int, Reply | TeacherError] = {}
        for (chat, _, _), positions in groups.items():
            replies |= self._run(chat, {i: questions[i] for i in positions})
        return [replies[i] for i in range(len(questions))]

    def _run(self, chat: bool, questions: dict[int, Question]) -> dict[int, Reply | TeacherError]:
        import ray

        if chat not in self._processors:
            self._processors[chat] = self._build(chat)
        rows = [{"position": i, "request": json.dumps(self._request(q))} for i, q in questions.items()]
        answers = self._processors[chat](ray.data.from_items(rows)).take_all()
        replies: dict[int, Reply | TeacherError] = {}
        nameless = None
        for row in answers:
            error = row.get("__inference_error__") or row.get("error")
            if row.get("position") is None:
                nameless = error
                continue
            i = int(row["position"])
            replies[i] = TeacherError(f"vllm on ray: {error}") if error else self._reply(questions[i], row)
        for i in questions.keys() - replies.keys():
            replies[i] = TeacherError(f"vllm on ray: {nameless or 'no answer came back'}")
        return replies

    def _build(self, chat: bool) -> Any:  # noqa: ANN401 - a class of an extra
        import ray.data.llm as ray_llm

        # `build_llm_processor` is the older name
        build = getattr(ray_llm, "build_processor", None) or ray_llm.build_llm_processor
        known = ray_llm.vLLMEngineProcessorConfig.model_fields
        # the engine turns tokens into text itself, without the stop texts; the second names are the older ones
        stages = {"chat_template_stage": chat, "detokenize_stage": False}
        if "chat_template_stage" not in known:
            stages = {"apply_chat_template": chat, "detokenize": False}
        if "should_continue_on_error" in known:
            stages["should_continue_on_error"] = True
        config = ray_llm.vLLMEngineProcessorConfig(
            model_source=self.model,
            # Ray writes into it
            engine_kwargs=dict(self.engine),
            concurrency=self.replicas,
            batch_size=self.replica_batch_size,
            **stages,
        )
        return build(config, preprocess=_read_request(), postprocess=_read_answer())

    def _request(self, question: Question) -> Row:
        """The columns that the stages read."""
        settings = sampling_settings(question, self.logprobs)
        if question.schema is not None:
            # as a text: its fields would become columns
            settings["guided_decoding"] = {"json": json.dumps(dict(question.schema))}
        prompt = question.prompt
        asked: Row = {"prompt": prompt} if isinstance(prompt, str) else {"messages": turns(prompt)}
        return asked | {"sampling_params": settings}

    def _reply(self, question: Question, row: Row) -> Reply:
        read, written = int(row["input_tokens"]), int(row["output_tokens"])
        longest = self.engine.get("max_model_len")
        cut = written >= question.sampling.max_new_tokens or (longest is not None and read + written >= longest)
        return Reply(
            text=str(row["text"]),
            finish="length" if cut else "stop",
            input_tokens=read,
            output_tokens=written,
            logprob=None if row["logprob"] is None else float(row["logprob"]),
        )


# the two below make functions that hold nothing of this package, so that they are sent to the machines as they are, and
# these need not have it


def _read_request() -> Callable[[Row], Row]:
    def preprocess(row: Row) -> Row:
        import json

        columns: Row = json.loads(row["request"])
        return columns

    return preprocess


def _read_answer() -> Callable[[Row], Row]:
    def postprocess(row: Row) -> Row:
        steps = row.get("logprobs")
        # a step holds the token taken alone, and nulls where columns were put together from several steps
        taken = [
            entry["logprob"]
            for step in (() if steps is None else steps)
            for entry in step.values()
            if entry is not None
        ]
        return {
            "position": row["position"],
            "text": row.get("generated_text") or "",
            "input_tokens": row.get("num_input_tokens") or 0,
            "output_tokens": row.get("num_generated_tokens") or 0,
            "logprob": sum(taken) / len(taken) if taken else None,
            "error": row.get("__inference_error__"),
        }

    return postprocess
