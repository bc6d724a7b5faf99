import csv
import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_distill.cli import main
from lit_distill.commands.experiment import experiment
from lit_distill.commands.parser import Parser
from lit_distill.data import JSONLDataModule
from lit_distill.students import load_tokenizer
from tests.runs import QUIET, at_work_in
from tests.students import add_weights, make_student_folder

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    path: path.read_text()
    for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    if DOCS / "evidence" not in path.parents
}
README = PAGES[ROOT / "README.md"]
BLOCKS = [
    found
    for text in PAGES.values()
    for found in re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
]
LAUNCH = re.compile(r"^(?:python|torchrun .*|srun .*) -m lit_distill |^lit-distill |&& python -m lit_distill ")
COMMANDS = list(
    dict.fromkeys(
        line[found.end() :]
        for language, block in BLOCKS
        if language == "bash"
        for line in block.splitlines()
        if (found := LAUNCH.search(line))
    )
)


class Parsed(Exception):
    pass


def python_block(name: str) -> str:
    (code,) = [block for language, block in BLOCKS if language == "python" and f"class {name}(" in block]
    return code  # type: ignore[no-any-return]


def commands_of(text: str) -> list[str]:
    """The lines of its first block of commands."""
    (block,) = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[:1]
    return block.strip().splitlines()  # type: ignore[no-any-return]


def section(title: str) -> list[str]:
    return commands_of(README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0])


def test_the_two_lines() -> None:
    assert section("Quickstart") == [
        "pip install -c constraints.txt -e . && python -m lit_distill fit --config configs/quickstart.yaml"
    ]
    assert section("Tests") == ['pip install -c constraints.txt -e ".[test]" && pytest']


