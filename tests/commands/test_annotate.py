"""The command, against a server on loopback: what is asked, what is kept, what is said of it."""

import json
import re
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard

from lit_distill.commands import annotate as command
from lit_distill.data import JSONLDataModule, ToyDataModule
from lit_distill.errors import UserError
from lit_distill.teachers import OpenAITeacher, Teacher
from tests.runs import read_lines, refusal, run, small_model, small_trainer, write_lines
from tests.teachers.models import make_talker
from tests.teachers.servers import Act, Behaviour, Request, Server, completion, fail, lists_models, serving

pytestmark = pytest.mark.usefixtures("here")


def number_of(request: Request) -> int:
    """The number in a row's input, as `write_release` and `numbered` write it."""
    return next(int(word) for word in request.prompt.split() if word.isdigit())


def right(request: Request) -> str:
    """What `write_release` has as SVAMP's answer."""
    return f"One more than {number_of(request)}. The answer is ({number_of(request)} + 1)."


def saying(text: Any = right, **act: Any) -> Behaviour:
    return lists_models(lambda request: Act(body=completion(request, text(request)), **act))


def svamp(release: Path, server: Server, *more: str) -> list[str]:
    data = ["--data=SVAMPDataModule", f"--data.data_dir={release}"]
    teacher = ["--teacher=OpenAITeacher", f"--teacher.base_url={server.url}", "--teacher.model=org/tiny"]
    return [*data, *teacher, "--concurrency=4", "--out=out", *more]


def rows_of(folder: str = "out") -> list[dict[str, Any]]:
    return read_lines(Path(folder) / "rationales.jsonl")


def numbered(folder: Path, rows: int, **more: Any) -> Path:
    """Rows of a user's own."""
    content = [{"id": f"r{i}", "input": f"what is {i}", "label": f"{i}"} | more for i in range(rows)]
    return write_lines(folder / "rows.jsonl", content)


