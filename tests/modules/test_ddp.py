"""Two processes train and evaluate as one does."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.modules import ddp_runs
from tests.modules.batches import Row
from tests.modules.ddp_runs import ACCUMULATES, EVALUATION_ROWS, ROWS, WEIGHT, make_module
from tests.modules.running import difference, identical, make_trainer, plain_gradients, plain_terms
from tests.modules.test_weights import check_steps
from tests.ranks import WORLD, Found, on_ranks
from tests.variants.fixed_text import with_fixed_text


@pytest.fixture(scope="module")
def ranks(student_folder: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return on_ranks(ddp_runs.all_runs, tmp_path_factory, student_folder, teacher_folder)


def differences(
    folder: Path, run: Found, accumulate: int, epochs: int = 1, rows: Sequence[Row] = ROWS, weight: float = WEIGHT
) -> list[float]:
    """Of each step's gradient to the plain one over all rows of the step, those of both ranks."""
    student = make_module(folder).student.model.eval()
    size = 2 * WORLD * accumulate
    expected = [rows[start : start + size] for start in range(0, len(rows), size)] * epochs
    found = []
    for gradients, weights, own in zip(run["gradients"], run["weights"], expected, strict=True):
        student.load_state_dict(weights)
        plain = plain_gradients(student, own, {"label": 1.0, "rationale": weight})
        found.append(difference(gradients, plain))
    return found


@pytest.mark.parametrize("accumulate", ACCUMULATES)
def test_gradients_are_those_of_all_rows(student_folder: Path, ranks: list[Found], accumulate: int) -> None:
    for rank in ranks:
        assert max(differences(student_folder, rank[f"right {accumulate}"], accumulate, epochs=2)) < 1e-5


@pytest.mark.parametrize("accumulate", ACCUMULATES)
def test_targets_that_an_objective_prepares_are_counted(
    student_folder: Path, ranks: list[Found], accumulate: int
) -> None:
    rows = with_fixed_text(ROWS)
    for rank in ranks:
        run = rank[f"prepared {accumulate}"]
        assert max(differences(student_folder, run, accumulate, rows=rows, weight=WEIGHT + 0.5)) < 1e-5


def test_tokens_of_both_ranks_are_counted(ranks: list[Found]) -> None:
    # two epochs
    expected = 2 * sum(len(ids) for row in ROWS for task in row.values() for ids in task)
    assert [rank[f"right {k}"]["tokens"] for rank in ranks for k in ACCUMULATES] == [expected] * 4


def test_without_the_other_rank_s_counts_they_are_not(student_folder: Path, ranks: list[Found]) -> None:
    assert min(differences(student_folder, ranks[0]["own counts"], 3)) > 1e-3


def test_the_rows_hold_what_the_tests_are_about() -> None:
    dealt = [[row for i, row in enumerate(ROWS) if i % WORLD == rank] for rank in range(WORLD)]
    assert all("rationale" not in row for row in dealt[0][:2]), "rank 0 begins without rationales, rank 1 has some"
    assert any("rationale" in row for row in dealt[1][:2])
    assert all("rationale" not in row for row in dealt[1][-2:]), "in the odd last window rank 1 has none"
    assert any("rationale" in row for row in dealt[0][-2:])


@pytest.mark.parametrize("accumulate", ACCUMULATES)
def test_logged_losses_are_those_of_all_rows(student_folder: Path, ranks: list[Found], accumulate: int) -> None:
    run = ranks[0][f"right {accumulate}"]
    student = make_module(student_folder).student.model.eval()
    student.load_state_dict(run["weights"][0])
    rows = ROWS[: 2 * WORLD * accumulate]
    terms = {task: float(term.detach()) for task, term in plain_terms(student, rows, ("label", "rationale")).items()}
    logged = run["logged"][0]
    assert logged["train/label_loss"] == pytest.approx(terms["label"], rel=1e-5)
    assert logged["train/rationale_loss"] == pytest.approx(terms["rationale"], rel=1e-5)
    assert logged["train/loss"] == pytest.approx(terms["label"] + WEIGHT * terms["rationale"], rel=1e-5)


def test_gradient_shares_are_those_of_all_rows(student_folder: Path, ranks: list[Found]) -> None:
    size = 3 * 2 * WORLD
    found = ddp_runs.gradient_shares(make_module(student_folder), ROWS[:size], size)
    assert len(found[0]) == 4
    assert ranks[0]["gradient shares"][0] == pytest.approx(found[0], rel=1e-4)


