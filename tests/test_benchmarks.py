"""The benchmarks measure the right thing; how long it takes is nobody's business here."""

import asyncio
import copy
import gc
import importlib
import json
import operator
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lit_distill.batch import IGNORE_INDEX
from lit_distill.data import ESNLIDataModule
from lit_distill.errors import UserError
from tests.runs import REPOSITORY, write_release
from tests.students import add_weights, make_student_folder

BENCHMARKS = REPOSITORY / "benchmarks"

Settings = Any
"""The class in ``benchmarks/options.py``, where the type checker does not look."""


@pytest.fixture(scope="module")
def bench() -> Iterator[Callable[[str], Any]]:
    """Import a module of the folder, which is on the path of its scripts alone."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(BENCHMARKS):
            del sys.modules[name]
    # the command line looks through the subclasses of modules and data modules: these must not outlive their files
    gc.collect()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release"), rows=24)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_DISTILL_CACHE", str(tmp_path_factory.getbasetemp() / "benchmark-tokens"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def settings(bench: Callable[[str], Any], release: Path, student_folder: Path) -> Settings:
    return bench("options").Settings(
        dataset="cqa",
        data_dir=str(release),
        student=str(student_folder),
        batch_size=2,
        precision="32",
        device="cpu",
        steps=2,
        warmup=1,
        pairs=2,
        seed=3,
        threads=1,
    )


@pytest.fixture
def short(release: Path, student_folder: Path) -> list[str]:
    """The arguments of a short run."""
    sizes = ["--batch_size=2", "--steps=2", "--pairs=2", "--threads=1"]
    return [f"--data_dir={release}", f"--student={student_folder}", *sizes]


class Alone:
    """The turn of a side that has this process for itself: always its own, with what it is told at first."""

    def __init__(self, *told: object) -> None:
        self.told = list(told)
        self.answers: list[Any] = []

    def wait(self) -> object:
        return self.told.pop(0) if self.told else None

    def answer(self, value: object) -> None:
        self.answers.append(value)


def last_line(capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    # the processes write where this one does
    captured = capfd.readouterr()
    assert captured.err == ""
    content: dict[str, Any] = json.loads(captured.out.splitlines()[-1])
    return content


def check_ratio(ratio: dict[str, float], recipe: list[float], ours: list[float]) -> None:
    first, second = sorted(a / b for a, b in zip(recipe, ours, strict=True))
    assert ratio == {"median": pytest.approx((first + second) / 2), "min": first, "max": second, "pairs": 2}


# ---------------------------------------------------------------- the two commands


@pytest.mark.slow
def test_training_is_compared(bench: Callable[[str], Any], short: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    bench("train_throughput").main(short)
    found = last_line(capfd)
    for ending in ("", "_length_grouped"):
        recipe, ours = f"recipe{ending}", f"lit_distill{ending}"
        check_ratio(found[f"ratio{ending}"], found["seconds"][recipe], found["seconds"][ours])
        for side in (recipe, ours):
            assert found[side]["share_of_ceiling"] > 0
            assert found[side]["tokens_per_second"] > found[side]["examples_per_second"] > 0
    # the same batches, so the same padding
    assert found["recipe"]["padding"] == found["lit_distill"]["padding"]
    assert found["same_examples"] is True
    assert found["goals"] == []
    for side in ("recipe", "lit_distill"):
        memory = found[side]["memory"]
        # torch alone takes more; the tiny student and its trainer take some
        assert memory["peak"] > memory["before"] > 100
        assert memory["growth"] == pytest.approx(memory["peak"] - memory["before"])
        assert memory["growth"] > 0
        assert found[f"{side}_length_grouped"]["memory"] is None


@pytest.mark.slow
def test_an_objective_is_compared_with_the_plain_method(
    bench: Callable[[str], Any], release: Path, student_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--data_dir={release}", f"--student={student_folder}", "--batch_size=2", "--pairs=2", "--threads=1"]
    bench("objective_cost").main(["kl", *arguments])
    found = last_line(capfd)["kl"]
    for unit in ("seconds", "cpu"):
        check_ratio(found[f"{unit}_ratio"], found[unit]["kl"], found[unit]["plain"])
    assert min(found["memory"].values()) > 0
    assert found["memory_ratio"] == pytest.approx(found["memory"]["kl"] / found["memory"]["plain"])
    with pytest.raises(SystemExit) as stopped:
        bench("objective_cost").main(["none", *arguments])
    assert stopped.value.code == 2
    assert capfd.readouterr().err.endswith("none.yaml: there is no such overlay\n")


@pytest.mark.parametrize(
    ("arguments", "losses"), [([], "answer"), pytest.param(["--rationales"], "all", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_evaluation_is_compared_and_says_the_same(
    bench: Callable[[str], Any],
    short: list[str],
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    losses: str,
) -> None:
    bench("eval_throughput").main([*short, *arguments])
    found = last_line(capfd)
    assert found["losses"] == losses
    check_ratio(found["ratio"], found["seconds"]["recipe"], found["seconds"]["lit_distill"])
    assert found["identical"] is True


class Told:
    """A process whose answers are known."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)

    def tell(self, command: object = None) -> None: ...

    def answer(self) -> object:
        return self.answers.pop(0)

    def ask(self, command: object = None) -> object:
        return self.answer()