def test_readme_is_short_and_names_every_page() -> None:
    assert len(README.splitlines()) < 200
    links = set(re.findall(r"\]\(([^)#]+)\)", README))
    notebooks = [path.relative_to(ROOT).as_posix() for path in (ROOT / "notebooks").rglob("*.ipynb")]
    assert {path.relative_to(ROOT).as_posix() for path in PAGES if path.name != "README.md"} <= links
    assert set(notebooks) <= links


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_link_leads_somewhere(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", PAGES[page]):
        assert link.startswith("https://") or (page.parent / link).exists(), link
        if anchor and not link.startswith("https://"):
            titles = re.findall(r"^#+ (.+)$", (page.parent / link if link else page).read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], anchor


def yaml_block(word: str) -> str:
    found: list[str] = [block for language, block in BLOCKS if language == "yaml" and word in block]
    assert len(found) == 1
    return found[0]


def test_the_grid_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "grid.yaml").write_text(yaml_block("grid:"))
    monkeypatch.chdir(tmp_path)
    summary = experiment("grid.yaml", dry_run=True)
    assert len(summary["cells"]) == 3 * 3 * 4


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 50
    assert sum(command.startswith("annotate ") for command in COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise Parsed

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my_losses.py").write_text(python_block("SmoothedModule"))
    (tmp_path / "my_teachers.py").write_text(python_block("ProgramTeacher"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("lit_distill.commands.train.check_checkpoint", lambda path: None)
    monkeypatch.setattr("lit_distill.commands.train.read_progress", lambda path: {})
    monkeypatch.setattr("lit_distill.commands.inspect.inspect_data", stop)
    monkeypatch.setattr("lit_distill.commands.capture.build_data", stop)
    monkeypatch.setattr("lit_distill.commands.export.StudentFiles", stop)
    monkeypatch.setattr("lit_distill.commands.tradeoff.load", stop)
    monkeypatch.setattr("lit_distill.commands.serve.StudentFiles", stop)
    monkeypatch.setattr("lit_distill.commands.train.load_engine", stop)
    monkeypatch.setattr("lit_distill.commands.rounds.build_data", stop)
    monkeypatch.setattr("lit_distill.commands.shrink.StudentFiles", stop)
    monkeypatch.setattr("lit_distill.commands.search.check_teachers", stop)
    # the grid is checked, nothing is run
    monkeypatch.setattr("lit_distill.commands.experiment._state", stop)
    monkeypatch.setattr("lit_distill.comparison.runs.find_runs", stop)
    # all others parse, and build
    monkeypatch.setattr(Parser, "instantiate_classes", stop)
    arguments = shlex.split(command, comments=True)
    if arguments[0] == "configs":
        main(arguments)
        return
    if ".help" in command:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code in (0, None)
        return
    with pytest.raises(Parsed):
        main(arguments)


def test_own_loss_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "readme_losses.py").write_text(python_block("SmoothedModule"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    student = make_student_folder(tmp_path / "student")
    monkeypatch.setenv("LIT_DISTILL_CACHE", str(tmp_path / "cache"))
    data = "--data ToyDataModule --data.train_size 8 --data.batch_size 4"
    main(
        [
            *shlex.split(f"fit --model readme_losses.SmoothedModule --model.bonus 0.2 --model.student {student}"),
            *shlex.split(f"--model.from_scratch true {data} --trainer.fast_dev_run 1 --trainer.accelerator cpu"),
        ]
    )


def test_own_objective_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # modules are imported once: no other test has one of this name
    (tmp_path / "readme_objectives.py").write_text(python_block("Jeffreys"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    student = add_weights(make_student_folder(tmp_path / "student"))
    method = yaml_block("teachers:").replace("google/t5-v1_1-large", str(student))
    (tmp_path / "method.yaml").write_text(method.replace("my_losses", "readme_objectives"))
    monkeypatch.setenv("LIT_DISTILL_CACHE", str(tmp_path / "cache"))
    data = "--data ToyDataModule --data.train_size 8 --data.batch_size 4"
    main(
        [
            *shlex.split(f"fit --model StepByStepModule --config method.yaml --model.student {student} {data}"),
            *shlex.split("--trainer.fast_dev_run 1 --trainer.accelerator cpu"),
        ]
    )


def test_own_teacher_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "readme_teachers.py").write_text(python_block("ProgramTeacher"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    program = tmp_path / "ask.sh"
    program.write_text('#!/bin/sh\nwords=$(wc -w)\necho "There are $words words. So the answer is $words ."\n')
    program.chmod(0o755)
    refusing = tmp_path / "refuse.sh"
    refusing.write_text("#!/bin/sh\ncat > prompt.txt\nexit 3\n")
    refusing.chmod(0o755)
    toy = "annotate --data ToyDataModule --data.train_size 2 --out said --concurrency 1"
    toy += " --teacher readme_teachers.ProgramTeacher"
    asked = "--teacher.layout completion"
    main([*shlex.split(toy), "--teacher.model", str(program), *shlex.split(asked)])
    # nothing was answered
    with pytest.raises(SystemExit):
        main([*shlex.split(toy), "--teacher.model", str(refusing), *shlex.split(asked)])
    rows = [json.loads(line) for line in (tmp_path / "said" / "rationales.jsonl").read_text().splitlines()]
    words = len((tmp_path / "prompt.txt").read_text().split())
    said = {(row["id"], row["teacher"]): (row["label"], row["error"]) for row in rows}
    # both prompts have as many words
    assert said == {
        ("toy-train-0", "ask.sh"): (str(words), None),
        ("toy-train-1", "ask.sh"): (str(words), None),
        ("toy-train-0", "refuse.sh"): (None, f"{refusing} ended with code 3"),
        ("toy-train-1", "refuse.sh"): (None, f"{refusing} ended with code 3"),
    }


def test_own_data_block_is_that_of_its_config() -> None:
    config = yaml.safe_load((ROOT / "configs" / "tickets" / "step_by_step.yaml").read_text())
    assert yaml.safe_load(yaml_block("label_set")) == {"data": config["data"]}


def test_own_data_commands_run_and_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [
        shlex.split(line.partition("-m lit_distill ")[2])
        for line in commands_of(PAGES[DOCS / "data.md"])
        if line[0] != "#"
    ]
    assert [command[0] for command in commands] == ["inspect", "annotate", "fit", "fit", "compare"]
    with at_work_in(tmp_path, monkeypatch):
        (tmp_path / "configs").symlink_to(ROOT / "configs")
        for command in commands:
            short = ["--trainer.max_steps=40", "--validation.every_n_steps=20", *QUIET] if command[0] == "fit" else []
            main([*command, *short])
        shown = capsys.readouterr().out
        records = [json.loads(path.read_text()) for path in sorted(Path("runs").rglob("run.json"))]
        report = Path("report", "report.md").read_text()
    assert re.search(r"│ rows +│ +220 │ +22 │ +80 │", shown)
    assert re.search(r"questions at most +│ +220 │", shown)
    assert not (tmp_path / "annotations").exists()
    assert {record["method"] for record in records} == {"Standard", "StepByStep"}
    # by guessing it were 0.25
    assert min(record["metrics"]["test/accuracy"] for record in records) > 0.4
    assert "step-by-step" in report


def test_the_tickets_are_what_their_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "configs" / "tickets"
    script = runpy.run_path(str(folder / "make_tickets.py"))
    monkeypatch.setitem(script["main"].__globals__, "FOLDER", tmp_path)
    script["main"]()
    for name in ("train.csv", "test.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    module = JSONLDataModule(
        train=tmp_path / "train.csv", test=tmp_path / "test.csv", input_column="message", label_column="team"
    )
    assert module.repeated_rows("test") == 0
    # in a folder without configs it is the shipped file that its config names
    monkeypatch.chdir(tmp_path)
    named = JSONLDataModule(train="configs/tickets/train.csv", input_column="message", label_column="team")
    assert len(named.used_rows("train").rows) == 198
    tokenizer = load_tokenizer(ROOT / "configs" / "students" / "tickets-t5")
    with (tmp_path / "train.csv").open(newline="") as file:
        cells = [cell for row in list(csv.reader(file))[1:] for cell in row[1:]]
    assert tokenizer.unk_token_id not in {token for ids in tokenizer(cells)["input_ids"] for token in ids}
