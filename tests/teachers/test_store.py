"""Captured distributions against the teacher's own: their expectation, what is refused, and what is read back."""

import copy
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor

from lit_distill.batch import IGNORE_INDEX, TaskBatch
from lit_distill.errors import UserError
from lit_distill.modules import StepByStepModule
from lit_distill.objectives import ForwardKL, JensenShannon, Objective, ReverseKL, SkewKL, TotalVariation
from lit_distill.objectives.distributions import forward_kl, stored_kl
from lit_distill.students import load_tokens
from lit_distill.teachers.capture import Capturer, draw
from lit_distill.teachers.models import TeacherModel, Teachers
from lit_distill.teachers.store import (
    Header,
    SparseTargets,
    Store,
    keys_of,
    revision,
    shards,
    tokenizer_hash,
    unpack,
    write_header,
    write_shard,
)
from tests.modules.batches import Row, RowsData, collate, random_rows
from tests.modules.running import make_trainer
from tests.students import add_weights, make_causal_folder, make_causal_tokenizer, make_student_folder

ROWS = random_rows(8, seed=3)
TASKS = ("label", "rationale")
TEMPERATURE = 1.7
SETTINGS: dict[str, Any] = {"teacher": "t", "revision": "r", "dtype": "float32", "tokenizer": "x", "seed": 0}


def header(vocabulary: int, head: int, draws: int, **settings: Any) -> Header:
    given = {"temperature": TEMPERATURE, "renormalised": draws == 0} | SETTINGS | settings
    return Header(vocabulary=vocabulary, head=head, draws=draws, **given)


def drawn(logits: Tensor, uniform: Tensor, settings: Header) -> SparseTargets:
    records = np.empty(len(logits), settings.record)
    for name, values in draw(logits, uniform, settings).items():
        records[name] = values.numpy()
    return unpack(records)


def dense(targets: SparseTargets, vocabulary: int) -> Tensor:
    empty = torch.zeros(len(targets.ids), vocabulary, dtype=torch.float64)
    return empty.scatter_add_(1, targets.ids, targets.probabilities.double())


# ------------------------------------------------------------------------------------------------- expectation

REPEATS = 4000


@pytest.fixture(scope="module")
def both() -> tuple[Tensor, Tensor]:
    """Logits of student and teacher in float64: flat, peaked, and with an id that is certain but for rounding."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 5, 40, generator=generator, dtype=torch.float64).unbind()
    teacher *= torch.tensor([0.5, 1.0, 3.0, 6.0, 1.0]).double()[:, None]
    teacher[4, 7] = 20
    return student, teacher


def repeated(both: tuple[Tensor, Tensor], settings: Header) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, losses and gradients of many captures: ``(repeats, positions, ...)``."""
    student, teacher = both
    shape = (REPEATS * len(teacher), 1 + settings.draws)
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    targets = drawn(teacher.repeat(REPEATS, 1), uniform, settings)
    ours = student.repeat(REPEATS, 1).requires_grad_()
    losses = stored_kl(ours, targets, settings.vocabulary, TEMPERATURE)
    (gradients,) = torch.autograd.grad(losses.sum(), ours)
    split = (REPEATS, len(teacher))
    wide = dense(targets, settings.vocabulary)
    return wide.unflatten(0, split), losses.detach().unflatten(0, split), gradients.unflatten(0, split)


