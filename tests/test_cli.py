"""The command line: what it refuses and how it says so, its help, and what a user's own classes do in it."""

import gc
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lit_distill.students
from lit_distill.cli import SHORT_HELP
from lit_distill.commands.dispatch import RUN
from lit_distill.messages import COMMANDS
from tests.runs import (
    CONFIGS,
    REPOSITORY,
    flat,
    metric_rows,
    refusal,
    run,
    run_folders,
    small_model,
    small_toy,
    small_trainer,
    toy_data,
    write_release,
)

OWN = '''
from lit_distill.data import ToyDataModule
from lit_distill.modules import StepByStepModule


class OwnModule(StepByStepModule):
    """A method of a user's own.

    Args:
        student: as ever.
        sharpness: how sharp it is.
        fault: raise this, in the constructor.
        **kwargs: as ever.
    """

    def __init__(self, student: str, *, sharpness: float = 0.5, fault: str = "", **kwargs) -> None:
        super().__init__(student, **kwargs)
        self.sharpness = sharpness
        if fault:
            raise {"value": ValueError, "type": TypeError, "import": ModuleNotFoundError, "key": KeyError}[fault](fault)

    @classmethod
    def make_tasks(cls, init_args):
        return dict(reversed(super().make_tasks(init_args).items()))

    def loss_terms(self, step):
        if self.sharpness == 0:
            raise ZeroDivisionError("no sharpness")
        terms = super().loss_terms(step)
        return terms | {"own": self.sharpness * terms["label"]}


class OwnDataModule(ToyDataModule):
    """Data of a user's own.

    Args:
        flavour: which one.
        **kwargs: as ever.
    """

    def __init__(self, flavour: str = "plain", **kwargs) -> None:
        super().__init__(**kwargs)
        self.flavour = flavour
        if flavour == "faulty":
            raise LookupError("no such flavour")
'''


pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def own(here: Path) -> Path:
    path = here / "own_stuff.py"
    path.write_text(OWN)
    return path


