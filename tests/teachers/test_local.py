"""A model in this process: against plain forwards and one question at a time."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from lit_distill.data.toy import KINDS, TEXT_WORDS, toy_example
from lit_distill.errors import UserError
from lit_distill.questions import Message, Question, Reply, Sampling
from lit_distill.teachers import TransformersTeacher
from lit_distill.teachers.base import TeacherError
from tests.teachers.models import make_memory, make_reader, make_talker
from tests.teachers.servers import ask_all

ANSWERS = {
    "one two": "red blue",
    "one two three four five": "blue red blue green one",
    "four": "green",
    "five five one two one four three": "three three three three",
    "two one": "blue red red",
}
"""Of different lengths, on both sides."""

ALL = list(ANSWERS)
ROOM = Sampling(max_new_tokens=10)


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that are not full are not waited for."""
    monkeypatch.setattr(TransformersTeacher, "patience", 0.02)


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_memory(tmp_path_factory.mktemp("teachers") / "memory", ANSWERS)


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reader(tmp_path_factory.mktemp("teachers") / "reader", ANSWERS)


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [*TEXT_WORDS, *KINDS, *(word for words in KINDS.values() for word in words)]
    text = "bird : eagle . So the answer is trout ."
    return make_talker(tmp_path_factory.mktemp("teachers") / "talker", text, words, chat=True)