def test_trained_weights_have_the_gradients_of_all_rows(student_folder: Path, ranks: list[Found]) -> None:
    for rank in ranks:
        run = rank["weighted"]
        students = [make_module(student_folder).student.model.eval() for _ in run["weights"]]
        for student, weights in zip(students, run["weights"], strict=True):
            student.load_state_dict(weights)
        check_steps(rank["log-variances"], run["gradients"], students, [ROWS[:12], ROWS[12:24], ROWS[24:]], WEIGHT)


def test_metrics_are_those_of_one_process(student_folder: Path, ranks: list[Found]) -> None:
    expected = ddp_runs.one_process(student_folder)
    assert {"loss", "label_loss", "rationale_loss", "accuracy", "rouge_l"} <= expected.keys()
    for rank in ranks:
        assert rank["padded"]["metrics"] == pytest.approx(expected, rel=1e-5)


def test_votes_are_those_of_one_process(student_folder: Path, ranks: list[Found]) -> None:
    expected = ddp_runs.voted(student_folder, make_trainer(), 3)
    assert len({answer["vote"] for answer in expected}) > 3
    assert [rank["voted"] for rank in ranks] == [expected] * 2


def test_rows_that_are_there_twice_count_once(student_folder: Path, ranks: list[Found]) -> None:
    expected = ddp_runs.one_process(student_folder)
    for rank in ranks:
        found = rank["repeated"]["metrics"]
        for name in ("accuracy", "rouge_l", "rationale_ends_in_prediction"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_ranks_make_as_many_forward_passes_whatever_their_choices(ranks: list[Found]) -> None:
    first, second = (rank["forward passes"] for rank in ranks)
    assert first == second
    assert min(first) > 0


def test_a_loss_is_measured_where_one_rank_has_targets_for_it(ranks: list[Found]) -> None:
    for rank in ranks:
        assert rank["one rank's rationales"] == ["label_loss", "loss", "rationale_loss"]


@pytest.mark.parametrize("sampler", ["padded", "repeated"])
def test_samples_come_from_all_ranks_in_order(ranks: list[Found], sampler: str) -> None:
    assert len(EVALUATION_ROWS) % WORLD, "so that a row has to be filled in"
    for rank in ranks:
        assert [sample["index"] for sample in rank[sampler]["samples"]] == [0, 1, 2]
        assert all(sample["rationale"] is not None for sample in rank[sampler]["samples"])


def test_ranks_take_the_path_of_the_first(ranks: list[Found]) -> None:
    assert [rank["paths"] for rank in ranks] == [["plain"] * 2] * WORLD


# with samples of the student, which the ranks share
@pytest.mark.parametrize("run", ["resume", "own text", "streamed"])
def test_both_ranks_end_with_the_same_weights(ranks: list[Found], run: str) -> None:
    for part in ("whole", "resumed"):
        assert identical(ranks[0][run][part], ranks[1][run][part])


def test_parameters_that_an_objective_shapes(student_folder: Path, teacher_folder: Path, ranks: list[Found]) -> None:
    expected = ddp_runs.shaped(student_folder, teacher_folder, make_trainer, batch_size=4)
    first, second = (rank["shaped"] for rank in ranks)
    assert identical(first["weights"], second["weights"])
    assert difference(first["gradients"], second["gradients"]) == 0
    assert difference(first["gradients"], expected["gradients"]) < 1e-5


def test_both_ranks_have_the_same_stage_and_the_similarities_of_the_first(ranks: list[Found]) -> None:
    first, second = (rank["taught"] for rank in ranks)
    assert identical(first["kept"], second["kept"])
    assert int(first["kept"]["objectives.0._extra_state"]) == 2
    assert first["kept"]["objectives.0.earlier"].any()
    similarities = first["kept"]["teachers.kept.teacher_crowd._extra_state"].tolist()
    assert similarities == pytest.approx(first["own"], rel=1e-5)
    assert similarities != pytest.approx(second["own"], rel=1e-3)


@pytest.mark.parametrize("run", ["resume", "own text", "streamed"])
def test_resumed_in_the_middle_of_an_epoch(ranks: list[Found], run: str) -> None:
    found = ranks[0][run]
    assert not identical(found["stopped"], found["whole"])
    assert identical(found["resumed"], found["whole"])


def test_a_loss_that_is_not_finite_on_one_rank_stops_both(ranks: list[Found]) -> None:
    for rank in ranks:
        assert rank["diverged"]["error"].startswith("step 2: the label loss is not finite; the last good checkpoint")
    assert all(rank["diverged"]["finite"] for rank in ranks)