def exit_code(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as ended:
        run("annotate", arguments)
    return ended.value.code


def own(data: Path, server: Server, *more: str) -> list[str]:
    teacher = ["--teacher=OpenAITeacher", f"--teacher.base_url={server.url}", "--teacher.model=tiny"]
    return ["--data=JSONLDataModule", f"--data.train={data}", *teacher, "--concurrency=4", "--out=out", *more]


def test_a_whole_split_is_asked_once_for_good(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(saying()) as server:
        run("annotate", svamp(release, server))
        assert len(server.requests) == 12
        shown = capsys.readouterr().out
        first = Path("out/rationales.jsonl").read_bytes()
        run("annotate", svamp(release, server))
        assert len(server.requests) == 12
    assert Path("out/rationales.jsonl").read_bytes() == first
    rows = rows_of()
    # the file whole, in its order, before val is taken off
    assert [row["id"] for row in rows] == [f"svamp-train-{i}" for i in range(12)]
    expected = {
        "split": "train", "sample": 0, "teacher": "tiny", "error": None, "parsed": True, "agrees": True,
        "contains_label": False,
        "votes": 1, "vote_share": 1.0, "in_majority": True, "finish": "stop", "cost": None, "structured": False,
        "rationale": "One more than 3.", "label": "(3 + 1)", "majority_label": "(3 + 1)", "length": 4, "logprob": None,
        "text": "One more than 3. The answer is (3 + 1).", "input_tokens": 4, "output_tokens": 10,
    }  # fmt: skip
    assert {key: rows[3][key] for key in expected} == expected
    assert len({row["key"] for row in rows}) == 12
    for text in ("rows answered", "100.0 %", "out/rationales.jsonl"):
        assert text in shown
    assert pq.read_table("out/rationales.parquet").to_pylist() == rows
    (job, again) = json.loads(Path("out/metadata.json").read_text())["jobs"]
    assert (job["dataset"], job["split"], job["teacher"], job["rows"]) == ("svamp", "train", "tiny", 12)
    assert (job["prompt"], job["settings"]) == (rows[0]["prompt"], rows[0]["settings"])
    assert job["sampling"] == {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 256, "seed": 0}
    assert (job["teacher_settings"]["model"], job["stopped"]) == ("org/tiny", None)
    assert again["settings"] == job["settings"]
    assert Path(f"out/prompts/{job['prompt']}.yaml").is_file()


def test_what_is_sent(release: Path) -> None:
    with serving(saying()) as server:
        run("annotate", svamp(release, server, "--limit=1", "--temperature=0.5", "--seed=7", "--max_new_tokens=99"))
        run("annotate", svamp(release, server, "--limit=1", "--teacher.layout=completion", "--num_demonstrations=1"))
    chat, text = server.requests
    assert [message["role"] for message in chat.body["messages"]] == ["system", *["user", "assistant"] * 10, "user"]
    assert chat.body["messages"][-1]["content"].endswith("0 + 1 ?")
    assert (chat.body["temperature"], chat.body["seed"], chat.body["max_tokens"]) == (0.5, 7, 99)
    assert text.path == "/v1/completions"
    assert text.prompt.count("A: ") == 1
    assert text.prompt.endswith("Q: 0 + 1 ?\nA:")
    assert text.body["stop"] == ["\nQ:"]


def test_the_prompt_that_is_kept_asks_the_same(release: Path) -> None:
    with serving(saying()) as server:
        run("annotate", svamp(release, server, "--limit=2"))
        (kept,) = Path("out/prompts").glob("*.yaml")
        run("annotate", svamp(release, server, "--limit=2", f"--prompt={kept}"))
        assert len(server.requests) == 2
        changed = kept.with_name("changed.yaml")
        changed.write_text(yaml.safe_dump(yaml.safe_load(kept.read_text()) | {"instruction": "Now. "}))
        run("annotate", svamp(release, server, "--limit=2", f"--prompt={changed}"))
    assert len(server.requests) == 4
    assert server.requests[-1].body["messages"][0]["content"] == "Now."
    assert len({row["prompt"] for row in rows_of()}) == 2


def test_many_samples_vote(here: Path) -> None:
    # of five samples two are right, one is wrong, one is right in other words, one says nothing
    texts = ["So the answer is {}.", "So the answer is {}.", "So the answer is cat.", "So the answer is {}", "no idea"]

    def answer(request: Request) -> str:
        text: str = texts[request.body["seed"] - 10]
        return f"It is. {text.format(number_of(request))}"

    data = numbered(here, 3)
    with serving(saying(answer)) as server:
        run("annotate", own(data, server, "--num_samples=5", "--seed=10"))
    rows = rows_of()
    assert [(row["id"], row["sample"]) for row in rows] == [(f"r{i}", s) for i in range(3) for s in range(5)]
    assert {request.body["temperature"] for request in server.requests} == {0.7}
    assert sorted({request.body["seed"] for request in server.requests}) == [10, 11, 12, 13, 14]
    assert [row["agrees"] for row in rows[:5]] == [True, True, False, True, False]
    assert {row["majority_label"] for row in rows[5:10]} == {"1"}
    assert {row["vote_share"] for row in rows} == {0.6}
    assert [row["in_majority"] for row in rows[:5]] == [True, True, False, True, None]
    assert [row["parsed"] for row in rows[:5]] == [True, True, True, True, False]


def test_more_samples_keep_those_that_are_there(here: Path) -> None:
    data = numbered(here, 4)
    with serving(saying(lambda request: "Well. So the answer is 1.")) as server:
        run("annotate", own(data, server, "--num_samples=2", "--temperature=0.7"))
        assert len(server.requests) == 8
        run("annotate", own(data, server, "--num_samples=3", "--temperature=0.7"))
    assert len(server.requests) == 12
    assert {row["votes"] for row in rows_of()} == {3}


def test_a_row_is_asked_until_its_label_agrees(here: Path) -> None:
    """Row r2 is right at once, r1 at its second sample, r0 never."""

    def answer(request: Request) -> str:
        good = request.body["seed"] + number_of(request) >= 2 and number_of(request)
        return f"Well. So the answer is {number_of(request) if good else 'cat'}."

    data = numbered(here, 3)
    with serving(saying(answer)) as server:
        run("annotate", own(data, server, "--until_agrees=4"))
        assert [(row["id"], row["sample"], row["agrees"]) for row in rows_of()] == [
            *[("r0", sample, False) for sample in range(4)],
            ("r1", 0, False),
            ("r1", 1, True),
            ("r2", 0, True),
        ]
        run("annotate", own(data, server, "--until_agrees=4"))
        assert len(server.requests) == 7
        run("annotate", own(data, server, "--until_agrees=5"))
    assert len(server.requests) == 8


def test_several_teachers_share_a_file(here: Path) -> None:
    data = numbered(here, 2)
    with serving(saying(lambda request: f"By {request.body['model']}. So the answer is 1.")) as server:
        run("annotate", own(data, server))
        run("annotate", own(data, server, "--teacher.model=other", "--teacher.name=second"))
    rows = rows_of()
    assert [(row["id"], row["teacher"]) for row in rows] == [
        ("r0", "tiny"), ("r0", "second"), ("r1", "tiny"), ("r1", "second"),
    ]  # fmt: skip
    assert rows[1]["rationale"] == "By other."


def test_kinds_of_answers_are_kept_apart(here: Path) -> None:
    data = numbered(here, 2)
    with serving(saying(lambda request: f"Well. So the answer is {number_of(request)}.")) as server:
        run("annotate", own(data, server))
        for _ in range(2):
            run("annotate", own(data, server, "--kind=program"))
    assert len(server.requests) == 4
    assert [(row["id"], row["kind"], row["votes"]) for row in rows_of()] == [
        ("r0", "rationale", 1), ("r0", "program", 1), ("r1", "rationale", 1), ("r1", "program", 1),
    ]  # fmt: skip


def test_answers_that_follow_a_schema(here: Path) -> None:
    def answer(request: Request) -> str:
        return json.dumps({"rationale": " It is so. ", "label": "no"}) if number_of(request) else "not JSON"

    data = numbered(here, 2, label="no", choices=["yes", "no"])
    with serving(saying(answer)) as server:
        run("annotate", own(data, server, "--structured"))
    schema = server.requests[0].body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["label"]["enum"] == ["yes", "no"]
    assert "JSON" in server.requests[0].body["messages"][0]["content"]
    bad, good = rows_of()
    assert (bad["parsed"], bad["agrees"], bad["text"]) == (False, False, "not JSON")
    assert (good["rationale"], good["label"], good["agrees"], good["contains_label"]) == (
        "It is so.",
        "no",
        True,
        False,
    )


def test_rows_without_labels_are_asked_too(here: Path) -> None:
    data = write_lines(here / "plain.jsonl", [{"id": f"r{i}", "input": f"what is {i}"} for i in range(3)])
    with serving(saying(lambda request: "Well. So the answer is 1.")) as server:
        run("annotate", own(data, server, "--num_samples=2", "--until_agrees=4"))
    rows = rows_of()
    assert len(rows) == 6
    assert {row["agrees"] for row in rows} == {None}
    assert {row["vote_share"] for row in rows} == {1.0}


def test_a_parser_that_is_mended_reads_the_texts_anew(here: Path) -> None:
    for name, mark in (("first", "ANSWER:"), ("second", "So the answer is")):
        (here / f"{name}_data.py").write_text(
            "from lit_distill.data import JSONLDataModule\n"
            "class OwnDataModule(JSONLDataModule):\n"
            "    def parse_teacher(self, text):\n"
            f"        rationale, mark, label = text.partition({mark!r})\n"
            "        return (rationale.strip(), label.strip(' .')) if mark else None\n"
        )
    data = numbered(here, 2)
    prompt = here / "bare.yaml"
    prompt.write_text('version: 1\nquestion: "{input}"\nanswer: "{rationale} ANSWER: So the answer is {label}"\n')
    with serving(saying(lambda request: f"Well. So the answer is {number_of(request)}.")) as server:
        arguments = own(data, server, f"--prompt={prompt}")[1:]
        run("annotate", "--data=first_data.OwnDataModule", arguments)
        assert {row["parsed"] for row in rows_of()} == {False}
        run("annotate", "--data=second_data.OwnDataModule", arguments)
        assert len(server.requests) == 2
    assert [(row["rationale"], row["label"], row["agrees"]) for row in rows_of()] == [
        ("Well.", "0", True), ("Well.", "1", True),
    ]  # fmt: skip


def columns(*names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in rows_of()]


def test_samples_of_an_earlier_input_are_neither_judged_nor_counted(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: Request) -> str:
        return f"Well. So the answer is {'yes' if 'old' in request.prompt else 'no'}."

    def rows(word: str, label: str) -> Path:
        return write_lines(
            here / "rows.jsonl", [{"id": f"r{i}", "input": f"{word} {i}", "label": label} for i in (0, 1)]
        )

    with serving(saying(answer)) as server:
        run("annotate", own(rows("old", "yes"), server))
        capsys.readouterr()
        run("annotate", own(rows("new", "no"), server))
        assert len(server.requests) == 4
    now = [("r0", "no", True, 1, "no", 1.0), ("r1", "no", True, 1, "no", 1.0)]
    before = [("r0", "yes", True, 1, "yes", 1.0), ("r1", "yes", True, 1, "yes", 1.0)]
    assert columns("id", "label", "agrees", "votes", "majority_label", "vote_share") == now + before
    shown = capsys.readouterr().out
    table = {
        name.strip(): value.strip() for _, name, value, _ in (line.split("│") for line in shown.splitlines()[2:-1])
    }
    assert (table["answers"], table["agree with gold"]) == ("2", "100.0 %")
    for word, label in (("old", "yes"), ("new", "no")):
        joined = JSONLDataModule(train=str(rows(word, label)), rationales="out").released("train")
        assert joined is not None
        assert [(row.teacher_label, row.columns and row.columns["votes"]) for row in joined] == [(label, 1)] * 2
        assert {len(row.outputs) for row in joined} == {1}


@pytest.mark.parametrize("shown", [True, False])
def test_a_row_with_other_choices_is_another_row(shown: bool, here: Path) -> None:
    (here / "bare.yaml").write_text('version: 1\nquestion: "{input}"\nanswer: "{rationale} So the answer is {label}"\n')
    more = [] if shown else ["--prompt=bare.yaml"]
    with serving(saying(lambda request: "Well. So the answer is yes.")) as server:
        for choices in (["yes", "no"], ["yes", "no", "perhaps"]):
            run("annotate", own(numbered(here, 1, label="yes", choices=choices), server, *more))
        assert len(server.requests) == 2
    assert columns("votes", "vote_share") == [(1, 1.0), (1, 1.0)]
    joined = JSONLDataModule(train="rows.jsonl", rationales="out").released("train")
    assert joined is not None
    assert [len(row.outputs) for row in joined] == [1]


def test_a_gold_label_that_is_mended_ends_the_asking(here: Path) -> None:
    with serving(
        saying(lambda request: f"Well. So the answer is {'yes' if request.body['seed'] else 'no'}.")
    ) as server:
        run("annotate", own(numbered(here, 1, label="no"), server, "--until_agrees=4"))
        assert columns("label", "agrees") == [("no", True)]
        run("annotate", own(numbered(here, 1, label="yes"), server, "--until_agrees=4"))
        assert columns("label", "agrees") == [("no", False), ("yes", True)]


@pytest.mark.parametrize("part", ["parse_teacher", "teacher_agrees"])
def test_a_fault_in_a_user_s_own_reading_loses_no_answer(
    part: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / f"faulty_{part}.py").write_text(
        "from lit_distill.data import JSONLDataModule\n"
        "class OwnDataModule(JSONLDataModule):\n"
        f"    def {part}(self, *texts):\n"
        "        if any('weird' in text for text in texts):\n"
        "            raise LookupError('no\\nsuch text')\n"
        f"        return super().{part}(*texts)\n"
    )

    def answer(request: Request) -> str:
        return f"Well. So the answer is {'weird' if number_of(request) == 1 else number_of(request)}."

    with serving(saying(answer)) as server:
        arguments = [f"--data=faulty_{part}.OwnDataModule", *own(numbered(here, 4), server)[1:]]
        for _ in range(2):
            run("annotate", arguments)
            assert "1 x LookupError: no such text" in capsys.readouterr().out
            assert columns("text", "parsed", "label")[1] == ("Well. So the answer is weird.", None, None)
            assert [error for (error,) in columns("error")] == [None, "LookupError: no such text", None, None]
        assert len(server.requests) == 4
        run("annotate", own(numbered(here, 4), server))
        assert len(server.requests) == 4
    assert columns("id", "parsed", "label", "error")[1] == ("r1", True, "weird", None)


def test_a_fault_in_a_user_s_own_comparison_of_two_answers_loses_none(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "faulty_votes.py").write_text(
        "from lit_distill.data import JSONLDataModule\n"
        "class OwnDataModule(JSONLDataModule):\n"
        "    def teacher_agrees(self, label, gold):\n"
        "        return {'gold': False}[gold]\n"
    )

    def answer(request: Request) -> str:
        return f"Well. So the answer is {request.body['seed'] % 2}."

    with serving(saying(answer)) as server:
        arguments = own(numbered(here, 1, label="gold"), server, "--num_samples=3")[1:]
        run("annotate", ["--data=faulty_votes.OwnDataModule", *arguments])
    assert "x KeyError: '0'" in capsys.readouterr().out
    assert columns("label", "majority_label", "votes") == [("0", "0", 3), ("1", "0", 3), ("0", "0", 3)]


def test_what_refuses_all_is_asked_again_once_it_is_mended(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def behave(request: Request) -> Act:
        if broken:
            return fail(400, "wrong settings")
        return Act(body=completion(request, f"Well. So the answer is {number_of(request)}."))

    data, broken = numbered(here, 60), True
    with serving(lists_models(behave)) as server:
        line = refusal(capsys, "annotate", own(data, server))
        assert line.startswith("teacher: the first 20 questions were all refused (400: wrong settings)")
        assert rows_of() == []
        broken = False
        run("annotate", own(data, server))
    assert len(rows_of()) == 60


def test_a_job_with_answers_goes_on_whatever_is_refused(here: Path) -> None:
    def behave(request: Request) -> Act:
        if number_of(request) >= 5:
            return fail(403, "flagged") if number_of(request) % 2 else fail(404, "model not found here")
        return Act(body=completion(request, f"Well. So the answer is {number_of(request)}."))

    with serving(lists_models(behave)) as server:
        run("annotate", own(numbered(here, 60), server, "--concurrency=1"))
        run("annotate", own(numbered(here, 60), server, "--retry_errors"))
    assert [row["error"] is None for row in rows_of()] == [True] * 5 + [False] * 55


@pytest.mark.parametrize("status", [400, 503])
def test_a_job_without_any_answer_is_no_success(status: int, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lists_models(lambda request: fail(status))) as server:
        assert exit_code(own(numbered(here, 5), server, "--teacher.max_retries=0")) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == f"lit_distill: no answer at all: 5 x {status}: no"
    assert f"5 x {status}: no" in shown.out


def test_a_budget_counts_an_estimate_where_a_server_counts_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(request: Request) -> Act:
        return Act(body=completion(request, "Well. So the answer is 1.") | {"usage": None})

    prices = ["--teacher.input_price=1000", "--teacher.output_price=1000", "--max_cost=0.5", "--concurrency=1"]
    with serving(lists_models(behave)) as server:
        run("annotate", own(numbered(here, 200), server, *prices))
        asked = len(server.requests)
        assert 0 < asked < 20
        told = capsys.readouterr()
        # what nobody counted is absent from the summary, and no 0
        assert "prompt tokens" not in told.out
        assert re.search(rf"answers without their tokens +│ +{asked} ", told.out)
        # what an earlier start used is estimated again
        run("annotate", own(numbered(here, 200), server, *prices))
    assert len(server.requests) == asked
    assert columns("input_tokens", "cost")[0] == (None, None)


@pytest.mark.parametrize("name", ["a[/b]", "a[bold]b"])
def test_names_are_no_markup(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(saying(lambda request: "Well. So the answer is 1.")) as server:
        run("annotate", own(numbered(here, 1), server, f"--teacher.name={name}", f"--out={name}"))
    shown = capsys.readouterr().out
    assert f"asked of {name}" in shown
    assert f"{name}/rationales.jsonl" in shown


@pytest.mark.parametrize("taken", ["prompts", "rationales.parquet/full", "metadata.json"])
def test_what_is_in_the_way_is_one_line(taken: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("out") / taken
    path.parent.mkdir(parents=True)
    path.write_text('{"jobs": 5}')
    with serving(saying(lambda request: "Well. So the answer is 1.")) as server:
        line = refusal(capsys, "annotate", own(numbered(here, 1), server))
    assert f"out/{taken.partition('/')[0]}" in line


def test_answers_that_follow_a_schema_need_a_chat(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        for more in ([], ["--dry_run"]):
            arguments = own(numbered(here, 1), server, "--structured", "--teacher.layout=completion", *more)
            assert refusal(capsys, "annotate", arguments).startswith(
                "layout must be chat where answers follow a schema"
            )
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"out": ""},
        {"split": "dev"},
        {"kind": ""},
        {"split": None},
    ],
)
def test_arguments_of_a_wrong_type_are_named(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(UserError, match=rf"^{name} must be "):
        command.annotate(ToyDataModule(train_size=2), OpenAITeacher("tiny"), **{"out": "out", **arguments})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--teacher.api_key=sk-SECRET"], "teacher.api_key"),
        (["--teacher.api_key", "sk-SECRET"], "teacher.api_key"),
        (["--teacher.init_args.api_key=sk-SECRET", "--print_config"], "teacher.init_args.api_key"),
        (
            ["--teacher.extra_body={headers: {Authorization: Bearer SECRET}}"],
            "teacher.extra_body.headers.Authorization",
        ),
        (["--teacher.extra_body={x-api-key: SECRET"], "teacher.extra_body.x-api-key"),
        (["--teacher.extra_body.access_token=SECRET"], "teacher.extra_body.access_token"),
        (["--teacher.engine.hf_token", "SECRET"], "teacher.engine.hf_token"),
        (["--teacher.extra_body=apiKey=SECRET"], "teacher.extra_body.apiKey"),
        (["OPENAI_API_KEY=SECRET"], "OPENAI_API_KEY"),
        ([{"teacher": {"api_key": "SECRET", "model": 5}}], "teacher.api_key (in own.yaml)"),
        ([{"teacher": {"init_args": {"api_key": 998877}}}], "teacher.init_args.api_key (in own.yaml)"),
        ([{"teacher": {"init_arg": {"api_key": ["SECRET"]}}}], "teacher.init_arg.api_key (in own.yaml)"),
        ([{"teacher": "nested.yaml"}], "teacher.init_args.api_key (in own.yaml) (in nested.yaml)"),
    ],
)
def test_a_key_on_the_command_line_or_in_a_config_is_refused_unseen(
    given: list[Any], named: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "nested.yaml").write_text("class_path: OpenAITeacher\ninit_args: {api_key: SECRET}\n")
    if isinstance(given[0], dict):
        (here / "own.yaml").write_text(yaml.safe_dump({"max_new_tokens": 7, **given[0]}))
        given = ["--config=own.yaml"]
    teacher = [] if given[0] == "--config=own.yaml" else ["--teacher=OpenAITeacher", "--teacher.model=tiny"]
    line = refusal(capsys, "annotate", "--data=JSONLDataModule", f"--data.train={numbered(here, 1)}", *teacher, *given)
    assert line.startswith(f"{named}: a key must not stand on the command line or in a config, which logs keep: set it")
    assert "SECRET" not in line
    assert "998877" not in line
    assert not Path("out").exists()


def test_what_only_looks_like_a_key_is_taken(here: Path) -> None:
    data = write_lines(here / "rows.jsonl", [{"id": "a", "input": "password: open", "label": "0", "token": "t"}])
    more = ["--teacher.token_limit=max_completion_tokens", "--max_tokens=1000", "--teacher.extra_body={pad_token: x}"]
    with serving(saying(lambda request: "Well. So the answer is 0.")) as server:
        run("annotate", own(data, server, *more))
    assert server.requests[0].body["pad_token"] == "x"  # noqa: S105 - none


def test_an_example_that_fails_for_good_is_kept_with_its_error(here: Path) -> None:
    def behave(request: Request) -> Act:
        if number_of(request) == 1 and refuses:
            return fail(400, "too\nlong")
        return Act(body=completion(request, f"Well. So the answer is {number_of(request)}."))

    data, refuses = numbered(here, 3), True
    with serving(lists_models(behave)) as server:
        run("annotate", own(data, server))
        assert [(row["id"], row["error"], row["parsed"]) for row in rows_of()] == [
            ("r0", None, True), ("r1", "400: too long", None), ("r2", None, True),
        ]  # fmt: skip
        assert len(server.requests) == 3
        run("annotate", own(data, server))
        assert len(server.requests) == 3
        refuses = False
        run("annotate", own(data, server, "--retry_errors"))
    assert len(server.requests) == 4
    assert [(row["id"], row["error"], row["label"]) for row in rows_of()] == [
        ("r0", None, "0"), ("r1", None, "1"), ("r2", None, "2"),
    ]  # fmt: skip


def test_what_passes_is_tried_again(here: Path) -> None:
    troubles = [
        fail(429, headers={"retry-after-ms": "10"}), fail(500, headers={"retry-after-ms": "10"}), Act(cut=True),
        Act(body=b"{"), fail(503, headers={"retry-after": "0"}),
    ]  # fmt: skip

    def behave(request: Request) -> Act:
        if request.number % 2 and troubles:
            return troubles.pop()
        return Act(body=completion(request, f"Well. So the answer is {number_of(request)}."))

    with serving(lists_models(behave)) as server:
        run("annotate", own(numbered(here, 12), server))
    assert [row["label"] for row in rows_of()] == [str(i) for i in range(12)]
    assert (troubles, len(server.requests)) == ([], 17)


def test_what_is_too_busy_is_left_for_the_next_start(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def behave(request: Request) -> Act:
        if busy and number_of(request) == 1:
            return fail(429, headers={"retry-after-ms": "1"})
        return Act(body=completion(request, f"Well. So the answer is {number_of(request)}."))

    data, busy = numbered(here, 3), True
    with serving(lists_models(behave)) as server:
        assert exit_code(own(data, server, "--teacher.max_retries=1")) == 1
        assert [row["id"] for row in rows_of()] == ["r0", "r2"]
        assert "not answered now" in capsys.readouterr().out
        busy = False
        run("annotate", own(data, server))
    assert [row["id"] for row in rows_of()] == ["r0", "r1", "r2"]


def test_a_refused_key_stops_at_once_and_is_never_shown(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sk-very-secret-0123456789"  # noqa: S105 - of nobody's
    monkeypatch.setenv("OPENAI_API_KEY", secret)

    def behave(request: Request) -> Act:
        if request.number >= 5:
            return fail(401, f"Incorrect API key provided: {request.headers['authorization']}")
        return Act(body=completion(request, f"Well. So the answer is {number_of(request)}."))

    with serving(lists_models(behave)) as server:
        line = refusal(capsys, "annotate", own(numbered(here, 200), server))
    assert line.startswith("api_key: the server refuses it (401: ")
    assert len(server.requests) < 30
    assert server.requests[0].headers["authorization"] == f"Bearer {secret}"
    # what was answered before is there, and in order
    assert len(rows_of()) == 5
    assert rows_of()[0]["vote_share"] == 1.0
    written = [path.read_bytes() for path in Path("out").rglob("*") if path.is_file()]
    assert len(written) >= 4
    assert not any(secret.encode() in content for content in [*written, line.encode()])


def test_a_budget_of_tokens_ends_the_job_and_a_larger_one_goes_on(here: Path) -> None:
    # four tokens of the prompt's last turn (the server counts no other) and six of the answer
    data = numbered(here, 40)
    with serving(saying(lambda request: f"Well. So the answer is {number_of(request)}.")) as server:
        run("annotate", own(data, server, "--max_tokens=180", "--max_new_tokens=10", "--concurrency=40"))
        used = sum(row["input_tokens"] + row["output_tokens"] for row in rows_of())
        # a further question may have gone beyond it
        assert 90 < used <= 180
        stopped = json.loads(Path("out/metadata.json").read_text())["jobs"][0]["stopped"]
        assert stopped.startswith(f"max_tokens 180 reached: {used} used, the next may take ")
        asked = len(server.requests)
        run("annotate", own(data, server, "--max_tokens=180", "--max_new_tokens=10"))
        assert len(server.requests) == asked
        run("annotate", own(data, server, "--max_tokens=100000", "--max_new_tokens=10"))
    assert len(rows_of()) == len(server.requests) == 40


def test_a_budget_of_dollars(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prices = ["--teacher.input_price=1000000", "--teacher.output_price=2000000"]
    with serving(saying(lambda request: "Well. So the answer is 1.")) as server:
        run("annotate", own(numbered(here, 40), server, "--max_cost=160", "--max_new_tokens=10", *prices))
        line = refusal(capsys, "annotate", own(numbered(here, 40), server, "--max_cost=100", *prices))
    rows = rows_of()
    # 3 tokens at a dollar, 6 at two; a question may use 62 and 10
    assert {row["cost"] for row in rows} == {15.0}
    assert len(rows) == 6
    assert line == "max_cost 100 reached: 0 used, the next may take 574"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--num_samples=0"], "num_samples must be an integer in [1, 10000], got 0"),
        (["--num_samples=2", "--temperature=0"], "temperature must be above 0 for several samples"),
        (["--until_agrees=1"], "until_agrees must be an integer in [2, 10000], got 1"),
        (["--temperature=-1"], "temperature must be at least 0, got -1.0"),
        (["--top_p=0"], "top_p must be in (0, 1], got 0.0"),
        (["--concurrency=0"], "concurrency must be an integer >= 1, got 0"),
        (["--limit=0"], "limit must be an integer >= 1, got 0"),
        (["--max_cost=3"], "max_cost needs teacher.input_price and teacher.output_price"),
        (["--max_tokens=0"], "max_tokens must be an integer >= 1, got 0"),
        (["--split=val"], "split: data_dir: svamp has no val split (none is released)"),
        (["--split=predict"], "split: data_dir: svamp has no predict split"),
        (["--split=dev"], "split: got dev; allowed is one of 'train', 'val', 'test', 'predict'"),
        (["--prompt=none.yaml"], "none.yaml: cannot be read or written: No such file or directory"),
        (["--demonstrations=none.jsonl"], "none.jsonl: cannot be read or written: No such file or directory"),
        (["--num_demonstrations=11"], "num_demonstrations must be at most 10, got 11"),
        (["--num_demonstratoins=1"], "num_demonstratoins: no such argument (did you mean num_demonstrations?)"),
        (["--teacher.layout=tape"], "teacher"),
        (["--teacher.modle=a"], "teacher.modle: no such argument (did you mean "),
        (["--teacher=NoTeacher"], "teacher: unknown class 'NoTeacher'"),
        (["--data.rationales=none"], "rationales: no file or folder 'none'"),
        (["--teacher.base_url=http://127.0.0.1:9/v1"], "base_url: no server answers at http://127.0.0.1:9/v1"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_asked(
    arguments: list[str], line: str, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(saying()) as server:
        said = refusal(capsys, "annotate", svamp(release, server), arguments)
    assert said.startswith(line)
    assert server.requests == []


@pytest.mark.parametrize("missing", ["data", "teacher", "out"])
def test_what_must_be_given(missing: str, release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(saying()) as server:
        given = [argument for argument in svamp(release, server) if not argument.startswith(f"--{missing}")]
        line = refusal(capsys, "annotate", given)
    assert line.startswith(f"{missing}")
    assert "must be given" in line


def test_a_file_in_the_folder_s_place(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").write_text("")
    with serving(saying()) as server:
        assert refusal(capsys, "annotate", svamp(release, server)).startswith("out: cannot be read or written: ")
    assert server.requests == []


def test_a_dry_run_shows_the_prompts_and_asks_nothing(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(saying()) as server:
        prices = ["--teacher.input_price=2", "--teacher.output_price=4"]
        run("annotate", svamp(release, server, "--dry_run", "--num_samples=3", *prices))
        assert (server.requests, server.others) == ([], [])
    shown = capsys.readouterr().out
    assert shown.count("[system]") == 2
    assert "0 + 1 ?" in shown
    assert "1 + 1 ?" in shown
    lines = [line.split("│") for line in shown.splitlines() if line.count("│") == 3]
    table = {name.strip(): value.strip() for _, name, value, _ in lines}
    assert (table["rows"], table["questions at most"]) == ("12", "36")
    read, written = (int(table[f"{name} tokens at most"].replace(",", "")) for name in ("prompt", "answer"))
    assert written == 36 * 256
    assert float(table["cost at most"].strip("$")) == pytest.approx((2 * read + 4 * written) / 1e6, abs=1e-4)
    assert not Path("out").exists()


def test_the_same_keys_in_yaml(release: Path) -> None:
    with serving(saying()) as server:
        Path("own.yaml").write_text(
            "data:\n  class_path: SVAMPDataModule\n  init_args:\n"
            f"    data_dir: {release}\n"
            "teacher:\n  class_path: OpenAITeacher\n  init_args:\n"
            f"    base_url: {server.url}\n    model: tiny\n"
            "out: out\nlimit: 3\ndry_run: false\n"
        )
        run("annotate", "--config=own.yaml")
        assert len(server.requests) == 3
        run("annotate", "--config=own.yaml", "--limit=5")
    assert len(rows_of()) == len(server.requests) == 5


def test_the_folder_is_a_dataset_with_a_card(here: Path) -> None:
    def behave(request: Request) -> Act:
        if number_of(request) == 2:
            return fail(400, "too long")
        return Act(body=completion(request, f"Well {number_of(request)}. So the answer is {number_of(request)}."))

    with serving(lists_models(behave)) as server:
        run("annotate", own(numbered(here, 4), server, "--num_samples=2"))
        card = ModelCard.load("out/README.md", ignore_metadata_errors=True)
        rows = datasets.load_dataset("out", split="train", cache_dir=str(here / "cache")).to_list()
        assert rows == rows_of()
        assert card.data.to_dict()["license"] == "other"
        assert f"| jsonl | train | 4 | tiny | rationale | 2 |  | {rows[0]['prompt']} |" in card.text
        # samples, errors, parsed, agreeing, with the label in the rationale, distinct
        assert "| train | tiny | rationale | 8 | 2 | 6 | 6 | 6 | 3 |" in card.text
        assert [line.split("`")[1] for line in card.text.splitlines() if line.startswith("| `")] == list(rows[0])
        assert "| `vote_share` | float | Fraction of them with that label. |" in card.text
        assert "The licence of the source data and the terms of the teacher" in card.text
        # a user's own words stay, those of an earlier start do not
        run("annotate", own(numbered(here, 5), server, "--num_samples=2"))
        assert "| train | tiny | rationale | 10 | 2 | 8 | 8 | 8 | 4 |" in Path("out/README.md").read_text()
        Path("out/README.md").write_text("my own")
        run("annotate", own(numbered(here, 5), server, "--num_samples=2"))
    assert Path("out/README.md").read_text() == "my own"


def test_the_folder_is_pushed_to_the_hub(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []
    data = numbered(here, 2)

    def create(hub: HfApi, repository: str, **arguments: Any) -> None:
        assert not Path("out").exists(), "asked for once all is answered"
        asked.append({"repository": repository, **arguments})

    def upload(hub: HfApi, **arguments: Any) -> None:
        asked.append(arguments | {"names": {path.name for path in Path(arguments["folder_path"]).iterdir()}})

    # the tests are offline
    with serving(saying(lambda request: "Well. So the answer is 1.")) as server:
        line = refusal(capsys, "annotate", own(data, server, "--push_to_hub=me/said"))
        assert line.startswith("push_to_hub: cannot write to 'me/said' on the Hugging Face hub (")
        assert (server.requests, Path("out").exists()) == ([], False)
        monkeypatch.setattr(HfApi, "create_repo", create)
        monkeypatch.setattr(HfApi, "upload_folder", upload)
        run("annotate", own(data, server, "--push_to_hub=me/said"))
    made, uploaded = asked
    assert made == {"repository": "me/said", "repo_type": "dataset", "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["repo_type"], uploaded["ignore_patterns"]) == ("me/said", "dataset", [".*"])
    assert {"README.md", "rationales.jsonl", "rationales.parquet", "metadata.json", "prompts"} <= uploaded["names"]


def test_an_unknown_teacher_s_own_fault_keeps_its_traceback() -> None:
    class Broken(OpenAITeacher):
        async def open(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command.annotate(ToyDataModule(train_size=2), Broken("tiny", "http://127.0.0.1:9/v1"), out="out")


def test_all_teachers_are_known_by_their_bare_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("annotate", "--help")
    shown = "".join(capsys.readouterr().out.split())
    known = [klass.__name__ for klass in Teacher.__subclasses__() if klass.__module__.startswith("lit_distill.")]
    assert "OpenAITeacher" in known
    for name in [*known, "TransformersTeacher", "VLLMTeacher", "RayTeacher"]:
        if not name.startswith("Batch"):
            assert name in shown


def test_from_a_toy_without_teacher_to_a_trained_student(
    here: Path, student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked of a model in this process, looked at, trained on."""
    talker = make_talker(here / "talker", "bird : owl . fish : carp . So the answer is owl .")
    data = ["--data=ToyDataModule", "--data.train_size=12", "--data.val_size=4", "--data.test_size=5"]
    teacher = ["--teacher=TransformersTeacher", f"--teacher.model={talker}", "--teacher.layout=completion"]
    run("annotate", data, teacher, "--num_demonstrations=2", "--max_new_tokens=24", "--out=out")
    rows = rows_of()
    assert len(rows) == 12
    assert {(row["rationale"], row["label"]) for row in rows} == {("bird : owl . fish : carp .", "owl")}
    annotated = [*data, "--data.rationales=out"]
    capsys.readouterr()
    run("inspect", annotated, f"--data.tokenizer={student_folder}")
    shown = " ".join(capsys.readouterr().out.split())
    assert "parsed │ 12 │" in shown
    assert f"teacher label accuracy │ {round(sum(row['agrees'] for row in rows) / 12, 3)} │" in shown
    # val and test were not asked about, which need no rationales
    run("fit", small_model(student_folder), annotated, "--data.batch_size=4", small_trainer(steps=1))
    assert list(Path("runs").rglob("student/model.safetensors"))