def test_other_predictions_are_a_fault(
    bench: Callable[[str], Any], settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    operations = bench("operations")
    shape = operations.Shape(*(1,) * 7, is_gated_act=False)
    machine: dict[str, object] = dict.fromkeys(("cpu", "cores", "threads", *bench("report").PACKAGES), "any")
    ready = {
        "machine": machine,
        "shape": shape,
        "lengths": [(5, 2, None, None), (6, 2, None, None)],
        "content": operations.Content(2, 15, 16),
    }

    def done(*texts: str) -> dict[str, Any]:
        memory = {"before": 1.0, "peak": 3.0, "growth": 2.0}
        return {"seconds": 1.0, "texts": [(text,) for text in texts], "memory": memory, "notes": ["fast: off, as told"]}

    workers = {
        "recipe": Told(ready, done("a", "b"), done("a", "b")),
        "lit_distill": Told(ready, done("a", "b"), done("a", "something else")),
        "ceiling": Told(1e9, 1e9),
    }
    with pytest.raises(SystemExit) as stopped:
        bench("eval_throughput").run(
            workers, replace(settings, pairs=1), bench("options").Asked(stop_at_gold=True), peak_tflops=None
        )
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["identical"] is False
    assert lines[-2] == "1 predictions differ; row 1: recipe ('b',), lit_distill ('something else',)"
    # what was measured is not what was meant
    assert "note     lit_distill: fast: off, as told" in lines
    assert max(map(len, lines[:-1])) <= 90


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size=0"], "batch_size must be at least 1, got 0"),
        (["--precision=16"], "argument --precision: invalid choice"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    bench: Callable[[str], Any],
    short: list[str],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench("train_throughput").main([*short, *arguments])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("train_throughput: error: ")
    assert message in lines[0]


def test_datasets_are_those_there_are(bench: Callable[[str], Any]) -> None:
    assert tuple(bench("rows")._DATASETS) == bench("options").DATASETS


# ---------------------------------------------------------------- annotate


@pytest.mark.slow
def test_a_teacher_is_kept_busy(bench: Callable[[str], Any], capfd: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows=5", "--concurrency=3", "--delay=0.05", "--runs=1", "--memory_rows", "40", "4"]
    bench("annotate_throughput").main(sizes)
    found = last_line(capfd)
    # five questions, three at a time: two rounds
    assert found["ideal_seconds"] == pytest.approx(0.1)
    (seconds,) = found["seconds"]
    share = pytest.approx(0.1 / seconds)
    assert found["ratio"] == {"median": share, "min": share, "max": share, "pairs": 1}
    # no job is faster than its server, nor the whole of it than its asking
    assert found["ratio"]["median"] <= found["ratio_asking"]["median"] <= 1
    assert found["questions_per_second_without_delay"] > 0
    assert found["machine"]["openai"]
    assert [own["rows"] for own in found["memory"]] == [own["answers"] for own in found["memory"]] == [4, 40]
    for own in found["memory"]:
        # all are right, so that what is remembered of right answers is in the memory too
        assert own["agree"] == 1
        assert own["growth"] >= own["asking"] >= 0
    few, many = found["memory"]
    assert found["bytes_a_row"]["growth"] == pytest.approx((many["growth"] - few["growth"]) * 2**20 / 36)
    assert found["goals"] == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--rows=0", "rows must be at least 1, got 0"),
        ("--delay=0", "delay must be above 0, got 0"),
        ("--memory_rows=0", "memory_rows must be at least 1, got 0"),
    ],
)
def test_wrong_sizes_are_refused_in_one_line(
    bench: Callable[[str], Any], capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench("annotate_throughput").main([argument])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"annotate_throughput: error: {message}\n"


def test_the_waiting_server_finds_requests_in_any_pieces(bench: Callable[[str], Any]) -> None:
    waiting = bench("waiting")
    question = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody"
    listing = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"
    stream = question + listing + question
    for size in (1, 7, len(question) + 3, len(stream)):
        written: list[bytes] = []
        connection = waiting._Connection(0.0)
        connection._transport = SimpleNamespace(write=written.append)
        for start in range(0, len(stream), size):
            connection.data_received(stream[start : start + size])
        bodies = [json.loads(response.partition(b"\r\n\r\n")[2]) for response in written]
        assert [body["object"] for body in bodies] == ["chat.completion", "list", "chat.completion"]
        assert bodies[0]["choices"][0]["message"]["content"] == waiting.ANSWER


# ---------------------------------------------------------------- processes


@pytest.fixture
def fault(bench: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Run processes whose second one does something, and return the one line that comes of it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(body: str) -> str:
        (tmp_path / "sides.py").write_text(
            "import os, signal, sys\nfrom lit_distill.errors import UserError\n"
            "def first(turn):\n    turn.answer('ready')\n    turn.wait()\n    turn.wait()\n"
            f"def second(turn):\n    turn.answer('ready')\n    turn.wait()\n    {body}\n"
        )
        workers = bench("workers")
        found: dict[str, Any] = {}

        def ask() -> None:
            functions = {"recipe": ("sides:first",), "lit_distill": ("sides:second",)}
            with bench("options").one_line_errors("bench"), workers.running(functions) as started:
                found.update(started)
                assert [worker.answer() for worker in found.values()] == ["ready", "ready"]
                found["recipe"].tell()
                found["lit_distill"].ask()

        with pytest.raises(SystemExit) as stopped:
            ask()
        assert stopped.value.code == 1
        assert not any(worker._process.is_alive() for worker in found.values())
        return str(stopped.value.__cause__)

    return run


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise UserError('batch_size: too much')", "batch_size: too much"),
        ("raise RuntimeError('odd')", "RuntimeError: odd (sides.py:10)"),
        ("os._exit(3)", "the process of lit_distill ended too early, with exit code 3"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "the process of lit_distill was ended by SIGKILL, which the system also sends when memory runs out",
        ),
    ],
)
def test_a_process_that_fails_or_dies_ends_all_with_one_line(
    fault: Callable[[str], str], capfd: pytest.CaptureFixture[str], body: str, message: str
) -> None:
    assert fault(body) == message
    assert capfd.readouterr().err == f"bench: error: {message}\n"


def test_more_rows_in_a_batch_than_there_are(bench: Callable[[str], Any], settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size: 100 is more than the 21 rows there are to train on"):
        bench("training").train_side(Alone(), replace(settings, batch_size=100), "lit_distill", "32", str(tmp_path))


def test_the_process_that_reports_imports_no_torch() -> None:
    script = "import sys, train_throughput, eval_throughput; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=BENCHMARKS, check=True)  # noqa: S603 - this very script


# ---------------------------------------------------------------- equal work


def test_both_sides_begin_with_the_same_weights_and_train_on_the_same_batches(
    bench: Callable[[str], Any],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    training = bench("training")
    seen: dict[str, list[dict[str, Any]]] = {"recipe": [], "lit_distill": []}
    recipe_class, module_class = bench("recipe").RecipeTrainer, bench("ours").BenchmarkModule
    compute_loss, training_step = recipe_class.compute_loss, module_class.training_step

    def recipe_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen["recipe"].append(inputs)
        return compute_loss(self, model, inputs, *args, **kwargs)

    def our_step(self: Any, batch: Any, index: int) -> Any:
        seen["lit_distill"].append(batch)
        return training_step(self, batch, index)

    monkeypatch.setattr(recipe_class, "compute_loss", recipe_step)
    monkeypatch.setattr(module_class, "training_step", our_step)
    weights: list[dict[str, torch.Tensor]] = []
    for owner, path in ((bench("ours").Ours, "module.student.model"), (bench("recipe").Recipe, "student")):

        def train_seen(self: Any, *args: Any, train: Any = owner.train, path: Any = path) -> None:
            weights.append(copy.deepcopy(operator.attrgetter(path)(self).state_dict()))
            train(self, *args)

        monkeypatch.setattr(owner, "train", train_seen)
    theirs = Alone()
    training.train_side(theirs, settings, "recipe", "32", str(tmp_path))
    own = Alone(theirs.answers[0]["grouped"])
    training.train_side(own, settings, "lit_distill", "32", str(tmp_path))
    # the plan, the warm-up, two blocks of each kind, and the end
    assert len(theirs.answers) == len(own.answers) == 1 + 1 + 4 + 1
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    alike = settings.warmup + settings.pairs * settings.steps
    for recipe, ours in zip(seen["recipe"][:alike], seen["lit_distill"][:alike], strict=True):
        for task in ("label", "rationale"):
            for part in ("input_ids", "attention_mask", "labels"):
                assert torch.equal(recipe[task][part], ours[task][part])
    # batches of their own by length, of the same rows
    rows = [
        sorted(tuple(row[row > 1].tolist()) for inputs in steps[alike:] for row in inputs["label"]["input_ids"])
        for steps in seen.values()
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == settings.pairs * settings.steps * settings.batch_size


def test_the_recipes_loss_is_the_two_mean_cross_entropies(
    bench: Callable[[str], Any], settings: Settings, tmp_path: Path
) -> None:
    with bench("quiet").quiet(None):
        training = bench("training").Training(settings)
        recipe = bench("recipe").Recipe(settings, training.tokenizer, "32", str(tmp_path))
        features = [dict(training.features[row]) for row in (0, 1, 2)]
        # one row without a rationale is left out of that loss, and stays in the other
        features[1]["rationale_labels"] = None
        batch = recipe.collator(features)
        assert len(batch["rationale"]["labels"]) == 2
        loss = bench("recipe").RecipeTrainer.compute_loss(SimpleNamespace(rationale_weight=0.5), recipe.student, batch)
        parts: list[torch.Tensor] = []
        for task, rows in (("", (0, 1, 2)), ("rationale_", (0, 2))):
            terms = []
            for row in rows:
                source, target = (torch.tensor([features[row][f"{task}{n}"]]) for n in ("input_ids", "labels"))
                shifted = torch.cat([torch.zeros(1, 1, dtype=torch.long), target[:, :-1]], dim=1)
                logits = recipe.student(input_ids=source, decoder_input_ids=shifted).logits[0]
                terms.append(F.cross_entropy(logits, target[0], reduction="none"))
            parts.append(torch.cat(terms).mean())
    torch.testing.assert_close(loss, parts[0] + 0.5 * parts[1])


def test_given_batches_are_those_of_the_datas_own_order(bench: Callable[[str], Any], settings: Settings) -> None:
    with bench("quiet").quiet(None):
        training = bench("training").Training(settings)
        warmup, blocks = training.shuffled()
        first = next(iter(training.data.train_dataloader()))
        training.data.replayed = [*warmup, *blocks[0]]
        replayed = list(training.data.train_dataloader())
    assert torch.equal(replayed[1]["label"]["input_ids"], first["label"]["input_ids"])
    used = [row for batch in (*warmup, *blocks[0], *blocks[1]) for row in batch]
    assert len(set(used)) == len(used) == 10


def test_each_row_ends_at_its_gold_length(bench: Callable[[str], Any]) -> None:
    ended = bench("recipe").EndAtGold(torch.tensor([1, 3]), end=1)
    scores = torch.arange(8.0).reshape(2, 4)
    chosen = [ended(torch.zeros(2, length, dtype=torch.long), scores).argmax(dim=1).tolist() for length in (1, 2, 3)]
    assert chosen == [[1, 3], [1, 3], [1, 1]]
    # the likeliest token ends no row early
    assert ended(torch.zeros(2, 1, dtype=torch.long), torch.tensor([[0.0, 9.0, 1.0]] * 2)).argmax(1).tolist() == [1, 2]


# ---------------------------------------------------------------- figures


def test_padding_is_the_share_of_positions(bench: Callable[[str], Any]) -> None:
    gone = IGNORE_INDEX
    batch = {
        "label": {
            "input_ids": torch.tensor([[5, 6, 1], [1, 0, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
            "labels": torch.tensor([[7, 1], [1, gone]]),
        },
        "rationale": {
            "input_ids": torch.tensor([[5, 6, 7, 1]]),
            "attention_mask": torch.ones(1, 4, dtype=torch.long),
            "labels": torch.tensor([[8, 9, 8, 9, 1]]),
        },
    }
    held = bench("rows").content(batch)
    assert (held.examples, held.real, held.positions) == (2, 16, 19)
    assert held.padding == pytest.approx(3 / 19)


def test_operations_are_counted(bench: Callable[[str], Any]) -> None:
    ceiling = bench("operations")
    config = SimpleNamespace(
        d_model=2, num_heads=1, d_kv=3, d_ff=5, is_gated_act=True, num_layers=1, num_decoder_layers=1, vocab_size=7
    )
    # weights that a token passes: attention 4 * 2 * 3, gated feed-forward 3 * 2 * 5
    encoder, cross_keys_values = 24 + 30, 2 * 2 * 3
    decoder = 24 + 12 + 30 + 2 * 7
    source, target = 2, 3
    products = 2 * (source * (encoder + cross_keys_values) + target * decoder)
    # pairs of positions: 2 * 2 in the encoder, 1 + 2 + 3 in the decoder, 3 * 2 across; each in two products of 3 * 2
    attention = (4 + 6 + 6) * 2 * 3 * 2
    assert ceiling.forward_flops(config, [(source, target)]) == products + attention == 936
    assert ceiling.decoding_flops(config, [(source, target)]) == 2 * target * decoder + (6 + 6) * 2 * 3 * 2
    assert ceiling.training_flops(config, [(source, target, None, None)]) == 3 * 936
    assert ceiling.training_flops(config, [(source, target, source, target)]) == 6 * 936
    both = ceiling.evaluation_flops(config, [(source, target, source, target)], rationales=False)
    assert both == 2 * 936 + ceiling.decoding_flops(config, [(source, target)])


def test_linear_layers_are_those_of_the_model(bench: Callable[[str], Any], settings: Settings, tmp_path: Path) -> None:
    with bench("quiet").quiet(None):
        tokenizer = bench("training").Training(settings).tokenizer
        student = bench("recipe").Recipe(settings, tokenizer, "32", str(tmp_path)).student
    layers = [tuple(m.weight.shape) for m in student.modules() if isinstance(m, torch.nn.Linear)]
    counted = bench("operations").linears(student.config)
    assert sum(counted.values()) == len(layers)
    expected = sum(inputs * outputs for outputs, inputs in layers)
    assert sum(shape.inputs * shape.outputs * count for shape, count in counted.items()) == expected


def test_both_sides_read_the_same_batches(bench: Callable[[str], Any], tmp_path: Path) -> None:
    student = make_student_folder(tmp_path / "reader", sentinels=8)
    (tmp_path / "corpus.txt").write_text("".join(f"the cat is {i} red\n" for i in range(3000)))
    given = {"student": str(student), "corpus": str(tmp_path / "corpus.txt"), "column": "text", "max_length": 24}
    given |= {"batch_size": 2, "steps": 2, "pairs": 1, "precision": "32", "threads": 1}
    reading = bench("reading")
    found: dict[str, list[dict[str, float]]] = {}
    for name in ("lit_distill", "plain"):
        told = found[name] = []
        getattr(reading, name)(SimpleNamespace(wait=lambda: None, answer=told.append), given)
    for ours, plain in zip(*found.values(), strict=True):
        # two batches of two: sources of at most 24 tokens, targets of 6
        assert ours["tokens"] == plain["tokens"] == 4 * (24 + 6)
    assert len(found["plain"]) == 2


def test_a_block_is_timed_from_its_turn_to_its_last_step(
    bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = bench("measure")
    now = iter([1.0, 5.0, 10.0, 17.0, 20.0, 22.0])
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    turn = Alone()
    blocks = measure.Blocks(turn, SimpleNamespace(read=lambda: None), "cpu", [1, 2, 2], [])
    blocks.begin()
    for step in range(1, 6):
        blocks.on_step(step)
    blocks.check_end()
    assert [found["seconds"] for found in turn.answers] == [4.0, 7.0, 2.0]
    # a trainer that accumulates gradients, or ends early, did something else
    with pytest.raises(RuntimeError, match="after 6 batches 5 optimizer steps were done"):
        blocks.on_step(5)
    now = iter([1.0])
    blocks = measure.Blocks(turn, SimpleNamespace(read=lambda: None), "cpu", [2], [])
    blocks.begin()
    blocks.on_step(1)
    with pytest.raises(RuntimeError, match="training ended after 1 optimizer steps"):
        blocks.check_end()


def test_sides_take_turns(bench: Callable[[str], Any]) -> None:
    rotated = bench("measure").rotated
    assert [rotated("abc", turn) for turn in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_a_goal_is_met_from_one_side(bench: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    goal = bench("report").Goal
    bench("report").print_goals([goal("ratio", 2.19, 2.2), goal("memory", 0.6, 0.6, at_most=True)])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "goal MISSED: ratio 2.19 (2.2 or more)",
        "goal met: memory 0.60 (0.6 or less)",
    ]


def test_goals_are_for_one_setting(bench: Callable[[str], Any], settings: Settings) -> None:
    small = SimpleNamespace(d_model=512, d_ff=1024, num_layers=8, num_heads=6, vocab_size=32128)
    is_goal_setting = bench("report").is_goal_setting
    assert is_goal_setting(settings, small)
    assert not is_goal_setting(settings, SimpleNamespace(**vars(small) | {"d_model": 768}))


# ---------------------------------------------------------------- many rows


def test_rows_are_repeated_with_other_inputs(bench: Callable[[str], Any], release: Path, tmp_path: Path) -> None:
    scale = bench("data_scale")
    scale.make_release(release / "esnli", tmp_path / "esnli", 60)
    rows = ESNLIDataModule(data_dir=tmp_path).released("train")
    assert rows is not None
    assert len({row.input for row in rows}) == 60
    assert [row.outputs for row in rows] == [rows[i % 24].outputs for i in range(60)]
    assert rows[0].rationale == "because 0 ."
    assert len(ESNLIDataModule(data_dir=tmp_path).released("val") or ()) == 24


# processes of their own; the order itself is tested in `data/test_sampler.py`
@pytest.mark.slow
def test_the_order_of_many_rows_is_measured_and_right(
    bench: Callable[[str], Any], release: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bench("data_scale").main([f"--data_dir={release}", "--rows=1000", "--stages", "order"])
    found = last_line(capfd)
    assert found["rows"] == 1000
    assert found["same_order"] is True
    assert found["order_s"] > 0
    assert found["rss_mb"] < 50


def test_too_few_rows_have_no_order(bench: Callable[[str], Any], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench("data_scale").main(["--rows=3"])
    assert "argument --rows: at least 64, got 3" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------ launches and GPUs


@pytest.mark.parametrize(
    ("sizes", "depth", "expected"),
    [
        ([], 1, 0),
        ([1] * 110, 1, 1),
        ([1] * 111, 1, 2),
        ([1] * 64, 2, 1),
        ([65_536 * 320], 1, 1),
        ([65_536 * 320 + 1], 1, 2),
        ([65_536 * 300, 65_536 * 40], 4, 2),
    ],
)
def test_kernels_over_lists(bench: Callable[[str], Any], sizes: list[int], depth: int, expected: int) -> None:
    assert bench("launches").foreach_launches(sizes, depth) == expected


def test_operations_are_launches_and_views_are_none(bench: Callable[[str], Any]) -> None:
    x = torch.ones(3, 4, device="meta")
    with bench("launches").Launches() as seen:
        (x.t().reshape(3, 4)[1:] * 2 + 1).sum()
        torch.ones(3).sum()
        torch.ones(3).to("meta")
        torch.ones(3).to("meta", non_blocking=True)
    # the clone of the reshaped one, three operations, two copies; nothing of the host's
    assert seen.kernels.total() == 6
    assert seen.waits.total() == 1
    with bench("launches").Launches() as seen:
        assert x.sum().item() == 1
        x[x > 0].sum()
    assert dict(seen.waits) == {"_local_scalar_dense": 1, "index": 1}


def test_eager_steps_are_counted_and_the_packed_one_waits_for_nothing(
    bench: Callable[[str], Any], student_folder: Path
) -> None:
    launches = bench("launches")
    batch = launches.drawn_batch(3, 0, 20)
    with launches.autocast_of_meta(enabled=False):
        plain, packed = (launches.eager_counts(student_folder, batch, path)[0] for path in ("plain", "packed"))
    # the products of 2 encoder and 2 decoder layers and the head, forward and twice backward, are library calls
    assert plain.kernels["mm"] >= 3 * (2 * 7 + 2 * 11 + 1) - 5
    assert packed.waits.total() == 0


def test_tables_of_a_gpu(bench: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "losses.txt").write_text('noise\n{"packed": {"largest": 0.004}}\n')
    (tmp_path / "losses.code").write_text("exit code 0\n")
    (tmp_path / "tests.txt").write_text("3 passed\n")
    assert bench("gpu").tables(tmp_path) == {"losses": {"packed": {"largest": 0.004}}, "tests": "3 passed"}
    assert "| losses | packed.largest | 0.004 |" in (tmp_path / "tables.md").read_text()
    assert json.loads((tmp_path / "tables.json").read_text())["tests"] == "3 passed"


# ----------------------------------------------------------------------------------------------------------- serving


def test_a_client_counts_what_is_lost(bench: Callable[[str], Any]) -> None:
    serve_load = bench("serve_load")
    found = serve_load.Found()
    statuses = iter(["200", "200", "503", "200", ""])

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for status in statuses:
            head = await reader.readuntil(b"\r\n\r\n")
            [length] = [line.split()[1] for line in head.split(b"\r\n") if line.startswith(b"Content-Length")]
            inputs = json.loads(await reader.readexactly(int(length)))["inputs"]
            if not status:
                break
            labels = [{"label": "oak"} for _ in inputs]
            # the fourth answer lacks a label
            found_already = len(found.seconds) == 2 and status == "200"
            content = {"detail": "later", "predictions": labels[1:] if found_already else labels}
            body = json.dumps(content).encode()
            writer.write(f"HTTP/1.1 {status} x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        writer.close()

    async def both() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            await serve_load.client(1, server.sockets[0].getsockname()[1], found)

    asyncio.run(both())
    assert len(found.seconds) == 2
    assert 2 <= found.rows <= 8
    assert found.lost == {"status 503: later": 1, "no label": 1, "IncompleteReadError": 1}


def test_a_draft_changes_no_text(
    bench: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {name: {"prefix": f"{name}: ", "max_new_tokens": 4} for name in ("label", "rationale")}
    names = ["--student", "--draft"]
    for name, layers in zip(names, (2, 1), strict=True):
        folder = make_student_folder(tmp_path / name, num_decoder_layers=layers, task_specific_params=tasks)
        add_weights(folder)
    bench("assisted").main([*(word for name in names for word in (name, str(tmp_path / name))), "--rows=3"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["equal"] == {"generate": 3, "assisted": 3, "engine": 3}
    assert (told["changed"], told["tokens"] > 0, set(told["ms"])) == (0, True, {"generate", "assisted", "engine"})