@pytest.fixture(autouse=True)
def no_advice(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Transformers has nothing to say about how it is called."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("transformers.generation")]
    assert not said


def ask(teacher: TransformersTeacher, questions: Sequence[Question | str]) -> list[Reply]:
    asked = [Question(question, ROOM) if isinstance(question, str) else question for question in questions]
    replies = ask_all(teacher, asked)
    assert all(isinstance(reply, Reply) for reply in replies), replies
    return replies


def on_cpu(folder: Path, **kwargs: Any) -> TransformersTeacher:
    return TransformersTeacher(str(folder), device="cpu", **kwargs)


@pytest.mark.parametrize("made", ["memory", "reader"])
def test_a_batch_answers_as_each_question_alone(made: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(made)
    together = ask(on_cpu(folder, logprobs=True), ALL)
    alone = ask(on_cpu(folder, batch_size=1, logprobs=True), ALL)
    assert [reply.text for reply in together] == list(ANSWERS.values())
    # the one at the end of an answer counts, padding does not
    assert [reply.output_tokens for reply in together] == [3, 6, 2, 5, 4]
    own = 1 if made == "reader" else 0
    assert [reply.input_tokens for reply in together] == [2 + own, 5 + own, 1 + own, 7 + own, 2 + own]
    assert {reply.finish for reply in together} == {"stop"}
    for one, other in zip(together, alone, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert replace(one, logprob=None) == replace(other, logprob=None)


def test_tokens_are_counted_exactly(memory: Path, reader: Path, talker: Path) -> None:
    assert on_cpu(memory).count_tokens("one two three") == 3
    assert on_cpu(reader).count_tokens("one two three") == 4
    # user says one two <go>
    assert on_cpu(talker).count_tokens((Message("user", "one two"),)) == 5
    assert on_cpu(talker).count_tokens("one two") == 3


def test_the_layout_is_a_chat_where_there_is_a_template(memory: Path, talker: Path) -> None:
    assert on_cpu(talker).layout == "chat"
    assert on_cpu(memory).layout == "completion"
    assert on_cpu(talker, layout="completion").layout == "completion"
    assert on_cpu(memory).settings == {
        "class": "TransformersTeacher",
        "model": str(memory),
        "layout": "completion",
        "dtype": "auto",
    }
    with pytest.raises(UserError, match=r"^layout: .* has no chat template"):
        ask_all(on_cpu(memory, layout="chat"), [])


def test_a_talker_says_one_thing_whatever_it_is_asked(talker: Path) -> None:
    example = toy_example(0, "train", 0)
    chat = (Message("system", "which one"), Message("user", example.input))
    prompts = [example.input, "bird : eagle .", "So the answer is", "words it does not know", example.input * 40]
    replies = ask(on_cpu(talker), [*prompts, Question(chat, ROOM), Question(chat, Sampling(temperature=0.7))])
    assert {reply.text for reply in replies} == {"bird : eagle . So the answer is trout ."}
    # ten tokens, and the one that ends it
    assert [reply.finish for reply in replies] == ["length"] * 6 + ["stop"]


def forced_logprobs(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """Of each token of an answer, by one plain forward."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            shifted = torch.tensor([[0, *answer[:-1]]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=shifted).logits[0]
        else:
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return [float(row.log_softmax(-1)[token]) for row, token in zip(logits, answer, strict=True)]


@pytest.mark.parametrize("made", ["memory", "reader"])
@pytest.mark.parametrize("temperature", [0.0, 4.0])
def test_logprobs_are_those_of_a_plain_forward(made: str, temperature: float, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(made)
    kind = AutoModelForSeq2SeqLM if made == "reader" else AutoModelForCausalLM
    model, tokenizer = kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    sampling = Sampling(temperature, top_p=0.9, max_new_tokens=6)
    replies = ask(on_cpu(folder, logprobs=True), [Question(prompt, sampling) for prompt in ALL])
    compared = 0
    for prompt, reply in zip(ALL, replies, strict=True):
        answer = [vocabulary[word] for word in reply.text.split()]
        answer += [tokenizer.eos_token_id] * (reply.finish == "stop")
        if len(answer) != reply.output_tokens:
            # a hot sample may hold <unk> or <pad>, which no text shows
            assert temperature
            continue
        expected = forced_logprobs(model, tokenizer(prompt)["input_ids"], answer)
        assert reply.logprob == pytest.approx(sum(expected) / len(expected), abs=1e-4)
        compared += 1
    assert compared >= (2 if temperature else len(ALL))
    assert ask(on_cpu(folder), ["four"])[0].logprob is None


def hot(prompt: str, seed: int, **changes: Any) -> Question:
    return Question(prompt, replace(Sampling(temperature=6.0, max_new_tokens=8, seed=seed), **changes))


def test_a_sample_follows_from_its_seed_alone(memory: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    asked = [hot(prompt, seed) for prompt in ALL for seed in range(4)]
    once = ask(on_cpu(memory), asked)
    assert once == ask(on_cpu(memory), asked)
    # in another order, too
    assert once[::-1] == ask(on_cpu(memory), asked[::-1])
    texts = [reply.text for reply in once]
    assert all(len(set(texts[i : i + 4])) > 1 for i in range(0, len(texts), 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_are_distributed_as_the_model_says(memory: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(memory).eval(), AutoTokenizer.from_pretrained(memory)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer("one two")["input_ids"]])).logits[0, -1]
    count = 1500
    for top_p in (1.0, 0.6):
        expected = (logits / 8.0).softmax(-1)
        order = expected.argsort(descending=True)
        # the fewest of the likeliest that make up the share
        kept = int((expected[order].cumsum(0) < top_p - 1e-6).sum()) + 1
        expected[order[kept:]] = 0
        expected /= expected.sum()
        asked = [hot("one two", seed, temperature=8.0, top_p=top_p, max_new_tokens=1) for seed in range(count)]
        drawn = torch.zeros_like(expected)
        for reply in ask(on_cpu(memory, batch_size=500), asked):
            # the end of an answer and what is unknown have no text
            drawn[tokenizer.convert_tokens_to_ids(reply.text) if reply.text else 0] += 1 / count
        unknown = tokenizer.unk_token_id
        expected[0] += expected[unknown]
        expected[unknown] = 0
        assert set(drawn.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
        # four standard deviations of a share
        assert float((drawn - expected).abs().max()) < 4 * (0.25 / count) ** 0.5
        assert kept > 2


def test_questions_of_one_batch_may_be_drawn_differently(memory: Path) -> None:
    mixed = [
        Question("one two", ROOM),
        hot("one two", 1),
        Question("one two three four five", ROOM, stop=("green",)),
        Question("one two three four five", Sampling(max_new_tokens=2)),
        hot("four", 2, top_p=0.3),
    ]
    together = ask(on_cpu(memory), mixed)
    assert together == ask(on_cpu(memory, batch_size=1), mixed)
    assert [together[i].text for i in (0, 2, 3)] == ["red blue", "blue red blue ", "blue red"]
    assert [together[i].finish for i in (0, 2, 3)] == ["stop", "stop", "length"]


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ((), "blue red blue green one", 6),
        (("green",), "blue red blue ", 4),
        # within a word, and across two
        (("een",), "blue red blue gr", 4),
        (("d b",), "blue re", 3),
        (("one", "red"), "blue ", 2),
        (("blue",), "", 1),
        # the prompt ends with it, and the answer does not hold it
        (("five",), "blue red blue green one", 6),
    ],
)
def test_an_answer_ends_at_a_stop_text(stop: tuple[str, ...], text: str, tokens: int, memory: Path) -> None:
    # beside a row that goes on
    [reply, other] = ask(on_cpu(memory), [Question(ALL[1], ROOM, stop=stop), Question(ALL[3], ROOM, stop=stop)])
    assert (reply.text, reply.finish, reply.output_tokens) == (text, "stop", tokens)
    assert (other.text, other.output_tokens) == (ANSWERS[ALL[3]], 5)


def test_a_model_may_end_its_answers_in_several_ways(memory: Path, tmp_path: Path) -> None:
    for file in memory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((memory / "generation_config.json").read_text())
    green = AutoTokenizer.from_pretrained(memory).get_vocab()["green"]
    (tmp_path / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [green, 0]}))
    [reply, other] = ask(on_cpu(tmp_path), [ALL[1], ALL[0]])
    assert (reply.text, reply.finish, reply.output_tokens) == ("blue red blue", "stop", 4)
    assert (other.text, other.finish, other.output_tokens) == ("red blue", "stop", 3)


def test_an_answer_that_is_cut_says_so(reader: Path, memory: Path) -> None:
    for folder in (reader, memory):
        [cut, whole] = ask(on_cpu(folder), [Question("two one", Sampling(max_new_tokens=n)) for n in (3, 4)])
        assert (cut.text, cut.finish, cut.output_tokens) == ("blue red red", "length", 3)
        assert (whole.text, whole.finish, whole.output_tokens) == ("blue red red", "stop", 4)


def test_a_prompt_beyond_the_context_is_refused_alone(memory: Path) -> None:
    # 48 positions
    asked = ["four " * 38, "four " * 39, "", "four"]
    replies = ask_all(on_cpu(memory), [Question(prompt, ROOM) for prompt in asked])
    assert isinstance(replies[0], Reply)
    assert isinstance(replies[1], TeacherError)
    assert str(replies[1]) == "a prompt of 39 tokens and 10 new ones do not fit into the model's context of 48"
    assert str(replies[2]) == "the prompt is empty"
    assert replies[3].text == "green"


def test_a_template_may_refuse_a_prompt(talker: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(talker)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}one <go>"
    )
    for file in talker.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    user, system = Message("user", "one"), Message("system", "two")
    teacher = on_cpu(tmp_path)
    prompts = [(user,), (system, Message("assistant", "three"))]
    replies = ask_all(teacher, [Question(prompt, ROOM) for prompt in prompts])
    assert isinstance(replies[0], Reply)
    assert isinstance(replies[1], TeacherError)
    assert "refuses the prompt: no system" in str(replies[1])


def test_an_instruction_stands_before_the_first_question_where_no_system_s_turn_may(
    talker: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(talker)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }} {% endfor %}<go>"
    )
    for file in talker.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    teacher = on_cpu(tmp_path)
    folded = (Message("user", "two\n\none"), Message("assistant", "three"), Message("user", "one"))
    prompt = (Message("system", "two"), Message("user", "one"), *folded[1:])
    assert teacher._encode(prompt) == teacher._encode(folded)
    assert teacher.count_tokens(prompt) == teacher.count_tokens(folded)


@pytest.mark.parametrize("trouble", ["missing", "mismatched"])
def test_weights_that_would_be_drawn_at_random_are_named(trouble: str, talker: Path, tmp_path: Path) -> None:
    for file in talker.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    if trouble == "missing":
        del weights[name]
    else:
        weights[name] = weights[name][:, :-1].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = rf"'.* does not hold the weights {name}, which" if trouble == "missing" else "cannot load weights from '"
    with pytest.raises(UserError, match=f"^model: {said}") as raised:
        on_cpu(tmp_path).load()
    assert "\n" not in str(raised.value)


def test_a_batch_beyond_the_memory_is_halved(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = RuntimeError("[enforce fail] can't allocate memory: 9 bytes"), torch.OutOfMemoryError("CUDA")
    sizes = []
    generate = TransformersTeacher._generate

    def small(self: TransformersTeacher, questions: Sequence[Question], prompts: Sequence[list[int]]) -> list[Reply]:
        sizes.append(len(questions))
        if len(questions) > 2 or any(len(prompt) > 6 for prompt in prompts):
            raise cuda if len(sizes) % 2 else cpu
        return generate(self, questions, prompts)

    monkeypatch.setattr(TransformersTeacher, "_generate", small)
    replies = ask_all(on_cpu(memory), [Question(prompt, ROOM) for prompt in ALL])
    assert sizes == [5, 3, 2, 1, 1, 1, 2]
    for prompt, reply in zip(ALL, replies, strict=True):
        if prompt == ALL[3]:
            assert isinstance(reply, TeacherError)
            assert str(reply) == "out of memory with a prompt of 7 tokens on its own"
        else:
            assert reply.text == ANSWERS[prompt]


def test_another_error_of_the_model_is_raised(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[Reply]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(TransformersTeacher, "_generate", broken)
    [reply] = ask_all(on_cpu(memory), [Question("four", ROOM)])
    assert str(reply) == "a bug"


def test_what_is_missing_is_named(tmp_path: Path, memory: Path) -> None:
    nothing, no_tokenizer, no_weights = tmp_path / "nothing", tmp_path / "no_tokenizer", tmp_path / "no_weights"
    for folder in (no_tokenizer, no_weights):
        folder.mkdir()
        (folder / "config.json").write_bytes((memory / "config.json").read_bytes())
    AutoTokenizer.from_pretrained(memory).save_pretrained(no_weights)
    for folder, said in [
        (nothing, "it is no folder here"),
        (no_tokenizer, "none in the folder"),
        (no_weights, "weights"),
    ]:
        with pytest.raises(UserError, match=f"^(model|tokenizer): .*{said}") as raised:
            ask_all(on_cpu(folder), [])
        assert "\n" not in str(raised.value)
        assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"name": ""}, "name"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"^{named} must"):
        TransformersTeacher("a/b", **arguments)


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_a_device_that_is_not_here_is_named(device: str, memory: Path) -> None:
    with pytest.raises(UserError, match=f"^device: '{device}' cannot be used here"):
        ask_all(TransformersTeacher(str(memory), device=device), [])


def test_it_loads_in_another_type(memory: Path) -> None:
    [reply] = ask(on_cpu(memory, dtype="bfloat16"), ["four"])
    assert reply.text == "green"
