"""Every method that comes with this passes `check`, because it is there."""

import json
from pathlib import Path
from typing import Any

import pytest

from lit_distill import objectives
from lit_distill.checking import Checker, Finding
from lit_distill.commands.check import end_ranks, make_checker, rank_findings, save_step, start_ranks
from tests.objectives.test_overlays import FAMILIES, OVERLAYS, arguments, models, name_of, write_outputs
from tests.runs import CONFIGS, refusal, run, small_model, toy_data, write_lines
from tests.test_configs import content

PRESETS = [f"{name}Module" for name in ("Standard", "StepByStep", "SingleTask")]

SURELY = {"gkd": ["--model.objectives.share=1.0"], "distillm": ["--model.objectives.share=1.0"]}
"""Arguments with which an overlay does in the one step what it does in some."""

TWO_RANKS = [("kl", "llama"), ("hidden", "t5"), ("minillm", "t5"), ("mi_cot", "t5"), ("answer_consistency", "llama")]
"""Overlays and families whose step two processes take, too: with parameters and samples of an objective's own."""

__all__ = ["models"]


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """CommonsenseQA in the released layout, with labels and rationales of many lengths, one of which does not parse."""
    folder = tmp_path_factory.mktemp("ragged")
    answers = ["cat", "dog red", "a b c"]
    for split in ("train", "test"):
        rows, outputs = [], []
        for i in range(24):
            answer = answers[i % 3]
            question = "is the " * (i % 4) + f"{i} ?"
            rows.append({"id": f"{split}{i}", "question": question, "choices": answers, "answer": answer})
            text = "because " * (1 + i % 5) + f"{i} ."
            outputs.append("no" if i % 7 == 3 else f"{text} So the answer is (a) {answer}.\n\nQ: a")
        write_lines(folder / "cqa" / f"cqa_{split}.json", rows)
        (folder / "cqa" / "llm").mkdir(exist_ok=True)
        (folder / "cqa" / "llm" / f"{split}_CoT_0.json").write_text(json.dumps(outputs))
    write_outputs(folder, 24)
    return [f"--data.data_dir={folder}", "--data.batch_size=12"]


def command(student: Path, data: list[str], overlay: Path | None = None, teacher: Path | None = None) -> list[str]:
    base = CONFIGS / "cqa" / "step_by_step.yaml"
    outputs = Path(data[0].partition("=")[2]) / "outputs.jsonl"
    more = arguments(overlay, teacher, outputs) if overlay and teacher else []
    return [f"--config={base}", *more, f"--model.student={student}", *data]


def failed(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.found for finding in findings if finding.passed is False}


def structure(path: Path, family: str) -> str:
    """What an overlay shares with those whose steps run the same lines: on the second family its objectives."""
    model = content(path)["model"]["init_args"]
    if family != "t5":
        # the divergences of one file differ in a function of two distributions, which their own tests compare
        names = [one["class_path"].rpartition(".")[2] for one in model["objectives"]]
        return repr([getattr(objectives, name).__module__ for name in names])
    teachers = [sorted(teacher) for teacher in model.get("teachers", {}).values()]
    tasks = {key for task in model.get("tasks", {}).values() for key in task} & {"after", "select"}
    return repr((teachers, sorted(tasks), "adapter" in model))


def cases() -> list[Any]:
    """Overlays and families; those of a structure that was there are slow, and `fit` trains them in other tests."""
    found, seen = [], set()
    for path in OVERLAYS:
        for family in FAMILIES:
            # what adds no loss of its own is checked on one family
            if family == "t5" or "objectives+" in path.read_text():
                key = (structure(path, family), family)
                found.append(pytest.param(path, family, marks=pytest.mark.slow if key in seen else ()))
                seen.add(key)
    return found


