"""Many questions at a time: how many, in what order, until when."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from lit_distill.errors import UserError
from lit_distill.questions import Question, Reply, Sampling
from lit_distill.teachers import runner as module
from lit_distill.teachers.base import BatchTeacher, Teacher, TeacherBusy, TeacherError
from lit_distill.teachers.runner import Budget, RequestRunner, Rounds, queued_interrupts

Said = list[tuple[str, Reply | TeacherError]]


class Scripted(Teacher):
    """Answers with the prompt in capitals after a moment; some prompts it treats in another way."""

    def __init__(self, delay: float = 0.0, **kwargs: Any) -> None:
        super().__init__("scripted", **kwargs)
        self.delay = delay
        self.asked: list[str] = []
        self.running = self.peak = 0
        self.opened = self.closed = 0

    async def open(self) -> None:
        self.opened += 1

    async def close(self) -> None:
        self.closed += 1

    async def answer(self, question: Question) -> Reply:
        assert isinstance(question.prompt, str)
        self.asked.append(question.prompt)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(self.delay)
        finally:
            self.running -= 1
        if "never" in question.prompt:
            raise TeacherError("it never will")
        if "busy" in question.prompt:
            raise TeacherBusy("not now")
        if "key" in question.prompt:
            raise UserError("api_key: wrong")
        if "forever" in question.prompt:
            await asyncio.sleep(3600)
        return Reply(question.prompt.upper(), input_tokens=3, output_tokens=2)


def question(text: str, max_new_tokens: int = 256) -> tuple[str, Question]:
    return text, Question(text, Sampling(max_new_tokens=max_new_tokens))


def one_each(texts: Sequence[str], max_new_tokens: int = 256) -> Iterator[Rounds[str]]:
    for text in texts:
        yield iter([[question(text, max_new_tokens)]])


def ask(
    teacher: Teacher, rows: Iterator[Rounds[str]], concurrency: int = 4, budget: Budget | None = None
) -> tuple[Said, RequestRunner[str]]:
    said: Said = []

    def tell(tag: str, reply: Reply | TeacherError) -> None:
        said.append((tag, reply))
        if budget is not None and isinstance(reply, Reply):
            budget.use((reply.input_tokens or 0) + (reply.output_tokens or 0), 0.5)

    job = RequestRunner(teacher, concurrency, tell, budget)
    run(job, rows)
    return said, job


def run(runner: RequestRunner[str], rows: Iterator[Rounds[str]]) -> None:
    with queued_interrupts() as interrupts:
        runner.run(rows, interrupts)


def texts_of(said: Said) -> dict[str, str]:
    return {tag: reply.text for tag, reply in said if isinstance(reply, Reply)}


def test_each_question_is_asked_once_and_told_with_its_tag() -> None:
    teacher = Scripted()
    wanted = [f"q{i}" for i in range(57)]
    said, job = ask(teacher, one_each(wanted))
    assert sorted(teacher.asked) == sorted(wanted)
    assert texts_of(said) == {text: text.upper() for text in wanted}
    assert (job.stopped, job.busy.total(), teacher.opened, teacher.closed) == (None, 0, 1, 1)


@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_as_many_are_under_way_as_may_be(concurrency: int) -> None:
    teacher = Scripted(delay=0.002)
    ask(teacher, one_each([f"q{i}" for i in range(40)]), concurrency)
    assert teacher.peak == concurrency


def test_the_samples_of_a_row_share_the_bound() -> None:
    teacher = Scripted(delay=0.002)
    ask(teacher, iter([iter([[question(f"row{r} q{i}") for i in range(9)]]) for r in range(4)]), 4)
    assert len(teacher.asked) == 36
    assert teacher.peak == 4


def test_rows_are_read_as_they_are_needed() -> None:
    teacher = Scripted(delay=0.001)
    ahead = []

    def rows() -> Iterator[Rounds[str]]:
        for i in range(100):
            ahead.append(i - len(teacher.asked))
            yield iter([[question(f"q{i}")]])

    ask(teacher, rows(), 5)
    assert len(teacher.asked) == 100
    assert max(ahead) <= 5


def test_a_further_round_sees_the_answers_of_the_one_before() -> None:
    teacher = Scripted()
    seen: list[tuple[str, int]] = []
    said: Said = []

    def row(name: str) -> Rounds[str]:
        for number in range(3):
            if any(tag == f"{name} 1" for tag, _ in said):
                return
            seen.append((name, number))
            yield [question(f"{name} {number}")]

    job: RequestRunner[str] = RequestRunner(teacher, 4, lambda tag, reply: said.append((tag, reply)))
    run(job, iter([row("a"), row("b")]))
    assert sorted(seen) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_rows_with_nothing_to_ask_are_passed_over() -> None:
    teacher = Scripted()
    nothing: list[Rounds[str]] = [iter([]) for _ in range(2000)]
    said, _ = ask(teacher, iter([*nothing, *one_each(["q"]), *nothing]))
    assert texts_of(said) == {"q": "Q"}


def test_what_is_never_answered_does_not_stop_the_others() -> None:
    said, job = ask(Scripted(), one_each(["a", "never", "b"]))
    assert texts_of(said) == {"a": "A", "b": "B"}
    (error,) = [reply for tag, reply in said if tag == "never"]
    assert isinstance(error, TeacherError)
    assert job.stopped is None


def test_what_is_busy_is_left_and_counted() -> None:
    said, job = ask(Scripted(), one_each(["a", "busy", "b"]))
    assert texts_of(said) == {"a": "A", "b": "B"}
    assert (len(said), job.busy, job.stopped) == (2, {"not now": 1}, None)


def test_a_teacher_that_is_gone_ends_the_job() -> None:
    teacher = Scripted()
    with pytest.raises(UserError, match=r"^teacher: scripted does not answer any more \(not now\)"):
        ask(teacher, one_each(["busy"] * 1000))
    assert len(teacher.asked) < 50


def test_a_teacher_that_refuses_whatever_it_is_asked_ends_the_job() -> None:
    teacher = Scripted()
    with pytest.raises(UserError, match=r"^teacher: the first 20 questions were all refused \(it never will\)"):
        ask(teacher, one_each(["never"] * 1000))
    assert len(teacher.asked) < 30
    # none of them is settled by that
    said: Said = []
    with pytest.raises(UserError):
        run(RequestRunner(Scripted(), 4, lambda tag, reply: said.append((tag, reply))), one_each(["never"] * 50))
    assert said == []
    # of a teacher that answered at an earlier start, each is refused for its own sake
    known = Scripted()
    known.has_answered = True
    assert len(ask(known, one_each(["never"] * 50))[0]) == 50
    # fewer, or after an answer, are each on their own
    assert len(ask(Scripted(), one_each(["never"] * 19))[0]) == 19
    assert len(ask(Scripted(), one_each(["a", *["never"] * 100]))[0]) == 101


def test_a_wrong_key_ends_the_job_at_once_and_keeps_what_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.2)
    teacher = Scripted()
    said: Said = []
    job: RequestRunner[str] = RequestRunner(teacher, 3, lambda tag, reply: said.append((tag, reply)))
    with pytest.raises(UserError, match=r"^api_key: wrong"):
        run(job, one_each(["a", "b", "forever", "key", *(f"q{i}" for i in range(500))]))
    assert {"a", "b"} <= texts_of(said).keys()
    assert len(teacher.asked) < 20
    assert (teacher.closed, teacher.running, job.stopped) == (1, 0, "failed")


def test_what_goes_wrong_in_telling_ends_the_job() -> None:
    def tell(tag: str, reply: Reply | TeacherError) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run(RequestRunner(Scripted(), 2, tell), one_each([f"q{i}" for i in range(100)]))


@pytest.mark.parametrize(
    ("limits", "reason", "answers"),
    # 5 tokens and half a dollar an answer; a question may use 4 tokens and 16 more, at a dollar for twenty
    [
        ({"max_tokens": 50}, "max_tokens 50 reached: 35 used, the next may take 20", 7),
        ({"max_cost": 3.2}, "max_cost 3.2 reached: 2.5 used, the next may take 1", 5),
    ],
)
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_budget_ends_the_job(limits: dict[str, Any], reason: str, answers: int, concurrency: int) -> None:
    teacher = Scripted(delay=0.001, input_price=50_000, output_price=50_000)
    budget = Budget(**limits)
    said, job = ask(teacher, one_each([f"q{i}" for i in range(200)], max_new_tokens=16), concurrency, budget)
    assert job.stopped == reason
    assert len(said) == len(teacher.asked) == answers
    assert (budget.tokens, budget.cost) == (5 * answers, 0.5 * answers)


@pytest.mark.parametrize("limits", [{"max_tokens": 1000}, {"max_cost": 10.0}])
def test_a_budget_bounds_what_is_in_flight_before_the_first_answer(limits: dict[str, Any]) -> None:
    class Thorough(Scripted):
        """Uses all that a question may use: 4 tokens of the prompt and 96 of the answer, at a cent each."""

        async def answer(self, question: Question) -> Reply:
            await super().answer(question)
            return Reply("", input_tokens=4, output_tokens=96)

    teacher = Thorough(delay=0.01, input_price=10_000, output_price=10_000)
    budget = Budget(**limits)
    job: RequestRunner[str] = RequestRunner(teacher, 500, lambda tag, reply: budget.use(100, 1.0), budget)
    run(job, one_each([f"q{i}" for i in range(2000)], max_new_tokens=96))
    assert (teacher.peak, len(teacher.asked), budget.tokens, budget.cost) == (10, 10, 1000, 10.0)
    assert str(job.stopped).startswith(f"{next(iter(limits))} ")


def test_a_budget_that_is_used_up_asks_nothing() -> None:
    teacher = Scripted()
    _, job = ask(teacher, one_each(["a"]), budget=Budget(max_tokens=50, tokens=50))
    assert teacher.asked == []
    assert str(job.stopped).startswith("max_tokens 50 reached: 50 used")


class Batches(BatchTeacher):
    """Notes how many questions each batch holds."""

    windows = 1
    patience = 2.0

    def __init__(self, batch_size: int) -> None:
        super().__init__("batches", batch_size)
        self.sizes: list[int] = []

    def answer_batch(self, questions: Sequence[Question]) -> list[Reply | TeacherError]:
        self.sizes.append(len(questions))
        return [Reply("yes") for _ in questions]


@pytest.mark.parametrize(("rows", "sizes"), [(900, [300, 300, 300]), (40, [40])])
def test_windows_are_full_however_long_the_prompts_take_to_write(rows: int, sizes: list[int]) -> None:
    def slow() -> Iterator[Rounds[str]]:
        for i, row in enumerate(one_each([f"q{i}" for i in range(rows)])):
            if i % 30 == 0:
                # rows that have nothing to ask in between
                yield from (iter(()) for _ in range(300))
                time.sleep(0.02)
            yield row

    teacher = Batches(300)
    said, _ = ask(teacher, slow(), teacher.concurrency)
    assert len(said) == rows
    assert teacher.sizes == sizes


def test_an_interruption_waits_for_what_is_under_way() -> None:
    teacher = Scripted(delay=0.2)
    said: Said = []
    job: RequestRunner[str] = RequestRunner(teacher, 3, lambda tag, reply: said.append((tag, reply)))
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    run(job, one_each([f"q{i}" for i in range(100)]))
    assert job.stopped == "interrupted"
    assert len(said) == len(teacher.asked) == 3


def test_a_second_interruption_waits_for_nothing() -> None:
    teacher = Scripted()
    for after in (0.2, 0.8):
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    job: RequestRunner[str] = RequestRunner(teacher, 3, lambda tag, reply: None)
    run(job, one_each(["forever"] * 5))
    assert job.stopped == "interrupted"
    assert time.monotonic() - began < 60
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_row_s_other_samples_are_kept_when_one_fails_for_good() -> None:
    class Late(Scripted):
        async def answer(self, question: Question) -> Reply:
            reply = await super().answer(question)
            await asyncio.sleep(0.3)
            return reply

    said: Said = []
    job: RequestRunner[str] = RequestRunner(Late(), 4, lambda tag, reply: said.append((tag, reply)))
    with pytest.raises(UserError, match=r"^api_key: wrong"):
        run(job, iter([iter([[question(text) for text in ("a", "key", "b")]])]))
    assert texts_of(said) == {"a": "A", "b": "B"}


def test_a_question_that_a_teacher_cancels_is_not_lost_in_silence() -> None:
    class Cancels(Scripted):
        async def answer(self, question: Question) -> Reply:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        ask(Cancels(), one_each(["a"]))


class Stuck(BatchTeacher):
    """Is stuck in a thread, in loading or in a batch."""

    def __init__(self, where: str) -> None:
        super().__init__("stuck", batch_size=1)
        self.where = where
        self.let_go = threading.Event()

    def load(self) -> None:
        if self.where == "load":
            self.let_go.wait(60)

    def answer_batch(self, questions: Sequence[Question]) -> list[Reply | TeacherError]:
        self.let_go.wait(60)
        return [Reply("late") for _ in questions]


@pytest.mark.parametrize(("where", "after"), [("load", [0.2]), ("batch", [0.2, 0.4]), ("batch", [0.2, 0.2])])
def test_a_thread_that_is_stuck_is_left_and_tells_nothing_any_more(
    where: str, after: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAVE_SECONDS", 0.2)
    teacher = Stuck(where)
    said: Said = []
    # of two kinds: two of one kind at once are one to a process
    for seconds, number in zip(after, (signal.SIGINT, signal.SIGTERM), strict=False):
        threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
    began = time.monotonic()
    job: RequestRunner[str] = RequestRunner(teacher, 3, lambda tag, reply: said.append((tag, reply)))
    run(job, one_each(["q"] * 5))
    assert job.stopped == "interrupted"
    assert time.monotonic() - began < 20
    teacher.let_go.set()
    for thread in threading.enumerate():
        if thread.name == "requests":
            thread.join(20)
    assert said == []


def test_what_two_interruptions_at_once_stop_is_told_to_the_end_or_not_at_all(
    capfd: pytest.CaptureFixture[str],
) -> None:
    for _ in range(20):
        said: Said = []

        def tell(tag: str, reply: Reply | TeacherError, said: Said = said) -> None:
            said.append((tag, reply))

        job: RequestRunner[str] = RequestRunner(Scripted(delay=0.002), 3, tell)

        def twice() -> None:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

        threading.Timer(0.02, twice).start()
        run(job, one_each([f"q{i}" for i in range(10_000)]))
        told = len(said)
        assert job.stopped == "interrupted"
        time.sleep(0.01)
        assert len(said) == told
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert "Traceback" not in capfd.readouterr().err


def test_an_interruption_says_that_a_second_one_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    run(RequestRunner(Scripted(delay=0.3), 3, lambda tag, reply: None), one_each(["q"] * 10))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("interrupted: ")


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with queued_interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.empty()
    finally:
        signal.signal(signal.SIGINT, before)


def test_it_runs_where_an_event_loop_runs_already() -> None:
    async def cell() -> Said:
        return ask(Scripted(), one_each(["a"]))[0]

    assert texts_of(asyncio.run(cell())) == {"a": "A"}


def test_a_teacher_that_does_not_open_is_told() -> None:
    class Absent(Scripted):
        async def open(self) -> None:
            raise UserError("base_url: no server")

    teacher = Absent()
    with pytest.raises(UserError, match=r"^base_url: no server"):
        ask(teacher, one_each(["a"]))
    assert teacher.asked == []
