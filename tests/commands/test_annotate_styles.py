"""Several styles and teachers in one job: what is asked, how it is read, and what is said of it."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_distill.data import SVAMPDataModule
from lit_distill.equations import evaluate
from tests.runs import read_lines, refusal, run, write_lines
from tests.teachers.models import make_talker
from tests.teachers.servers import Act, Request, Server, completion, fail, lists_models, serving

ALL = ("rationale", "program", "counterfactual", "self_evaluation")


pytestmark = pytest.mark.usefixtures("here")


def style_of(request: Request) -> str:
    """What a prompt asks for, by the words of its instruction."""
    told = request.body["messages"][0]["content"]
    words = {"program": "Python", "counterfactual": "by mistake", "self_evaluation": "Judge"}
    return next((style for style, word in words.items() if word in told), "rationale")


def good(request: Request) -> str:
    """A right answer to a row of `write_release`, n + 1, in each style."""
    asked = request.prompt
    n = int(asked.split()[0])
    return {
        "rationale": f"One more than {n}. The answer is ({n} + 1).",
        "program": f"```python\nn = {n}\nanswer = n + 1  # one more\n```",
        "counterfactual": f"It is less. The answer is {asked.rpartition('Equation: ')[2]}.",
        "self_evaluation": "One more is right. So the solution is **correct**.",
    }[style_of(request)]


def answering(text: Callable[[Request], str] = good) -> Any:
    return lists_models(lambda request: Act(body=completion(request, text(request))))


def svamp(release: Path, server: Server, *more: str, styles: tuple[str, ...] = ALL, teachers: int = 1) -> list[str]:
    others = [
        {"class_path": "OpenAITeacher", "init_args": {"model": f"org/other-{i}", "base_url": server.url}}
        for i in range(1, teachers)
    ]
    return [
        "--data=SVAMPDataModule", f"--data.data_dir={release}", "--teacher=OpenAITeacher", "--teacher.model=org/tiny",
        f"--teacher.base_url={server.url}", *([f"--more_teachers={json.dumps(others)}"] if others else []),
        *(f"--styles.{style}={style}" for style in styles), "--out=out", *more,
    ]  # fmt: skip


def rows_of() -> list[dict[str, Any]]:
    return read_lines(Path("out/rationales.jsonl"))


def test_each_teacher_is_asked_in_each_style_once(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(answering()) as server:
        run("annotate", svamp(release, server, teachers=2))
        assert len(server.requests) == 2 * 4 * 12
        shown = capsys.readouterr().out
        first = Path("out/rationales.jsonl").read_bytes()
        run("annotate", svamp(release, server, teachers=2))
        # one teacher and style after the other are the same questions
        run("annotate", svamp(release, server, styles=("program",)))
        # the kind is the style's name, and the reverse
        for more in (["--kind=program", "--prompt=program"], ["--prompt=program"], ["--kind=program"]):
            run("annotate", svamp(release, server, *more, styles=()))
        assert len(server.requests) == 2 * 4 * 12
    assert Path("out/rationales.jsonl").read_bytes() == first
    rows = rows_of()
    assert Counter((row["teacher"], row["kind"]) for row in rows) == {
        (teacher, kind): 12 for teacher in ("tiny", "other-1") for kind in ALL
    }
    # in the data's order, and in the order in which they were asked for
    assert [(row["id"], row["teacher"], row["kind"]) for row in rows[:8]] == [
        ("svamp-train-0", teacher, kind) for teacher in ("tiny", "other-1") for kind in ALL
    ]
    assert {request.body["model"] for request in server.requests[:48]} == {"org/tiny"}
    of_kind = {row["kind"]: row for row in rows if (row["id"], row["teacher"]) == ("svamp-train-3", "tiny")}
    assert {kind: (row["rationale"], row["label"], row["parsed"], row["agrees"]) for kind, row in of_kind.items()} == {
        "rationale": ("One more than 3.", "(3 + 1)", True, True),
        "program": ("n = 3; answer = n + 1", "4", True, True),
        "counterfactual": ("It is less.", of_kind["counterfactual"]["label"], True, False),
        "self_evaluation": ("One more is right.", "correct", True, True),
    }
    assert evaluate(of_kind["counterfactual"]["label"]) not in (None, 4.0)
    lines = [line.split() for line in shown.splitlines()]
    assert ["teacher", "and", "kind", "answers", "parsed", "agree", "distinct", "tokens"] in lines
    # an answer's words are its tokens
    assert lines.count(["program", "12", "100.0", "%", "100.0", "%", "100.0", "%", "156"]) == 2
    assert lines.count(["counterfactual", "12", "100.0", "%", "0.0", "%", "100.0", "%", "132"]) == 2
    jobs = json.loads(Path("out/metadata.json").read_text())["jobs"]
    assert [(job["teacher"], job["kind"], job["rows"]) for job in jobs[:8]] == [
        (teacher, kind, 12) for teacher in ("tiny", "other-1") for kind in ALL
    ]
    assert {path.stem for path in Path("out/prompts").iterdir()} == {row["prompt"] for row in rows}


def test_what_is_told_of_the_row(release: Path) -> None:
    with serving(answering()) as server:
        run("annotate", svamp(release, server, "--limit=4", "--concurrency=1"))
    asked = {(style_of(request), int(request.prompt.split()[0])): request.prompt for request in server.requests}
    assert len(asked) == 16
    assert asked["program", 2] == "2 + 1 ?"
    # the same wrong answer at any time and in any part of the data, and never the gold one
    wrong = {n: asked["counterfactual", n].removeprefix(f"{n} + 1 ?\nEquation: ") for n in range(4)}
    assert all(evaluate(equation) not in (None, n + 1.0) for n, equation in wrong.items())
    assert all(
        re.fullmatch(rf"\({n} [-*/] 1\)", equation.replace("( ", "(").replace(" )", ")"))
        for n, equation in wrong.items()
    )
    data = SVAMPDataModule(data_dir=release)
    assert [data.wrong_label(row) for row in list(data.rows_to_ask("train") or [])[:4]] == list(wrong.values())
    given = [row.outputs[0] for row in list(data.released("train") or [])[:4]]
    assert [asked["self_evaluation", n] for n in range(4)] == [
        f"{n} + 1 ?\nSolution: {output.text} The answer is {output.label}." for n, output in enumerate(given)
    ]


def test_a_verdict_agrees_if_it_is_right(release: Path) -> None:
    """Of the first answers to four rows, those to the last two are wrong; the teacher says so of every other one."""
    lines = [
        {"id": f"svamp-train-{n}", "split": "train", "rationale": "R", "label": f"({n} + {1 + n // 2})"}
        for n in range(4)
    ]
    write_lines(Path("earlier/rationales.jsonl"), [lines[0] | {"rationale": None, "label": None}, *lines])
    verdicts = ["correct", "Incorrect", "correct", "wrong"]
    arguments = ["--limit=5", "--data.rationales=earlier"]

    def judge(request: Request) -> str:
        if style_of(request) == "rationale":
            return good(request)
        return f"I think. So the solution is {verdicts[int(request.prompt.split()[0])]}."

    with serving(answering(judge)) as server:
        run("annotate", svamp(release, server, *arguments, styles=("self_evaluation",)))
        # the fifth row has none to judge
        assert len(server.requests) == 4
        assert "Solution: R The answer is (3 + 2)." in {
            request.prompt.partition("\n")[2] for request in server.requests
        }
        expected = [("correct", True), ("wrong", False), ("correct", False), ("wrong", True)]
        assert [(row["label"], row["agrees"]) for row in rows_of()] == expected
        given = [(row["given_rationale"], row["given_label"]) for row in rows_of()]
        assert given == [("R", f"({n} + {1 + n // 2})") for n in range(4)]
        # a job of another style leaves them
        run("annotate", svamp(release, server, "--limit=5", styles=("rationale",)))
    assert [(row["label"], row["agrees"]) for row in rows_of() if row["kind"] == "self_evaluation"] == expected


def test_programs_that_do_not_run_are_counted(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {0: "print(1)", 1: "import os", 2: "answer = 2 + x", 3: "answer = 9 ** 9 ** 9", 4: "answer = 1"}

    def answer(request: Request) -> str:
        return bad.get(int(request.prompt.split()[0]), good(request))

    with serving(answering(answer)) as server:
        run("annotate", svamp(release, server, styles=("program",)))
        shown = capsys.readouterr().out
        rows = rows_of()
        # a plain job in the same folder does not read them as its own
        run("annotate", svamp(release, server, "--limit=1", styles=("rationale",)))
        assert [row for row in rows_of() if row["kind"] == "program"] == rows
    assert [(row["parsed"], row["agrees"], row["error"]) for row in rows[:5]] == [
        (False, False, "the program does not run: statement 1 has no value: print(1)"),
        (False, False, "the program does not run: statement 1 has no value: import os"),
        (False, False, "the program does not run: statement 1 has no value: answer = 2 + x"),
        (False, False, "the program does not run: statement 1 has no value: answer = 9 ** 9 ** 9"),
        (True, False, None),
    ]
    assert {(row["parsed"], row["agrees"]) for row in rows[5:]} == {(True, True)}
    table = dict(re.findall(r"│ (\S.*?) +│ +(\S.*?) │", shown))
    assert (table["answers"], table["errors"], table["programs that do not run"]) == ("12", "0", "4")
    assert (table["parsed"], table["agree with gold"]) == ("66.7 %", "58.3 %")
    assert "1 x the program does not run: statement 1" in shown


def test_samples_of_several_teachers_share_a_budget(release: Path) -> None:
    prices = {"input_price": 0, "output_price": 1e6}  # a dollar a word
    with serving(answering()) as server:
        others = [{"class_path": "OpenAITeacher", "init_args": {"model": "b", "base_url": server.url} | prices}]
        own = svamp(release, server, "--teacher.input_price=0", "--teacher.output_price=1e6", styles=("rationale",))
        own += [f"--more_teachers={json.dumps(others)}", "--concurrency=1", "--max_new_tokens=10", "--num_samples=2"]
        # an answer has ten words: 24 of the first teacher, of the second one six
        run("annotate", own, "--max_cost=300")
        assert Counter(row["teacher"] for row in rows_of()) == {"tiny": 24, "b": 6}
        stopped = [job["stopped"] for job in json.loads(Path("out/metadata.json").read_text())["jobs"]]
        assert stopped == ["max_cost 300 reached: 300 used, the next may take 10"] * 2
        run("annotate", own, "--max_cost=1000")
    assert len(server.requests) == 48
    assert {row["votes"] for row in rows_of()} == {2}


def test_a_teacher_that_is_gone_leaves_the_answers_of_others(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def behave(request: Request) -> Act:
        if request.body["model"] == "org/other-1" and gone:
            return fail(401, "no such key")
        return Act(body=completion(request, good(request)))

    gone = True
    with serving(lists_models(behave)) as server:
        line = refusal(capsys, "annotate", svamp(release, server, styles=("rationale",), teachers=2))
        assert line.startswith("api_key: the server wants one, and none was given (401: no such key")
        assert Counter(row["teacher"] for row in rows_of()) == {"tiny": 12}
        gone = False
        run("annotate", svamp(release, server, styles=("rationale",), teachers=2))
    assert Counter(row["teacher"] for row in rows_of()) == {"tiny": 12, "other-1": 12}
    assert Counter(request.body["model"] for request in server.requests)["org/tiny"] == 12


def test_models_in_this_process_answer_one_after_the_other(here: Path) -> None:
    """Each is loaded when it is asked; a style whose answers it cannot give is counted."""
    said = {"one": "fish : carp . So the answer is owl .", "two": "No . So the solution is wrong ."}
    folders = [make_talker(here / name, text) for name, text in said.items()]
    others = [{"class_path": "TransformersTeacher", "init_args": {"model": str(folders[1]), "layout": "completion"}}]
    arguments = ["--data=ToyDataModule", "--data.train_size=6", "--num_demonstrations=1", "--max_new_tokens=16"]
    arguments += ["--teacher=TransformersTeacher", f"--teacher.model={folders[0]}", "--teacher.layout=completion"]
    styles = ["--styles.rationale=rationale", "--styles.self_evaluation=self_evaluation"]
    run("annotate", arguments, styles, f"--more_teachers={json.dumps(others)}", "--out=out")
    rows = rows_of()
    assert Counter((row["teacher"], row["kind"], row["label"]) for row in rows) == {
        ("one", "rationale", "owl"): 6,
        ("one", "self_evaluation", None): 6,
        ("two", "rationale", None): 6,
        ("two", "self_evaluation", "wrong"): 6,
    }
    # the toy's own teacher, which is judged, is always right
    assert {row["agrees"] for row in rows if row["kind"] == "self_evaluation"} == {False}
    assert all(row["given_label"] in str(row["given_rationale"]) for row in rows if row["kind"] == "self_evaluation")


def test_a_dry_run_shows_each_style(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(answering()) as server:
        run("annotate", svamp(release, server, "--dry_run", "--num_samples=3", teachers=2))
        assert (server.requests, Path("out").exists()) == ([], False)
    shown = capsys.readouterr().out
    assert re.findall(r"svamp-train-0, (\w+) \(chat\)", shown) == list(ALL)
    rows = re.findall(r"^ *(\w+) +(\d+) +(\d+) +([\d,]+) +([\d,]+) *$", shown, re.MULTILINE)
    assert [(kind, count, questions) for kind, count, questions, *_ in rows] == [
        *[(kind, "12", "36") for kind in ALL] * 2, ("all", "12", "288"),
    ]  # fmt: skip
    read = [int(number.replace(",", "")) for *_, number, _ in rows]
    assert sum(read[:-1]) == read[-1]


def test_the_same_in_yaml(release: Path) -> None:
    # a folder is no prompt
    Path("program").mkdir()
    with serving(answering()) as server:
        Path("own.yaml").write_text(
            f"data: {{class_path: SVAMPDataModule, init_args: {{data_dir: {release}}}}}\n"
            f"teacher: {{class_path: OpenAITeacher, init_args: {{base_url: {server.url}, model: tiny}}}}\n"
            f"more_teachers:\n- {{class_path: OpenAITeacher, init_args: {{base_url: {server.url}, model: big}}}}\n"
            "styles: {rationale: rationale, code: program}\nnum_samples: 2\nlimit: 3\nout: out\n"
        )
        run("annotate", "--config=own.yaml")
    assert Counter((row["teacher"], row["kind"]) for row in rows_of()) == {
        (teacher, kind): 6 for teacher in ("tiny", "big") for kind in ("rationale", "code")
    }
    # greedy samples would all be the same
    assert {request.body["temperature"] for request in server.requests} == {0.7}


@pytest.mark.parametrize(
    ("styles", "more", "line"),
    [
        (ALL, ["--kind=program"], "kind: is for one style; leave it out, or styles: rationale, program,"),
        (ALL, ["--prompt=program"], "prompt: is for one style; leave it out, or styles: rationale, program"),
        (ALL, ["--demonstrations=d.jsonl"], "demonstrations: is for one style; leave it out, or styles: "),
        (("sonnet",), [], "styles.sonnet: svamp has no style 'sonnet'; there are rationale, counterfactual, program, "),
        ((), ["--prompt=sonnet"], "prompt: svamp has no style 'sonnet'; there are rationale, counterfactual, program,"),
        ((), ["--styles={}"], "styles must map at least one kind to a prompt"),
        ((), ["--styles={a: none.yaml}"], "none.yaml: cannot be read or written: No such file or directory"),
        (("program",), ["--structured"], "structured: not with styles.program: "),
        (("counterfactual",), ["--until_agrees=3"], "until_agrees: not with styles.counterfactual: "),
        (("program",), ["--num_demonstrations=4"], "num_demonstrations must be at most 3, got 4"),
        (("self_evaluation",), ["--split=test"], "styles.self_evaluation: no row of svamp test has a teacher"),
        ((), ["--teacher.name=other-1"], "more_teachers.0: another teacher has the name 'other-1', too"),
        ((), ["--teacher.input_price=1", "--max_cost=1"], "max_cost needs more_teachers.0.input_price and "),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_is_asked(
    styles: tuple[str, ...], more: list[str], line: str, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (release / "svamp" / "llm").glob("test_*"):
        path.unlink()
    with serving(answering()) as server:
        said = refusal(capsys, "annotate", svamp(release, server, styles=styles, teachers=2), more)
        assert server.requests == []
    assert said.startswith(line)
    assert "\n" not in said


def test_a_style_that_the_data_cannot_have_names_those_that_it_can(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(here / "rows.jsonl", [{"id": "a", "input": "how many ?", "label": "3"}])
    own = [
        "--data=JSONLDataModule",
        f"--data.train={data}",
        "--teacher=OpenAITeacher",
        "--teacher.model=m",
        "--out=out",
    ]
    line = refusal(capsys, "annotate", [*own, "--styles.x=counterfactual"])
    assert line == (
        "styles.x: no row of jsonl train has a gold label and other choices, or a gold equation with an operator;"
        " styles that it has: rationale, program"
    )
