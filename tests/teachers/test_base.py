"""How a `BatchTeacher` makes batches of what it is asked one by one."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from lit_distill.errors import UserError
from lit_distill.questions import Message, Question, Reply, Sampling
from lit_distill.teachers import BatchTeacher, Teacher
from lit_distill.teachers.base import TeacherError
from tests.teachers.servers import ask_all


class Echo(BatchTeacher):
    """Says what it was asked, and notes in which batches and threads."""

    windows = 3
    patience = 0.02

    def __init__(self, batch_size: int = 2, **kwargs: Any) -> None:
        super().__init__("folder/echo", batch_size, **kwargs)
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self.loaded = False
        self.started, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def load(self) -> None:
        self.loaded = True
        self.threads.add(threading.get_ident())

    def unload(self) -> None:
        self.loaded = False
        self.threads.add(threading.get_ident())

    def answer_batch(self, questions: Sequence[Question]) -> list[Reply | TeacherError]:
        self.threads.add(threading.get_ident())
        prompts = [str(question.prompt) for question in questions]
        self.batches.append(prompts)
        self.started.set()
        assert self.go_on.wait(10)
        if "bad batch" in prompts:
            raise UserError("model: gone")
        if "short" in prompts:
            return [Reply("one for all")]
        return [TeacherError("bad") if prompt == "bad" else Reply(prompt.upper()) for prompt in prompts]


def ask(teacher: BatchTeacher, *prompts: str) -> list[Reply | BaseException]:
    return ask_all(teacher, [Question(prompt, Sampling()) for prompt in prompts])


def test_the_longest_are_answered_first_and_each_once() -> None:
    teacher = Echo()
    answers = ask(teacher, "aa", "b", "cccc", "ddd", "eeeee")
    assert answers == [Reply("AA"), Reply("B"), Reply("CCCC"), Reply("DDD"), Reply("EEEEE")]
    assert teacher.batches == [["eeeee", "cccc"], ["ddd", "aa"], ["b"]]
    assert teacher.concurrency == 6


def test_a_window_makes_the_same_batches_in_any_order() -> None:
    first, second = Echo(), Echo()
    ask(first, "aa", "bb", "cc", "d")
    ask(second, "d", "cc", "aa", "bb")
    assert first.batches == second.batches == [["aa", "bb"], ["cc", "d"]]


def test_one_thread_does_it_all_and_is_not_that_of_the_loop() -> None:
    teacher = Echo()
    ask(teacher, "a", "b", "c")
    assert len(teacher.threads) == 1
    assert threading.get_ident() not in teacher.threads
    assert not teacher.loaded


def test_what_a_batch_raises_reaches_its_askers_alone() -> None:
    answers = ask(Echo(), "bad batch", "bb", "cccc", "bad", "e")
    assert isinstance(answers[0], UserError)
    assert answers[2] is answers[0]
    assert isinstance(answers[3], TeacherError)
    assert [answers[1], answers[4]] == [Reply("BB"), Reply("E")]


def test_answers_that_are_too_few_leave_nobody_waiting() -> None:
    answers = ask(Echo(), "short", "b")
    assert all(str(answer) == "Echo answered 1 of 2 questions" for answer in answers)


class Odd(Echo):
    """Raises what no future can hold."""

    def answer_batch(self, questions: Sequence[Question]) -> list[Reply | TeacherError]:
        return [next(iter(())) for _ in questions]


def test_a_stopped_iteration_leaves_nobody_waiting() -> None:
    (answer,) = asyncio.run(_in_time(Odd(), "a"))
    assert isinstance(answer, RuntimeError)
    assert "StopIteration" in str(answer)


async def _in_time(teacher: Teacher, prompt: str) -> list[Reply | BaseException]:
    await teacher.open()
    async with asyncio.timeout(10):
        return [*await asyncio.gather(teacher.answer(Question(prompt, Sampling())), return_exceptions=True)]


class Stuck(Echo):
    """Loads until it may go on."""

    def load(self) -> None:
        self.go_on.wait(60)


def test_no_thread_of_a_teacher_is_waited_for_at_the_end_of_the_process() -> None:
    teacher = Stuck()
    teacher.go_on.clear()

    async def run() -> list[bool]:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(teacher.open(), 0.1)
        return [thread.daemon for thread in threading.enumerate() if thread.name == "teacher"]

    daemons = asyncio.run(run())
    teacher.go_on.set()
    assert daemons
    assert all(daemons)


async def _with(teacher: Echo, do: Callable[[], Awaitable[None]]) -> None:
    await teacher.open()
    try:
        await asyncio.wait_for(do(), 20)
    finally:
        await teacher.close()


def test_an_asker_who_gives_up_does_not_break_the_batch() -> None:
    teacher = Echo()
    teacher.go_on.clear()

    async def do() -> None:
        tasks = [asyncio.create_task(teacher.answer(Question(prompt, Sampling()))) for prompt in ("aaaa", "bbb", "cc")]
        await asyncio.to_thread(teacher.started.wait, 10)
        # one that is being answered, and one that waits
        tasks[0].cancel()
        tasks[2].cancel()
        teacher.go_on.set()
        assert await tasks[1] == Reply("BBB")
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes] == [True, False, True]

    asyncio.run(_with(teacher, do))
    assert teacher.batches == [["aaaa", "bbb"]]


def test_who_asks_during_a_batch_is_answered_after_it() -> None:
    teacher = Echo()
    teacher.go_on.clear()

    async def do() -> None:
        first = asyncio.create_task(teacher.answer(Question("a", Sampling())))
        await asyncio.to_thread(teacher.started.wait, 10)
        second = asyncio.create_task(teacher.answer(Question("b", Sampling())))
        await asyncio.sleep(0)
        teacher.go_on.set()
        assert [await first, await second] == [Reply("A"), Reply("B")]
        # and one who asks when nobody has for a while
        assert await teacher.answer(Question("c", Sampling())) == Reply("C")

    asyncio.run(_with(teacher, do))
    assert teacher.batches == [["a"], ["b"], ["c"]]


def test_it_opens_again_in_another_loop() -> None:
    teacher = Echo()
    assert ask(teacher, "a") == [Reply("A")]
    assert ask(teacher, "b") == [Reply("B")]


def test_names_prices_and_counts() -> None:
    teacher = Echo(input_price=2.0, output_price=10.0)
    assert (teacher.name, teacher.model) == ("echo", "folder/echo")
    assert teacher.cost(1_000_000, 500_000) == 7.0
    assert Echo().cost(1, 1) is None
    assert Echo(output_price=1.0).cost(9, 2_000_000) == 2.0
    assert Echo().settings == {"class": "Echo", "model": "folder/echo", "layout": "chat"}
    # four bytes are a token, and a turn has a few of its own
    assert super(Echo, teacher).count_tokens((Message("system", "1234"), Message("user", "12345678"))) == 3 + 8
    assert super(Echo, teacher).count_tokens("слово") == 10 // 4 + 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"layout": "letter"}, "layout"),
        ({"name": ""}, "name"),
        ({"input_price": -1.0}, "input_price"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"^{named} must"):
        Echo(**arguments)