def within_its_error(samples: Tensor, expected: Tensor) -> bool:
    """Whether a mean over repeats is what it should be, by 5 standard errors.

    Of vectors in 50 random directions each: most ids are drawn too rarely for a normal distribution of their own.
    """
    if samples.dim() == 3:
        directions = torch.randn(samples.shape[-1], 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        samples, expected = samples @ directions, expected @ directions
    error = samples.std(0) / math.sqrt(len(samples))
    # the precision of float32, for what does not vary
    return bool(((samples.mean(0) - expected).abs() <= 5 * error + 1e-6).all())


def full(both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    student = both[0].clone().requires_grad_()
    losses = forward_kl(student, both[1], TEMPERATURE)
    return losses.detach(), torch.autograd.grad(losses.sum(), student)[0]


def degrees(left: Tensor, right: Tensor) -> float:
    return math.degrees(math.acos(float(torch.cosine_similarity(left.flatten(), right.flatten(), dim=0))))


@pytest.mark.parametrize(("head", "draws"), [(3, 4), (0, 6), (4, 1)])
def test_targets_and_gradients_are_the_teachers_in_expectation(
    both: tuple[Tensor, Tensor], head: int, draws: int
) -> None:
    targets, losses, gradients = repeated(both, header(40, head, draws))
    torch.testing.assert_close(targets.sum(-1), torch.ones_like(targets[..., 0]), rtol=0, atol=1e-6)
    assert within_its_error(targets, (both[1] / TEMPERATURE).softmax(-1))
    value, gradient = full(both)
    assert within_its_error(losses, value)
    assert within_its_error(gradients, gradient)
    assert degrees(gradients.mean(0), gradient) < 2


def test_a_renormalised_head_of_the_same_bytes_is_biased(both: tuple[Tensor, Tensor]) -> None:
    sampled, top = header(40, 3, 4), header(40, 5, 0)
    assert top.record.itemsize == sampled.record.itemsize
    targets, losses, gradients = repeated(both, top)
    value, gradient = full(both)
    assert not within_its_error(targets, (both[1] / TEMPERATURE).softmax(-1))
    assert not within_its_error(losses, value)
    # of the flat rows, too
    assert degrees(gradients.mean(0)[:2], gradient[:2]) > 20
    torch.testing.assert_close(targets.sum(-1), torch.ones_like(targets[..., 0]), rtol=0, atol=1e-6)


def test_values_are_a_divergence_from_the_whole_distribution() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    every = header(40, 40, 1)
    targets = drawn(logits, torch.full((6, 2), 0.5, dtype=torch.float64), every)
    ours = torch.randn(6, 43, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # three ids of padding
    expected = forward_kl(ours[:, :40], logits, TEMPERATURE)
    torch.testing.assert_close(stored_kl(ours, targets, 40, TEMPERATURE), expected, rtol=0, atol=2e-3)
    padded = torch.cat([logits, torch.zeros(6, 3).double()], -1).requires_grad_()
    same = stored_kl(padded, targets, 40, TEMPERATURE)
    torch.testing.assert_close(same.detach(), torch.zeros(6).double(), rtol=0, atol=2e-3)
    (gradient,) = torch.autograd.grad(same.sum(), padded)
    assert float(gradient.abs().max()) < 1e-4
    assert not gradient[:, 40:].any()


# ------------------------------------------------------------------------------------------- captured and read


def table(rows: list[Row]) -> pa.Table:
    pairs = [row[task] for row in rows for task in TASKS if task in row]
    columns = {"source": [source for source, _ in pairs], "target": [target for _, target in pairs]}
    return pa.table(columns, schema=pa.schema([(name, pa.list_(pa.int32())) for name in columns]))


def make_store(folder: Path, teacher: Path, rows: list[Row] = ROWS, **settings: Any) -> Store:
    tokens = load_tokens(teacher)
    own: dict[str, Any] = {
        "head": 4,
        "draws": 3,
        "teacher": str(teacher),
        "revision": revision(str(teacher)),
    } | settings
    data = {"0": {"dataset": "d", "split": "train", "rows": len(rows)}}
    found = header(len(tokens.tokenizer), **({"tokenizer": tokenizer_hash(tokens), "data": data} | own | settings))
    folder.mkdir()
    write_header(folder, found)
    Capturer(found, 3, "cpu").write(folder, table(rows))
    return Store(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_DISTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A student and another, wider model of each family; one head has rows that no token needs."""
    folder = tmp_path_factory.mktemp("families")
    made = {
        "t5": (make_student_folder(folder / "t5"), make_student_folder(folder / "t5-wide", d_model=24, vocab_size=72)),
        "llama": (make_causal_folder(folder / "llama"), make_causal_folder(folder / "llama-wide", hidden_size=24)),
    }
    for paths in made.values():
        for path in paths:
            add_weights(path, None if path.name.startswith("t5") else make_causal_tokenizer())
    return made


def make(student: Path, teacher: Path | Store, objective: Objective | None = None, **arguments: Any) -> Any:
    path = teacher.folder if isinstance(teacher, Store) else teacher
    own = objective or ForwardKL(temperature=TEMPERATURE, teacher="kept")
    torch.manual_seed(7)
    return StepByStepModule(student, objectives=[own], teachers={"kept": TeacherModel(str(path))}, **arguments)


def term(module: Any, batch: TaskBatch) -> Tensor:
    module.objectives[0].setup(module.student, module.teachers)
    found: Tensor = module.loss_terms(module.step(batch))["kl"]
    return found


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_loss_of_a_store_of_all_ids_is_that_of_the_teacher(
    families: dict[str, tuple[Path, Path]], tmp_path: Path, family: str
) -> None:
    student, teacher = families[family]
    every = make_store(tmp_path / "kept", teacher, head=64, draws=1)
    live, stored = make(student, teacher), make(student, every)
    # more padding, and another order, than in capture
    batch = collate(ROWS[::-1], TASKS, extra=2)
    found = []
    for module in (live, stored):
        value = term(module, batch)
        value.backward()
        gradients = [
            parameter.grad.flatten() for parameter in module.student.parameters() if parameter.grad is not None
        ]
        found.append((value.detach(), torch.cat(gradients)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-3)
    assert float((found[1][1] - found[0][1]).norm() / found[0][1].norm()) < 1e-2


def test_what_is_stored_depends_on_the_row_and_the_seed_alone(
    families: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    _, teacher = families["t5"]
    batch = collate(ROWS, TASKS)
    first = make_store(tmp_path / "first", teacher).targets(batch["rationale"], whole=True)
    other = make_store(tmp_path / "other", teacher, ROWS[::-1]).targets(batch["rationale"], whole=True)
    seeded = make_store(tmp_path / "seeded", teacher, seed=1).targets(batch["rationale"], whole=True)
    assert torch.equal(first.ids, other.ids)
    torch.testing.assert_close(first.probabilities, other.probabilities, rtol=0, atol=2e-5)
    assert torch.equal(first.ids[:, :4], seeded.ids[:, :4])
    assert not torch.equal(first.ids[:, 4:], seeded.ids[:, 4:])


def test_rows_that_are_not_stored_are_0_and_not_counted_in_evaluation(
    families: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    student, teacher = families["t5"]
    store = make_store(tmp_path / "kept", teacher, ROWS[:3])
    module = make(student, store).eval()
    batch = collate(ROWS, TASKS)
    known = collate(ROWS[:3], TASKS)
    assert float(term(module, batch).detach()) == pytest.approx(float(term(module, known).detach()), rel=1e-5)
    tokens = sum(len(row[task][1]) for row in ROWS[:3] for task in TASKS if task in row)
    assert module.objectives[0].counts(batch) == tokens
    nothing = collate(ROWS[3:], TASKS)
    assert (float(term(module, nothing).detach()), module.objectives[0].counts(nothing)) == (0, 0)
    with pytest.raises(UserError, match=r"kept: lacks \d+ of the 8 targets of a batch; it holds those of the data"):
        term(module.train(), batch)


def test_every_row_is_found_and_no_other(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (1500, 9), generator=generator).int().tolist()
    columns = {"source": [row[:4] for row in ids], "target": [row[4:] for row in ids]}
    rows = pa.table(columns, schema=pa.schema([(name, pa.list_(pa.int32())) for name in columns]))
    keys = keys_of(rows)
    assert len(set(keys.tolist())) == len(ids)
    # where numpy's texts end
    assert any(len(key) < 16 for key in keys.tolist())
    # nothing but where the source ends tells these from the others
    moved = pa.table({"source": [row[:5] for row in ids], "target": [row[5:] for row in ids]}, schema=rows.schema)
    settings = header(64, 1, 1)
    write_header(tmp_path, settings)
    records = np.zeros(1000 * 5, settings.record)
    records["entropy"] = np.arange(1000).repeat(5)
    write_shard(tmp_path, rows[:600], records[:3000])
    write_shard(tmp_path, rows[600:1000], records[3000:])
    store = Store(tmp_path)
    first = store.find(keys[:1000])
    assert store._arrays[1]["entropy"][first].tolist() == list(range(1000))
    assert (store.find(keys[1000:]) == -1).all()
    assert (store.find(keys_of(moved)) == -1).all()


def test_a_vocabulary_beyond_16_bits(tmp_path: Path) -> None:
    large = header(70_000, 2, 3)
    assert [each.record["ids"].base for each in (large, header(2**16, 2, 3))] == [np.dtype("u4"), np.dtype("u2")]
    logits = torch.randn(4, 70_000, generator=torch.Generator().manual_seed(0))
    logits[:, 69_999] = 30
    records = np.empty(4, large.record)
    for name, values in draw(logits, torch.rand(4, 4, dtype=torch.float64), large).items():
        records[name] = values.numpy()
    write_header(tmp_path, large)
    rows = pa.table({"source": [[3, 4]], "target": [[5, 6, 7, 1]]})
    write_shard(tmp_path, rows, records)
    inputs = {"input_ids": [[3, 4]], "attention_mask": [[1, 1]], "labels": [[5, 6, 7, 1, IGNORE_INDEX]]}
    targets = Store(tmp_path).targets({name: torch.tensor(value) for name, value in inputs.items()}, whole=True)  # type: ignore[arg-type]
    assert targets.ids[:, 0].tolist() == [69_999] * 4
    assert torch.equal(targets.ids, torch.from_numpy(records["ids"].astype(np.int64)))


def test_bytes_of_a_position() -> None:
    assert header(32_100, 4, 12).record.itemsize == header(32_100, 10, 0).record.itemsize == 44


def test_copies_read_the_same_folder(families: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    student, teacher = families["t5"]
    store = make_store(tmp_path / "kept", teacher)
    module, batch = make(student, store), collate(ROWS, TASKS)
    expected = float(term(module, batch).detach())
    assert float(term(copy.deepcopy(module), batch).detach()) == pytest.approx(expected)
    content = pickle.dumps(module.objectives)
    assert len(content) < 2000
    assert "kept" not in module.state_dict()


# ---------------------------------------------------------------------------------------------------- refused


def fails(module: Any, rows: list[Row] = ROWS) -> str:
    with pytest.raises(UserError) as error:
        make_trainer().fit(module, datamodule=RowsData(rows, 2, TASKS))
    assert module.global_step == 0
    return str(error.value)


class Own(Objective):
    """A user's, which says nothing of stores."""

    reads_teacher = True


@pytest.mark.parametrize("kind", [ReverseKL, JensenShannon, SkewKL, TotalVariation, Own])
def test_what_is_biased_is_refused_before_a_student_is_built(tmp_path: Path, kind: type[Objective]) -> None:
    write_header(tmp_path, header(64, 4, 3))
    with pytest.raises(UserError, match=r"holds captured distributions, from samples of which only forward KL is unb"):
        # no student of that name
        make(tmp_path / "nowhere", tmp_path, kind(teacher="kept"))


def test_another_temperature_is_refused_before_a_student_is_built(tmp_path: Path) -> None:
    write_header(tmp_path, header(64, 4, 3))
    with pytest.raises(UserError, match=r"of temperature 1.7, not 2: set temperature: 1.7, or capture with --temp"):
        make(tmp_path / "nowhere", tmp_path, ForwardKL(temperature=2.0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"dtype": "bfloat16"}, "dtype is"), ({"offload": True}, "offload is"), ({"mean": "logits"}, "a list is")],
)
def test_settings_of_models_are_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    write_header(tmp_path, header(64, 4, 3))
    model = [str(tmp_path), "other"] if "mean" in settings else str(tmp_path)
    with pytest.raises(UserError) as error:
        Teachers({"kept": {"model": model, **settings}})
    assert str(error.value) == f"teachers: kept: {said} for models; {tmp_path} holds captured distributions"


def test_another_tokenizer_is_refused(families: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    store = make_store(tmp_path / "kept", families["t5"][1])
    write_header(store.folder, replace(store.header, tokenizer="0123"))
    said = fails(make(families["t5"][0], store))
    assert "captured for another tokenizer (0123) than the student's (" in said
    assert said.endswith("capture with this student's config")


def test_other_weights_of_a_teacher_that_is_named_too_are_refused(
    families: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    student, teacher = families["t5"]
    store = make_store(tmp_path / "kept", teacher)
    module = make(student, store)
    module.teachers._add("big", TeacherModel(str(teacher)))
    make_trainer(max_steps=1).fit(module, datamodule=RowsData(ROWS, 2, TASKS))
    write_header(store.folder, replace(store.header, revision="0123"))
    module = make(student, store)
    module.teachers._add("big", TeacherModel(str(teacher)))
    assert "at revision 0123, which is now" in fails(module)


def test_targets_that_are_not_stored_are_refused(families: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    student, teacher = families["t5"]
    store = make_store(tmp_path / "kept", teacher, ROWS[:5])
    keys = {"label": keys_of(table([{"label": row["label"]} for row in ROWS]))}
    with pytest.raises(UserError, match=r"kept: lacks 3 of the 8 training targets of label: it was captured from oth"):
        store.check_targets(keys)
    write_header(store.folder, replace(store.header, data={"0": {"dataset": "d", "split": "val", "rows": 8}}))
    with pytest.raises(UserError, match=r"holds the split val, not train: capture --splits \[train\]"):
        Store(store.folder).check_targets(keys)
    assert "kept: lacks 1 of the 2 targets of a batch" in fails(make(student, store), ROWS[4:])


def test_what_a_store_lacks_is_refused_before_data_is_read(
    families: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    student, teacher = families["t5"]
    store = make_store(tmp_path / "kept", teacher)
    write_header(store.folder, replace(store.header, data={"0": {"dataset": "d", "split": "val", "rows": 8}}))
    make(student, store).check_teachers(make_trainer(), "validate")
    with pytest.raises(UserError, match=r"holds the split val, not train: capture --splits \[train\]"):
        make(student, store).check_teachers(make_trainer(), "fit")
    [path] = shards(store.folder)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"^{path}: torn or no captured distributions"):
        make(student, store).check_teachers(make_trainer(), "validate")


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_torn_shard_is_named(families: dict[str, tuple[Path, Path]], tmp_path: Path, damage: str) -> None:
    store = make_store(tmp_path / "kept", families["t5"][1])
    [path] = shards(store.folder)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        # within a page, whose checksum it spoils
        content[len(content) // 4] ^= 1
    path.write_bytes(content[: {"torn": len(content) // 2, "flipped": len(content), "empty": 0}[damage]])
    with pytest.raises(UserError, match=rf"^{path}: torn or no captured distributions .* run the same capture again"):
        store.find(np.array([b"x"], "S16"))
    path.unlink()
    with pytest.raises(UserError, match="holds no distributions yet"):
        Store(store.folder).find(np.array([b"x"], "S16"))


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"teacher": 1}')
    with pytest.raises(UserError, match=r"store.json: not the header of captured distributions: teacher: .*string"):
        Store(tmp_path)