@pytest.fixture
def no_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a student fails."""

    def build(*args: object, **kwargs: object) -> None:
        raise AssertionError("a student was built")

    monkeypatch.setattr(lit_distill.students, "load", build)


def overlay(text: str) -> list[str]:
    Path("overlay.yaml").write_text(text)
    return ["--config=overlay.yaml"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command prints that ends the program by itself, without an error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*map(str, flat(arguments)))
    found = capsys.readouterr()
    assert stopped.value.code == 0
    assert not found.err
    return found.out


ALLOWED = (
    "fit, validate, test, predict, annotate, capture, experiment, rounds, compare, inspect, check, plan, "
    "export, shrink, search, tradeoff, serve, configs"
)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["a command must be given", ALLOWED]),
        (["ft"], ["ft: no such command", "did you mean fit?", f"allowed are {ALLOWED}"]),
        (["inspct"], ["inspct: no such command", "did you mean inspect?"]),
        (["frobnicate"], ["frobnicate: no such command; allowed are fit,"]),
        (["fit"], ["data, model: must be given", "--model"]),
        (["inspect"], ["data: must be given", "--data"]),
        (["fit", "--model=StepByStepModule", "--data=ToyDataModule"], ["model.student: must be given"]),
        (["inspect", "--data=ToyDataModule"], ["tokenizer must be given"]),
        (["fit", "--config=nowhere.yaml"], ["config: no file", "nowhere.yaml"]),
        (["inspect", "--config=nowhere.yaml"], ["config: no file", "nowhere.yaml"]),
        (["fit", "--config=."], ["config: ", "is not a file"]),
        (
            ["--verson"],
            ["verson: no such argument (did you mean version?)", "allowed are a command, help, version"],
        ),
        (["fit", "--config"], ["config: a value must be given"]),
        (["fit", "--config=tickets"], ["config: no file", "there are tickets/annotate, tickets/standard"]),
        (["configs", "--cpy=mine"], ["--cpy=mine: no such argument; allowed is --copy FOLDER"]),
        (["configs", "--copy"], ["copy: a folder must be given"]),
        (["fit", "--model.help=NopeModule"], ["model.help: Expected a dot import path string: NopeModule"]),
        (["inspect", "--data.help=NopeDataModule"], ["data.help: Expected a dot import path string: NopeDataModule"]),
    ],
)
def test_a_command_line_without_a_run_in_it(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, arguments)
    assert all(part in line for part in parts), line


WRONG: list[tuple[str, list[str]]] = [
    # keys that are not there, at each level
    ("--trainr.max_steps=3", ["trainr.max_steps: no such argument", "did you mean trainer.max_steps?", "seed_everyth"]),
    ("--trainer.max_stps=3", ["trainer.max_stps: no such argument", "did you mean trainer.max_steps?"]),
    ("--seed_everthing=3", ["seed_everthing: no such argument", "did you mean seed_everything?"]),
    ("--validation.every=3", ["validation.every: no such argument", "allowed are validation.every_n_steps"]),
    ("--checkpoint.monitr=x", ["checkpoint.monitr: no such argument", "checkpoint.monitor"]),
    ("--model.rationale_wieght=1", ["model.rationale_wieght", "did you mean rationale_weight?", "label_prefix"]),
    ("--data.batchsize=3", ["data.batchsize: no such argument", "did you mean batch_size?", "train_size"]),
    ("--model.tasks=[label]", ["model.tasks: got ['label']; allowed are settings by name, as {NAME: {KEY: VALUE}}"]),
    ("--model.vote.tasks=label", ["model.vote.tasks: got label; allowed is list, or null"]),
    ("--model.tasks={x: 3}", ["tasks: x must map prefix, input", "to values, got 3"]),
    ("--model.tasks={label: {target: '{rationale}'}}", ["tasks: none of label, rationale gives a label"]),
    ("stray", ["unexpected argument 'stray'"]),
    # a beginning of a key is no key
    ("--trainer.max_step=3", ["trainer.max_step: no such argument", "did you mean trainer.max_steps?"]),
    ("--model.rationale_weigh=3", ["model.rationale_weigh: no such argument", "rationale_weight"]),
    # classes
    ("--model=StepByStepModul", ["model: unknown class 'StepByStepModul'", "did you mean StepByStepModule?", "Single"]),
    ("--model.vote=3", ["model.vote: got 3; allowed are settings, as {KEY: VALUE}"]),
    ("--model.vote.sample=3", ["model.vote.sample: no such argument (did you mean samples?)"]),
    ("--data=CQADataModul", ["data: unknown class 'CQADataModul'", "did you mean CQADataModule?", "ESNLIDataModule"]),
    ("--data=SquadDataModule", ["data: unknown class 'SquadDataModule'", "allowed are ANLIDataModule, CQADataModule"]),
    ("--model=no_such_file.Own", ["model: cannot use the class 'no_such_file.Own'", "No module named 'no_such_file'"]),
    ("--model=lit_distill.modules.No", ["model: cannot use the class 'lit_distill.modules.No'", "no attribute 'No'"]),
    ("--trainer.logger=NopeLogger", ["trainer.logger: unknown class 'NopeLogger'", "CSVLogger"]),
    ("--trainer.callbacks=EarlyStoping", ["trainer.callbacks: unknown class", "did you mean EarlyStopping?"]),
    # types
    ("--trainer.max_steps=many", ["trainer.max_steps: got many; allowed is int"]),
    ("--trainer.max_steps", ["trainer.max_steps: a value must be given"]),
    ("--model.learning_rate=high", ["model.learning_rate: got high; allowed is float"]),
    ("--model.optimizer=sgd", ["model.optimizer: got sgd", "'adamw', 'adafactor'"]),
    ("--data.label_source=silver", ["data.label_source: got silver", "'gold', 'teacher'"]),
    ("--data.batch_size=4.5", ["data.batch_size: got 4.5; allowed is int"]),
    ("--test_after_fit=perhaps", ["test_after_fit: got perhaps; allowed is bool"]),
    ("--validation.every_n_steps=often", ["validation.every_n_steps: got often; allowed is int, or null"]),
    ("--trainer.precision=12", ["trainer.precision: got 12", "bf16-mixed"]),
    # ranges
    ("--model.rationale_weight=-1", ["rationale_weight must be at least 0, got -1"]),
    ("--model.learning_rate=0", ["learning_rate must be above 0, got 0"]),
    ("--model.dropout=1", ["dropout must be at least 0 and below 1, got 1"]),
    ("--data.train_fraction=0", ["train_fraction must be in (0, 1] or a whole number above 1, got 0"]),
    ("--data.train_fraction=1.5", ["train_fraction must be in (0, 1] or a whole number above 1, got 1.5"]),
    ("--data.batch_size=0", ["batch_size must be an integer >= 1, got 0"]),
    ("--validation.every_n_steps=0", ["validation.every_n_steps must be at least 1 or null, got 0"]),
    ("--trainer.gradient_clip_val=-1", ["trainer.gradient_clip_val must be at least 0, got -1"]),
    ("--trainer.accumulate_grad_batches=0", ["trainer.accumulate_grad_batches must be at least 1, got 0"]),
    ("--seed_everything=-4", ["seed_everything must be at least 0", "got -4"]),
    ("--model.learning_rate", ["model: a value must be given, as --model VALUE or --model.KEY VALUE"]),
    ("--model.learning_rate=null", ["learning_rate: got null; allowed is float"]),
    ("--model.lr_schedule=null", ["lr_schedule: got null; allowed is one of 'linear', 'constant'"]),
    ("--data.batch_size=null", ["batch_size: got null; allowed is int"]),
    ("--data.batch_size=1000000000000", ["batch_size must be an integer in [1, 2147483647]"]),
    ("--data.train_size=1000000000000", ["train_size must be an integer in [1, 10000000]"]),
    ("--model.num_beams=100000", ["num_beams must be an integer at least 1 and below 101, got 100000"]),
    ("--model.max_rationale_length=1000000000", ["max_rationale_length must be an integer at least 1 and below 10001"]),
    ("--trainer.val_check_interval=0", ["trainer.val_check_interval must be above 0, got 0"]),
    ("--trainer.check_val_every_n_epoch=0", ["trainer.check_val_every_n_epoch must be above 0, got 0"]),
    ("--trainer.max_steps=0", ["trainer.max_steps must be an integer at least 1", "got 0"]),
    ("--trainer.max_steps=1000000000000", ["trainer.max_steps must be an integer at least 1", "got 1000000000000"]),
    ("--trainer.limit_train_batches=0", ["not one step was taken, so that nothing is tested or saved"]),
    ("--trainer.num_nodes=2147483648", ["trainer.num_nodes must be at least 1 and below 65536"]),
    ("--trainer=3", ["trainer: Unable to load config '3'"]),
    ("--checkpoint.dirpath=/proc/none/below", ["/proc/none", "cannot be read or written: No such file or directory"]),
    ("--trainer.max_epochs=-5", ["trainer.max_epochs must be an integer at least 1", "got -5"]),
    ("--trainer.devices=-3", ["trainer: ", "devices"]),
    ("--checkpoint.mode=highest", ["mode", "min, max", "highest"]),
    ("--data.rationale_filter=no_such.filter", ["rationale_filter: ", "label_agrees"]),
    # the machine
    ("--trainer.strategy=ddpp", ["trainer: ", "invalid strategy name", "ddpp"]),
    ("--trainer.accelerator=abacus", ["trainer: ", "invalid accelerator name", "abacus"]),
    # names with settings
    ("--model.teachers.big=RUN", ["teachers: got {'big': 'RUN'}; allowed are settings by name, as {NAME: {KEY"]),
    ("--model.teachers+={big: {model: RUN}}", ["model.teachers+", "no such argument; only a list takes +"]),
    # files
    ("--ckpt_path=nowhere.ckpt", ["ckpt_path: 'nowhere.ckpt' is not there; allowed is a checkpoint"]),
    ("--ckpt_path=.", ["ckpt_path: '.' is a folder"]),
    ("--ckpt_path=best", ["ckpt_path: 'best' is not there"]),
    ("--model.from_scratch=false", ["student: no weights in the folder", "from_scratch"]),
    # what the model decides of the data
    ("--data.tokenizer=t5-small", ["data.tokenizer: 't5-small' is decided by the model"]),
    ('--data.tasks=["label"]', ["data.tasks: ['label'] is decided by the model", "'rationale': {"]),
    ("--data.tasks=[rationale_label]", ["data.tasks: ['rationale_label'] is decided by the model", "'predict: '"]),
    ("--model.rationale_prefix=predict: ", ["tasks: label and rationale both have the prefix 'predict: '"]),
]


@pytest.mark.parametrize(("argument", "parts"), WRONG, ids=[argument for argument, _ in WRONG])
def test_a_wrong_argument_is_one_line(
    argument: str, parts: list[str], student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, "fit", small_toy(student_folder), argument)
    assert all(part in line for part in parts), line


# jsonargparse says of itself that it will soon look at such a class more closely
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize("command", ["fit", "inspect"])
def test_a_class_that_is_no_method(command: str, student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, command, small_toy(student_folder), "--model=pathlib.PurePath")
    assert "model: got pathlib.PurePath; allowed is a DistillModule" in line


@pytest.mark.parametrize(
    "argument",
    [
        argument
        for argument, _ in WRONG
        if argument.startswith(("--trainr", "--model.rationale_wi", "--data.batch", "--data=", "--seed_", "--data.tok"))
    ],
)
def test_inspect_refuses_the_same_in_one_line(
    argument: str, student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = dict(WRONG)[argument]
    line = refusal(capsys, "inspect", small_toy(student_folder), argument)
    # neither the other commands' keys nor a built model are at hand
    assert all(part in line for part in parts if part != "seed_everyth"), line


IN_YAML: list[tuple[str, list[str]]] = [
    (
        "model:\n  init_args:\n    tasks: {rationale: {wieght: 2}}\n",
        ["tasks: rationale: unexpected 'wieght'", "weight"],
    ),
    (
        "model:\n  init_args:\n    tasks: {other: {target: '{rationale'}}\n",
        ["tasks: other: target", "{rationale"],
    ),
    (
        "model:\n  init_args:\n    objectives: [{class_path: no_such_file.KL}]\n",
        ["model.objectives: cannot use the class 'no_such_file.KL'", "overlay.yaml"],
    ),
    (
        "model:\n  init_args:\n    teachers: {big: {model: x, dtyp: float32}}\n",
        ["model.teachers.dtyp: no such argument (did you mean dtype?)", "overlay.yaml"],
    ),
    ("model:\n  init_args:\n    adapter: {rank: 3}\n", ["adapter: unexpected rank; allowed are r, alpha"]),
    ("trainr:\n  max_steps: 3\n", ["trainr", "no such argument", "did you mean trainer.max_steps?"]),
    ("trainer:\n  max_step: 3\n", ["trainer.max_step: no such argument", "did you mean trainer.max_steps?"]),
    ("validation:\n  every: 3\n", ["validation.every: no such argument", "validation.every_n_steps"]),
    ("model:\n  init_args:\n    rationale_wieght: 1\n", ["model.rationale_wieght", "did you mean rationale_weight?"]),
    ("data:\n  init_args:\n    batchsize: 1\n", ["data.batchsize", "did you mean batch_size?"]),
    ("data:\n  class_path: CQADataModul\n", ["data: unknown class 'CQADataModul'", "did you mean CQADataModule?"]),
    ("model: StepModul\n", ["model: unknown class 'StepModul'", "StepByStepModule"]),
    ("model: 3\n", ["model: got 3", "class_path"]),
    ("trainer: 3\n", ["trainer: got 3", "mapping"]),
    ("trainer:\n  max_steps: many\n", ["trainer.max_steps: got many; allowed is int", "overlay.yaml"]),
    ("seed_everything: x\n", ["seed_everything: got x"]),
    (
        "trainer:\n  strategy:\n    class_path: FSDPStrateg\n",
        ["trainer.strategy: unknown class 'FSDPStrateg'", "did you mean FSDPStrategy?"],
    ),
    (
        "trainer:\n  callbacks:\n    - class_path: EarlyStopping\n      init_args:\n        monitr: x\n",
        ["trainer.callbacks.monitr: no such argument", "did you mean monitor?"],
    ),
    ("trainer: [\n", ["config: not YAML", "line 2", "overlay.yaml"]),
    ("a: b: c\n", ["config: not YAML", "line 1", "overlay.yaml"]),
    ("trainer: " + "[" * 5000, ["config: not YAML", "nested more than 100 levels", "overlay.yaml"]),
    (
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        ["config: not YAML", "stands for more than 1,000,000 values", "overlay.yaml"],
    ),
    (
        "data:\n  init_args: [1]\n",
        ["data: cannot use the class", "'list' object", "overlay.yaml"],
    ),
    ("config: 3\n", ["config: a file cannot name another", "overlay.yaml"]),
    ("- 3\n", ["Unexpected config: - 3", "overlay.yaml"]),
    ("# nothing\n", ["Unexpected config", "overlay.yaml"]),
]


@pytest.mark.parametrize(("text", "parts"), IN_YAML, ids=[repr(text[:60]) for text, _ in IN_YAML])
def test_a_wrong_config_is_one_line(text: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    # two commands that parse the same
    command = "inspect" if "data:" in text else "fit"
    line = refusal(capsys, command, f"--config={CONFIGS / 'cqa' / 'step_by_step.yaml'}", overlay(text))
    assert all(part in line for part in parts), line


def test_a_config_that_is_not_utf8(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("latin.yaml").write_bytes(b"data:\n  name: caf\xe9\n")
    line = refusal(capsys, "fit", small_toy(student_folder), "--config=latin.yaml")
    assert line.startswith("config: 'latin.yaml' is not UTF-8"), line


@pytest.mark.parametrize("command", ["fit", "test", "predict", "inspect"])
def test_missing_data_offline_names_the_folder_and_the_argument(
    command: str, here: Path, weights_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data=SVAMPDataModule", f"--data.data_dir={here / 'elsewhere'}"]
    line = refusal(capsys, command, small_model(weights_folder), data, small_trainer())
    assert str(here / "elsewhere" / "svamp") in line
    assert "set data_dir" in line
    assert not (here / "elsewhere").exists()


def test_an_absent_split_is_an_error_only_where_it_is_needed(
    here: Path, student_folder: Path, weights_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_release(here / "release")
    (root / "anli1" / "anli1_train.json").unlink()
    data = ["--data=ANLIDataModule", f"--data.data_dir={root}", "--data.batch_size=4"]
    arguments = [*small_model(student_folder), *data, *small_trainer()]
    line = refusal(capsys, "fit", arguments)
    assert "anli1 has no train split" in line
    assert line.endswith("needs it")
    arguments = [*small_model(weights_folder), *data, *small_trainer()]
    run("validate", arguments)
    run("test", arguments)


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_a_file_of_ones_own_that_is_absent(
    command: str, weights_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data=JSONLDataModule", "--data.train=mine.jsonl", "--data.test=mine.jsonl"]
    line = refusal(capsys, command, small_model(weights_folder), data, small_trainer())
    assert line.startswith("train: there is no ")
    assert "mine.jsonl" in line


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("weights.pt", b"x", ["does not end in .ckpt"]),
        ("half.ckpt", b"PK\x03\x04 broken off", ["is damaged (cut off at 15 bytes)"]),
        ("empty.ckpt", b"", ["is damaged (cut off at 0 bytes)"]),
        ("other.ckpt", None, ["is no checkpoint of lit_distill"]),
    ],
)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_file_that_is_no_checkpoint(
    command: str, name: str, content: bytes | None, parts: list[str], student_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if content is None:
        torch.save({"state_dict": {}}, name)
    else:
        Path(name).write_bytes(content)
    line = refusal(capsys, command, small_toy(student_folder), f"--ckpt_path={name}")
    assert line.startswith(f"ckpt_path: '{name}'")
    assert all(part in line for part in parts), line


def test_a_metric_that_is_not_there_is_one_line(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "fit", small_toy(student_folder), "--checkpoint.monitor=val/acuracy")
    assert "val/acuracy" in line
    assert "'val/accuracy'" in line


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_a_package_that_is_not_installed_is_one_line(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "fit", small_toy(student_folder), "--trainer.strategy=deepspeed_stage_2")
    assert line.startswith("trainer: ")
    assert "pip install" in line


def test_a_process_ends_with_code_2_and_one_line(here: Path, student_folder: Path) -> None:
    # the one test in a process of its own: all that is written to the real stderr, also by loggers
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-m", "lit_distill", "fit", *small_toy(student_folder), "--model.rationale_weight=-2"],
        env={"PATH": "", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "HOME": str(here)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "lit_distill: error: rationale_weight must be at least 0, got -2.0\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("value", ValueError), ("type", TypeError), ("import", ModuleNotFoundError), ("key", KeyError)],
)
def test_an_exception_in_a_users_constructor_goes_through(
    fault: str, kind: type[Exception], own: Path, student_folder: Path
) -> None:
    with pytest.raises(kind) as raised:
        run("fit", small_toy(student_folder), "--model=own_stuff.OwnModule", f"--model.fault={fault}")
    assert type(raised.value) is kind
    assert raised.value.args == (fault,)
    assert raised.traceback[-1].path == own


def test_an_exception_in_a_users_loss_goes_through(own: Path, student_folder: Path) -> None:
    arguments = [*small_model(student_folder, "own_stuff.OwnModule"), "--model.sharpness=0"]
    with pytest.raises(ZeroDivisionError, match="no sharpness") as raised:
        run("fit", arguments, toy_data(), small_trainer())
    assert raised.traceback[-1].path == own


@pytest.mark.parametrize("command", ["fit", "inspect"])
def test_an_exception_in_a_users_data_goes_through(command: str, own: Path, student_folder: Path) -> None:
    with pytest.raises(LookupError, match="no such flavour") as raised:
        run(command, small_toy(student_folder), "--data=own_stuff.OwnDataModule", "--data.flavour=faulty")
    assert raised.traceback[-1].path == own


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("from lit_distill.modules import StandardModule\nOwn = StandardModule\nnot_defined\n", NameError),
        ("import not_installed_anywhere\n", ModuleNotFoundError),
        ("class Own(:\n", SyntaxError),
    ],
    ids=["NameError", "ModuleNotFoundError", "SyntaxError"],
)
@pytest.mark.parametrize("command", ["fit", "inspect"])
def test_a_fault_in_a_users_file_goes_through(
    command: str, text: str, kind: type[Exception], here: Path, student_folder: Path
) -> None:
    (here / "faulty_file.py").write_text(text)
    with pytest.raises(kind) as raised:
        run(command, small_toy(student_folder), "--model=faulty_file.Own")
    assert type(raised.value) is kind


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--help")
    assert max(map(len, text.splitlines())) <= 80
    commands = dict(re.findall(r"^    (\w+) +(\S.*)$", text, flags=re.MULTILINE))
    assert list(commands) == ALLOWED.split(", ")
    # how to get further, to be copied
    lines = [line.partition("lit-distill ")[2] for line in text.splitlines() if line.startswith("  lit-distill ")]
    assert len(lines) == 3
    for line in lines:
        assert printed(capsys, *shlex.split(line))


def test_every_command_runs() -> None:
    assert [*RUN, "configs"] == list(COMMANDS)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version") == f"lit_distill {lit_distill.__version__}\n"


def test_a_process_of_others_is_collected_as_before(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = gc.get_freeze_count()
    run("inspect", toy_data(), f"--data.tokenizer={student_folder}")
    assert gc.isenabled()
    assert gc.get_freeze_count() == before


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "inspect"])
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, command, "--help_all")
    for option in ("--config", "--model", "--data", "--trainer.max_steps"):
        assert option in text
    if command == "fit":
        for option in ("--test_after_fit", "--validation.every_n_steps", "--checkpoint.monitor", "--ckpt_path"):
            assert option in text


@pytest.mark.parametrize("command", SHORT_HELP)
def test_help_fits_on_a_screen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, command, "--help").splitlines()
    assert len(lines) <= 66
    assert max(map(len, lines)) <= 80
    # the batches of these are their own
    trains = any(line.startswith("  --data.batch_size ") and line.endswith("[64]") for line in lines)
    assert trains == (command not in ("export", "tradeoff", "serve"))
    assert ("  --model.student" in "\n".join(lines)) == (command not in ("inspect", "export", "tradeoff", "serve"))
    assert f"All arguments: lit-distill {command} --help_all" in lines


def test_the_help_on_one_screen_says_what_is_parsed(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "fit", "--help")
    shown = dict(re.findall(r"^  --([\w.]+) .*?(?: \[(.*)\])?$", text, flags=re.MULTILINE))
    classes = ["--model=StepByStepModule", f"--model.student={student_folder}", "--data=SVAMPDataModule"]
    parsed = yaml.safe_load(printed(capsys, "fit", classes, "--print_config"))
    for name in set(shown) - {"config", "print_config", "model.student"}:
        group, _, key = name.rpartition(".")
        place = parsed[group] if group else parsed
        value = (place["init_args"] if group in ("model", "data") else place)[key]
        assert yaml.safe_load(f"[{shown[name]}]") == [value] or shown[name] == str(value), name
    assert len(shown) > 40
    # what the command adds to Lightning's own is all there
    added = {"validation.every_n_steps", "seed_everything", "ckpt_path"} | {key for key in parsed if "_after_" in key}
    assert added | {"cpu_threads", "push_to_hub", "resume", "predictions"} <= shown.keys()
    for part, package in (("method", lit_distill.modules), ("data", lit_distill.data)):
        [line] = re.findall(rf"^{part}: --\w+ (.*(?:\n  \|.*)?)", text, flags=re.MULTILINE)
        names = {name for name in package.__all__ if name.endswith("Module")}
        assert set(re.findall(r"\w+Module", line)) == names - {"DistillModule", "RationaleDataModule"}


def test_help_of_a_method_shows_its_own_and_the_shared_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "fit", "--model.help=StepByStepModule")
    for argument in ("student", "rationale_weight", "rationale_prefix", "learning_rate", "max_label_length"):
        assert f"--model.{argument}" in text
    assert "the paper's lambda" in text
    # what follows from the method is not asked for
    assert "--data.tasks" not in text


@pytest.mark.parametrize("command", ["fit", "inspect"])
def test_help_of_a_users_own_classes_in_the_current_folder(
    command: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, command, "--model.help=own_stuff.OwnModule")
    assert "--model.sharpness" in text
    assert "how sharp it is" in text
    assert "--model.learning_rate" in text
    text = printed(capsys, command, "--data.help=own_stuff.OwnDataModule")
    assert "--data.flavour" in text
    assert "which one" in text
    assert "--data.batch_size" in text


def test_a_printed_config_runs_as_a_config(
    student_folder: Path, capsys: pytest.CaptureFixture[str], no_student: None
) -> None:
    first = printed(capsys, "fit", small_toy(student_folder), "--print_config")
    content = yaml.safe_load(first)
    assert content["model"]["init_args"]["student"] == str(student_folder)
    assert content["model"]["init_args"]["rationale_weight"] == 1.0
    assert content["data"]["init_args"]["train_size"] == 12
    # what is linked is not said twice
    assert not {"tokenizer", "tasks"} & content["data"]["init_args"].keys()
    Path("printed.yaml").write_text(first)
    assert printed(capsys, "fit", "--config=printed.yaml", "--print_config") == first


def test_later_configs_and_arguments_win(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("one.yaml").write_text("trainer: {max_steps: 11}\nvalidation: {every_n_steps: 5}\nseed_everything: 3\n")
    Path("two.yaml").write_text("trainer: {max_steps: 22}\nvalidation: {every_n_steps: 6}\n")
    model_and_data = [*small_model(student_folder), *toy_data()]
    text = printed(
        capsys, "fit", model_and_data, "--config=one.yaml", "--config=two.yaml", "--trainer.max_steps=33",
        "--print_config",
    )  # fmt: skip
    content = yaml.safe_load(text)
    assert content["trainer"]["max_steps"] == 33
    assert content["validation"]["every_n_steps"] == 6
    assert content["seed_everything"] == 3


def test_tasks_of_several_configs_add_up(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("one.yaml").write_text("model: {init_args: {tasks: {rationale: {select: sample}, x: {prefix: 'x: '}}}}\n")
    Path("two.yaml").write_text("model: {init_args: {tasks: {rationale: {weight: 0.5}, y: {prefix: 'y: '}}}}\n")
    base = [*small_model(student_folder), *toy_data()]
    text = printed(capsys, "fit", base, "--config=one.yaml", "--config=two.yaml", "--print_config")
    assert yaml.safe_load(text)["model"]["init_args"]["tasks"] == {
        "rationale": {"select": "sample", "weight": 0.5},
        "x": {"prefix": "x: "},
        "y": {"prefix": "y: "},
    }


def test_arguments_for_settings_of_a_task_or_teacher_add_up(
    student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("one.yaml").write_text("model: {init_args: {tasks: {rationale: {select: sample}}}}\n")
    tasks = ["--model.tasks.rationale.weight=0.5", "--model.tasks.label.prefix=tell: "]
    teachers = ["--model.teachers.big.model=RUN", "--model.teachers.big.offload=true", "--model.teachers.two.model=X"]
    base = [*small_model(student_folder), *toy_data()]
    text = printed(capsys, "fit", base, "--config=one.yaml", tasks, teachers, "--print_config")
    found = yaml.safe_load(text)["model"]["init_args"]
    assert found["tasks"] == {"rationale": {"select": "sample", "weight": 0.5}, "label": {"prefix": "tell: "}}
    assert {name: (own["model"], own["offload"]) for name, own in found["teachers"].items()} == {
        "big": ("RUN", True), "two": ("X", False),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [("prefix", "", ""), ("prefix", "\U0001f600=: ", "\U0001f600=: "), ("max_new_tokens", "null", None)],
)
def test_an_argument_for_a_setting_of_a_task_is_read_as_in_a_file(
    key: str, given: str, value: object, student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, "fit", small_toy(student_folder), f"--model.tasks.label.{key}={given}", "--print_config")
    assert yaml.safe_load(text)["model"]["init_args"]["tasks"] == {"label": {key: value}}


def test_no_student_is_built_to_parse_or_to_inspect(
    student_folder: Path, capsys: pytest.CaptureFixture[str], no_student: None
) -> None:
    assert printed(capsys, "fit", small_toy(student_folder), "--print_config")
    run("inspect", small_toy(student_folder))
    assert "explain: which one does not belong" not in capsys.readouterr().err
    with pytest.raises(AssertionError, match="a student was built"):
        run("fit", small_toy(student_folder))


@pytest.mark.parametrize(
    ("method", "extra", "prefixes"),
    [
        ("StandardModule", [], {"label": ""}),
        ("StandardModule", ["--model.label_prefix=a: "], {"label": "a: "}),
        ("StepByStepModule", [], {"label": "predict: ", "rationale": "explain: "}),
        ("StepByStepModule", ["--model.rationale_prefix=c: "], {"label": "predict: ", "rationale": "c: "}),
        ("SingleTaskModule", [], {"rationale_label": ""}),
        ("SingleTaskModule", ["--model.order=label_first"], {"label_rationale": ""}),
        ("SingleTaskModule", ["--model.input_prefix=d: "], {"rationale_label": "d: "}),
        ("lit_distill.modules.StandardModule", [], {"label": ""}),
        ("own_stuff.OwnModule", [], {"rationale": "explain: ", "label": "predict: "}),
    ],
)
def test_tasks_prefixes_and_tokenizer_follow_from_the_method(
    method: str, extra: list[str], prefixes: dict[str, str], own: Path, student_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    built: list[Any] = []

    def only_look(self: Any, *args: object, **kwargs: object) -> None:
        built.append(self)
        raise InterruptedError

    monkeypatch.setattr("lit_distill.data.base.RationaleDataModule.setup", only_look)
    with pytest.raises(InterruptedError):
        run("fit", small_model(student_folder, method), extra, toy_data(), small_trainer())
    assert {name: task.prefix for name, task in built[0].tasks.items()} == prefixes
    assert built[0].tokenizer.name_or_path == str(student_folder)


def test_a_users_own_classes_train(own: Path, student_folder: Path) -> None:
    model = [*small_model(student_folder, "own_stuff.OwnModule"), "--model.sharpness=2"]
    data = toy_data()
    data[0] = "--data=own_stuff.OwnDataModule"
    run("fit", model, data, "--data.flavour=sour", small_trainer())
    [folder] = run_folders()
    assert folder.parent.name == "own-Own-gold-1-seed0"
    rows = metric_rows(folder)
    steps = [row for row in rows if "train/own_loss" in row]
    assert len(steps) == 2
    for row in steps:
        label, own_loss = float(row["train/label_loss"]), float(row["train/own_loss"])
        assert own_loss == pytest.approx(2 * label, rel=1e-5)
        total = label + float(row["train/rationale_loss"]) + own_loss
        assert float(row["train/loss"]) == pytest.approx(total, rel=1e-5)
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert kept["model"]["class_path"] == "own_stuff.OwnModule"
    assert kept["data"]["init_args"]["flavour"] == "sour"


def test_a_runs_own_config_repeats_it(student_folder: Path) -> None:
    run("fit", small_toy(student_folder))
    [first] = run_folders()
    run("fit", f"--config={first / 'config.yaml'}")
    _, second = run_folders()
    weights = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in (first, second)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_config_is_a_path_first_then_a_shipped_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def steps(*names: str) -> int:
        text = printed(capsys, "fit", [f"--config={name}" for name in names], "--print_config")
        found: int = yaml.safe_load(text)["trainer"]["max_steps"]
        return found

    # an empty folder: by name, by file name, as in the repository, and composed in their order
    assert steps("quickstart") == steps("quickstart.yaml") == steps("configs/quickstart.yaml") == 500
    assert steps("quickstart", "cqa/step_by_step") == 10_000
    (here / "quickstart").write_text(
        (CONFIGS / "quickstart.yaml").read_text().replace("max_steps: 500", "max_steps: 3")
    )
    assert steps("quickstart") == 3


@pytest.mark.parametrize("command", ["fit", "predict", "annotate", "inspect", "experiment", "compare"])
def test_a_config_that_is_nowhere(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--config", "cqa/step_by_stp"], ["--config=cqa/step_by_stp"], ["-c", "cqa/step_by_stp"]):
        line = refusal(capsys, command, arguments)
        assert line.startswith("config: no file 'cqa/step_by_stp', and no shipped config of that name")
        assert "did you mean cqa/step_by_step?" in line


def test_a_shipped_student_is_found_from_any_folder(here: Path) -> None:
    run("inspect", "--config=quickstart", "--data.train_size=4", "--data.val_size=4", "--data.test_size=4")


def test_the_shipped_configs_are_listed_and_copied(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("configs")
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(listed) == {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert listed["cqa/step_by_step"] == "Distilling step-by-step (Eq. 1): labels and rationales as two tasks."
    run("configs", "--copy=configs")
    assert (here / "configs" / "cqa" / "step_by_step.yaml").is_file()
    (here / "configs" / "quickstart.yaml").write_text("mine")
    # nothing is overwritten
    assert refusal(capsys, "configs", "--copy=configs").startswith("copy: 'configs/")
    assert (here / "configs" / "quickstart.yaml").read_text() == "mine"


def test_completion_for_shells(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    Path("completion.sh").write_text(printed(capsys, "--print_completion=shtab-bash"))
    ask = """
    source completion.sh
    for words in "fi" "annot" "fit --trainer.max_st" "fit --data.train_fr" "predict --predi"; do
        COMPREPLY=() COMP_WORDS=(lit-distill $words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_lit_distill
        echo "${COMPREPLY[@]}"
    done
    """
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)  # noqa: S603, S607
    assert done.stdout.split() == ["fit", "annotate", "--trainer.max_steps", "--data.train_fraction", "--predictions"]
