"""Ray Data's processor of language models, played by modules that have the documented signatures.

``ray[llm]`` needs GPUs and is not installed where these tests run. The functions below take what
`ray.data.from_items`, `ray.data.llm.vLLMEngineProcessorConfig` and `ray.data.llm.build_processor` take, carry all
columns from the preprocessing to the postprocessing as Ray does, and write the columns that its vLLM stage writes; that
the real ones do is not tested here.
"""

import json
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest

from lit_distill.errors import UserError
from lit_distill.questions import Message, Question, Reply, Sampling
from lit_distill.teachers import RayTeacher
from lit_distill.teachers.base import TeacherError
from tests.teachers.servers import ask_all

Row = dict[str, Any]
NEWER = ("chat_template_stage", "detokenize_stage", "should_continue_on_error")


class Dataset:
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def take_all(self) -> list[Row]:
        # parallel work comes back in any order
        return self.rows[::-1]


class Cluster:
    """What was asked of Ray, and how it answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stages: tuple[str, ...], build: str) -> None:
        self.configs: list[Row] = []
        self.windows: list[list[Row]] = []
        self.loses: set[str] = set()
        known = ("model_source", "engine_kwargs", "concurrency", "batch_size", *stages)

        class Config:
            model_fields = dict.fromkeys(known)

            def __init__(self, **values: Any) -> None:
                assert set(values) <= set(known)
                self.values = values

        self.config = Config
        ray, data, llm = (ModuleType(name) for name in ("ray", "ray.data", "ray.data.llm"))
        ray.__dict__.update(data=data)
        data.__dict__.update(from_items=lambda rows: Dataset(rows), llm=llm)
        llm.__dict__.update({"vLLMEngineProcessorConfig": Config, build: self.build})
        for module in (ray, data, llm):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def build(
        self, config: SimpleNamespace, preprocess: Callable[[Row], Row], postprocess: Callable[[Row], Row]
    ) -> Callable[[Dataset], Dataset]:
        self.configs.append(config.values)
        # as on a machine that has nothing of this package
        before, after = (FunctionType(f.__code__, {"__builtins__": __builtins__}) for f in (preprocess, postprocess))
        keeps_errors = "should_continue_on_error" in config.values

        def run(dataset: Dataset) -> Dataset:
            done, window = [], []
            for item in dataset.rows:
                row = item | before(item)
                window.append(dict(row))
                row |= self.engine(row)
                if row["generated_text"] in self.loses:
                    continue
                error = row.get("__inference_error__")
                if error and keeps_errors:
                    # such rows pass by the postprocessing
                    done.append({"__inference_error__": error, "position": row["position"]})
                else:
                    done.append(after(row))
            self.windows.append(window)
            return Dataset(done)

        return run

    def engine(self, row: Row) -> Row:
        prompt = row["prompt"] if "prompt" in row else row["messages"][-1]["content"]
        params = row["sampling_params"]
        if prompt == "long":
            return {"generated_text": "", "__inference_error__": "ValueError: too long"}
        tokens = list(range(min(3, params["max_tokens"])))
        step = {"logprob": -0.5, "rank": 1, "decoded_token": "x"}
        return {
            "num_input_tokens": len(prompt.split()),
            "generated_tokens": tokens,
            "num_generated_tokens": len(tokens),
            "generated_text": prompt.split()[-1].upper(),
            # what a table makes of steps with one token each
            "logprobs": [{str(i): step if i == n else None for i in tokens} for n in tokens]
            if "logprobs" in params
            else None,
            "__inference_error__": None,
        }


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that are not full are not waited for."""
    monkeypatch.setattr(RayTeacher, "patience", 0.02)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch, NEWER, "build_processor")


def ask(teacher: RayTeacher, *questions: Question) -> list[Any]:
    return ask_all(teacher, questions)


def chat(text: str, stop: tuple[str, ...] = (), schema: Row | None = None, **sampling: Any) -> Question:
    return Question((Message("user", text),), Sampling(**sampling), stop, schema)


