import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lit_distill.cli import main
from lit_distill.commands.experiment import experiment
from lit_distill.commands.parser import Parser
from lit_distill.commands.train import DistillCLI
from tests.students import make_student_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.partition("-m lit_distill ")[2]
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if "-m lit_distill " in line
]


class Parsed(Exception):
    pass


def python_block(name: str) -> str:
    (code,) = [block for language, block in BLOCKS if language == "python" and f"class {name}(" in block]
    return code  # type: ignore[no-any-return]


def section(title: str) -> list[str]:
    body = README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    (block,) = re.findall(r"^```bash\n(.*?)^```", body, flags=re.MULTILINE | re.DOTALL)[:1]
    return block.strip().splitlines()  # type: ignore[no-any-return]


def test_the_two_lines() -> None:
    assert section("Quickstart") == [
        "pip install -c constraints.txt -e . && python -m lit_distill fit --config configs/quickstart.yaml"
    ]
    assert section("Tests") == ['pip install -c constraints.txt -e ".[test]" && pytest']


def test_the_contents_name_every_section_and_each_link_leads_somewhere() -> None:
    titles = re.findall(r"^## (.+)$", README, flags=re.MULTILINE)
    contents = README.split("**Contents:**", 1)[1].split("\n\n", 1)[0]
    named = re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", contents)
    assert named == [(title, re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")) for title in titles]
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} <= {Path(link).name for link in links}
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


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
    assert len(COMMANDS) >= 18
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
    monkeypatch.setattr(DistillCLI, "_parse_ckpt_path", lambda self: None)
    monkeypatch.setattr(DistillCLI, "instantiate_classes", stop)
    monkeypatch.setattr("lit_distill.commands.inspect_cli.InspectCLI.instantiate_classes", stop)
    # the grid is checked, nothing is run
    monkeypatch.setattr("lit_distill.commands.experiment.look", stop)
    monkeypatch.setattr("lit_distill.commands.compare.find_runs", stop)
    # `annotate` parses, builds and asks
    monkeypatch.setattr(Parser, "instantiate_classes", stop)
    arguments = shlex.split(command)
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
    data = f"--data ToyDataModule --data.train_size 8 --data.batch_size 4 --data.cache_dir {tmp_path / 'cache'}"
    main(
        [
            *shlex.split(f"fit --model readme_losses.SmoothedModule --model.bonus 0.2 --model.student {student}"),
            *shlex.split(f"--model.from_scratch true {data} --trainer.fast_dev_run 1 --trainer.accelerator cpu"),
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


def test_own_data_block_is_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = yaml_block("label_set")
    (tmp_path / "data.yaml").write_text(block)
    rows = [f'{{"title": "a", "body": "b{i}", "sentiment": "positive", "why": "because"}}' for i in range(12)]
    for split in ("train", "test"):
        (tmp_path / f"reviews_{split}.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    student = make_student_folder(tmp_path / "student")
    report = tmp_path / "report.json"
    main(["inspect", "--config", "data.yaml", "--data.tokenizer", str(student), "--json", str(report)])
    assert '"rows": 12' in report.read_text()
