"""vLLM's offline engine, played by a module that has the documented signatures.

vLLM needs a GPU and is not installed where these tests run. The classes below take what `vllm.LLM`,
`vllm.SamplingParams` and `vllm.sampling_params.StructuredOutputsParams` take, and give what `vllm.RequestOutput` holds;
that the real ones do is not tested here.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lit_distill.errors import UserError
from lit_distill.questions import Message, Question, Reply, Sampling
from lit_distill.teachers import VLLMTeacher
from lit_distill.teachers.base import TeacherError
from tests.teachers.servers import ask_all


@dataclass
class StructuredOutputsParams:
    json: str | dict[str, Any] | None = None


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None


@dataclass
class LLM:
    """Answers with the last word of a prompt; "long" is refused together with all that came with it."""

    model: str
    max_model_len: int | None = None
    quantization: str | None = None
    calls: list[tuple[str, list[Any], list[SamplingParams]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        made.append(self)
        if self.model == "nowhere":
            raise OSError("nowhere is not a local folder\nand more")

    def generate(self, prompts: Sequence[str], params: Sequence[SamplingParams], *, use_tqdm: bool = True) -> list[Any]:
        assert not use_tqdm
        self.calls.append(("generate", list(prompts), list(params)))
        return [self._output(prompt, one) for prompt, one in zip(prompts, params, strict=True)]

    def chat(
        self,
        messages: Sequence[list[dict[str, str]]],
        sampling_params: Sequence[SamplingParams],
        use_tqdm: bool = True,
    ) -> list[Any]:
        assert not use_tqdm
        self.calls.append(("chat", list(messages), list(sampling_params)))
        return [self._output(turns[-1]["content"], one) for turns, one in zip(messages, sampling_params, strict=True)]

    def _output(self, prompt: str, params: SamplingParams) -> SimpleNamespace:
        if prompt == "long":
            raise ValueError("The decoder prompt (length 9) is longer than the maximum model length of 8.\nAnd more.")
        cut = params.max_tokens == 1
        answer = SimpleNamespace(
            text=prompt.split()[-1],
            token_ids=(7,) if cut else (7, 8, 9),
            cumulative_logprob=None if params.logprobs is None else -1.5,
            finish_reason="length" if cut else "stop",
        )
        return SimpleNamespace(outputs=[answer], prompt_token_ids=list(range(len(prompt.split()))))


made: list[LLM] = []


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that are not full are not waited for."""
    monkeypatch.setattr(VLLMTeacher, "patience", 0.02)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[LLM]:
    """The engines that were made."""
    made.clear()
    package, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    package.__dict__.update(LLM=LLM, SamplingParams=SamplingParams, sampling_params=params)
    params.__dict__.update(StructuredOutputsParams=StructuredOutputsParams)
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    return made


def ask(teacher: VLLMTeacher, *questions: Question) -> list[Any]:
    return ask_all(teacher, questions)


def chat(text: str, **sampling: Any) -> Question:
    return Question((Message("system", "be brief"), Message("user", text)), Sampling(**sampling))


def test_questions_bring_their_own_settings(engine: list[LLM]) -> None:
    teacher = VLLMTeacher("org/model", engine={"max_model_len": 64})
    schema = {"type": "object"}
    first = chat("the longer cat", temperature=0.5, top_p=0.9, max_new_tokens=1, seed=3)
    second = Question((Message("user", "a dog"),), Sampling(seed=4), stop=("\n", "Q:"), schema=schema)
    replies = ask(teacher, first, second)
    assert replies == [
        Reply("cat", "length", input_tokens=3, output_tokens=1),
        Reply("dog", "stop", input_tokens=2, output_tokens=3),
    ]
    [llm] = engine
    assert (llm.model, llm.max_model_len) == ("org/model", 64)
    [(method, conversations, params)] = llm.calls
    assert method == "chat"
    assert conversations == [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the longer cat"}],
        [{"role": "user", "content": "a dog"}],
    ]
    assert params == [
        SamplingParams(temperature=0.5, top_p=0.9, max_tokens=1, seed=3),
        SamplingParams(
            temperature=0.0,
            max_tokens=256,
            seed=4,
            stop=["\n", "Q:"],
            structured_outputs=StructuredOutputsParams(json=schema),
        ),
    ]
    teacher.check_schema()


def test_texts_are_gone_on_with_and_logprobs_are_means(engine: list[LLM]) -> None:
    teacher = VLLMTeacher("org/model", layout="completion", logprobs=True)
    assert ask(teacher, Question("one two", Sampling())) == [
        Reply("two", "stop", input_tokens=2, output_tokens=3, logprob=-0.5)
    ]
    [(method, prompts, params)] = engine[0].calls
    assert (method, prompts) == ("generate", ["one two"])
    # the engine always adds the token that it took to so many likeliest ones
    assert params[0].logprobs == 0


def test_what_the_engine_refuses_is_refused_alone(engine: list[LLM]) -> None:
    words = ["a", "b", "long", "c", "d"]
    replies = ask(VLLMTeacher("m"), *map(chat, words))
    assert [reply.text for reply in replies if isinstance(reply, Reply)] == ["a", "b", "c", "d"]
    assert isinstance(replies[2], TeacherError)
    assert str(replies[2]).endswith("is longer than the maximum model length of 8.")


def test_a_window_is_one_batch(engine: list[LLM]) -> None:
    teacher = VLLMTeacher("m", batch_size=3)
    assert teacher.concurrency == 3
    ask(teacher, *map(chat, "abcd"))
    assert [len(call[1]) for call in engine[0].calls] == [3, 1]


def test_settings_hold_what_answers_depend_on() -> None:
    engine = {"dtype": "float16", "max_model_len": 9, "hf_token": True, "tensor_parallel_size": 4}
    assert VLLMTeacher("org/m", engine=engine).settings == {
        "class": "VLLMTeacher",
        "model": "org/m",
        "layout": "chat",
        "engine": {"dtype": "float16", "max_model_len": 9},
    }
    with pytest.raises(UserError, match=r"^engine.hf_token: a key must not stand ") as raised:
        VLLMTeacher("org/m", engine={"hf_token": "hf_hush"})
    assert "hush" not in str(raised.value)


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r'^vllm cannot be imported .*: pip install "lit_distill\[vllm\]"$'):
        ask(VLLMTeacher("m"))


def test_a_model_that_is_not_there_is_named(engine: list[LLM]) -> None:
    with pytest.raises(UserError, match=r"^model: vllm cannot start an engine for 'nowhere' \(nowhere is not .*\)$"):
        ask(VLLMTeacher("nowhere"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"engine": {"model": "m"}}, "engine"), ({"engine": "fast"}, "engine")],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"^{named} must"):
        VLLMTeacher("m", **arguments)