def test_a_window_is_joined_back_in_its_order(cluster: Cluster) -> None:
    teacher = RayTeacher("org/m", batch_size=16, replicas=4, engine={"tensor_parallel_size": 2})
    replies = ask(teacher, chat("a cat"), chat("two dogs", max_new_tokens=2, seed=5, temperature=0.7), chat("owl"))
    assert replies == [
        Reply("CAT", "stop", input_tokens=2, output_tokens=3),
        Reply("DOGS", "length", input_tokens=2, output_tokens=2),
        Reply("OWL", "stop", input_tokens=1, output_tokens=3),
    ]
    assert cluster.configs == [
        {
            "model_source": "org/m",
            "engine_kwargs": {"tensor_parallel_size": 2},
            "concurrency": 4,
            "batch_size": 16,
            "chat_template_stage": True,
            "detokenize_stage": False,
            "should_continue_on_error": True,
        }
    ]
    [rows] = cluster.windows
    by_text = {row["messages"][-1]["content"]: row["sampling_params"] for row in rows}
    assert by_text["two dogs"] == {"temperature": 0.7, "top_p": 1.0, "max_tokens": 2, "seed": 5}


def test_a_schema_is_a_text_and_rows_have_the_same_columns(cluster: Cluster) -> None:
    schema = {"type": "object"}
    replies = ask(RayTeacher("m"), *[chat(text, ("Q",), schema) for text in "abc"])
    assert [reply.text for reply in replies] == ["A", "B", "C"]
    [rows] = cluster.windows
    assert len({(*row, *row["sampling_params"]) for row in rows}) == 1
    params = rows[0]["sampling_params"]
    assert (json.loads(params["guided_decoding"]["json"]), params["stop"]) == (schema, ["Q"])
    assert [config["chat_template_stage"] for config in cluster.configs] == [True]


def test_logprobs_are_means_over_the_tokens_taken(cluster: Cluster) -> None:
    [reply] = ask(RayTeacher("m", logprobs=True), chat("a"))
    assert reply.logprob == -0.5
    assert cluster.windows[0][0]["sampling_params"]["logprobs"] == 0


def test_a_row_that_fails_or_is_lost_fails_alone(cluster: Cluster) -> None:
    cluster.loses = {"GONE"}
    replies = ask(RayTeacher("m"), chat("a"), chat("long"), chat("gone"), chat("b"))
    assert [replies[0].text, replies[3].text] == ["A", "B"]
    assert isinstance(replies[1], TeacherError)
    assert str(replies[1]) == "vllm on ray: ValueError: too long"
    assert isinstance(replies[2], TeacherError)
    assert str(replies[2]) == "vllm on ray: no answer came back"


def test_an_answer_that_fills_the_context_is_cut(cluster: Cluster) -> None:
    replies = ask(RayTeacher("m", engine={"max_model_len": 5}), chat("one two"), chat("one"))
    assert [reply.finish for reply in replies] == ["length", "stop"]


def test_windows_are_large_and_the_processor_is_built_once(cluster: Cluster) -> None:
    assert RayTeacher("m").concurrency == 10_000
    ask(RayTeacher("m", window=3), *map(chat, "abcde"))
    assert [len(rows) for rows in cluster.windows] == [3, 2]
    assert len(cluster.configs) == 1


def test_settings_hold_what_answers_depend_on() -> None:
    teacher = RayTeacher("org/m", replicas=3, engine={"dtype": "float16", "max_num_seqs": 4})
    assert teacher.settings == {
        "class": "RayTeacher",
        "model": "org/m",
        "layout": "chat",
        "engine": {"dtype": "float16"},
    }


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(UserError, match=r'^ray.data.llm cannot be imported .*: pip install "lit_distill\[ray\]"$'):
        ask(RayTeacher("m"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"window": 0}, "window"),
        ({"batch_size": 0}, "batch_size"),
        ({"replicas": 0}, "replicas"),
        ({"engine": 1}, "engine"),
    ],
)
def test_wrong_arguments_are_named(arguments: Row, named: str) -> None:
    with pytest.raises(UserError, match=f"^{named} must"):
        RayTeacher("m", **arguments)