@pytest.mark.parametrize(
    ("path", "family"), cases(), ids=lambda value: value if isinstance(value, str) else name_of(value)
)
def test_a_method(
    path: Path,
    family: str,
    models: dict[str, tuple[Path, Path]],
    ragged: list[str],
    here: Path,
) -> None:
    student, teacher = models[family]
    checker, _ = make_checker([*command(student, ragged, path, teacher), *SURELY.get(name_of(path), [])])
    findings = list(checker.run())
    assert not failed(findings)
    told = {finding.check: finding.found for finding in findings if finding.passed is None}
    assert "prepare" not in told
    assert not [check for check in told if check.startswith("weight")]
    assert {f"weight of {objective.name} alone" for objective in checker.module.objectives} <= {
        finding.check for finding in findings
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", PRESETS)
def test_a_preset(
    method: str, family: str, models: dict[str, tuple[Path, Path]], ragged: list[str], here: Path
) -> None:
    arguments = [f"--model={method}", f"--model.student={models[family][0]}", "--data=CQADataModule", *ragged]
    checker, _ = make_checker(arguments)
    findings = list(checker.run())
    assert len(findings) >= 9
    assert not failed(findings)


@pytest.mark.slow
def test_two_processes(models: dict[str, tuple[Path, Path]], ragged: list[str], here: Path) -> None:
    jobs: list[tuple[list[str], Path]] = []
    checkers: list[Checker] = []
    for name, family in TWO_RANKS:
        student, teacher = models[family]
        arguments = command(student, ragged, CONFIGS / "method" / f"{name}.yaml", teacher)
        checker, _ = make_checker(arguments)
        checkers.append(checker)
        jobs.append((arguments, here / name))
        jobs[-1][1].mkdir()
        # the reference is taken here
        save_step(checker, jobs[-1][1])
    end_ranks(start_ranks(jobs))
    for checker, (_, folder) in zip(checkers, jobs, strict=True):
        findings = list(rank_findings(checker, folder))
        assert findings
        assert not failed(findings)


@pytest.mark.parametrize("overlay", ["falling_weight", "uncertainty"])
def test_weights_that_change(overlay: str, models: dict[str, tuple[Path, Path]], ragged: list[str], here: Path) -> None:
    path = CONFIGS / "overlay" / f"{overlay}.yaml"
    checker, _ = make_checker([*command(models["t5"][0], ragged), f"--config={path}"])
    assert not failed(list(checker.run()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_term_of_the_padding(
    family: str, models: dict[str, tuple[Path, Path]], ragged: list[str], here: Path
) -> None:
    student, teacher = models[family]
    path = CONFIGS / "method" / "mi_cot.yaml"
    checker, _ = make_checker([*command(student, ragged, path, teacher), "--model.objectives.published=true"])
    findings = list(checker.run())
    assert not failed(findings)
    told = [finding.found for finding in findings if finding.passed is None]
    assert told == ["mi_cot: depends on its micro-batch"] * 3


def test_captured_distributions(models: dict[str, tuple[Path, Path]], ragged: list[str], here: Path) -> None:
    student, teacher = models["t5"]
    own = command(student, ragged)
    run("capture", own, f"--teacher={teacher}", "--out=kept")
    checker, _ = make_checker([*own, "--model.objectives+=ForwardKL", "--model.objectives.teacher=kept"])
    assert not failed(list(checker.run()))


def test_the_command_says_what_failed(
    models: dict[str, tuple[Path, Path]], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text("""\
from lit_distill.objectives import Objective

class RowMean(Objective):
    def forward(self, step):
        return step.student.token_losses("label").sum() / max(len(step.batch["label"]["labels"]), 1)
""")
    small = [small_model(models["t5"][0]), toy_data(24), "--two_ranks=false"]
    run("check", small)
    shown = capsys.readouterr().out
    assert "all checks passed" in shown
    assert "FAILED" not in shown
    with pytest.raises(SystemExit) as stopped:
        run("check", small, "--model.objectives+=mine.RowMean")
    assert stopped.value.code == 1
    shown = capsys.readouterr().out
    assert "3 of 12 checks failed" in shown
    assert shown.count("rowmean, gradient changed") == 3


def test_what_cannot_be_checked_is_refused_in_one_line(
    models: dict[str, tuple[Path, Path]], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small: list[Any] = [small_model(models["t5"][0]), toy_data()]
    line = refusal(capsys, "check", *small, "--config=configs/method/none.yaml")
    assert line.startswith("config: ")
    assert "configs/method/none.yaml" in line
    assert refusal(capsys, "check", *small, "--rows=1") == "rows must be an integer at least 2 and below 1025, got 1"
    assert refusal(capsys, "check", *small, "--dtype=float16").startswith("dtype: got float16; allowed is one of")
    data = ["--data=JSONLDataModule", "--data.train_file=train.jsonl", "--data.val_file=val.jsonl"]
    assert "train" in refusal(capsys, "check", small_model(models["t5"][0]), data)
