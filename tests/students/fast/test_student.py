"""Losses and every gradient of the fast path against the plain Hugging Face model."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5ForConditionalGeneration

from lit_distill.batch import IGNORE_INDEX, TaskInputs
from lit_distill.students.fast import functions as head_module
from lit_distill.students.fast import t5 as fast_student
from lit_distill.students.fast.t5 import encode, log_likelihoods
from tests.students.fast.examples import (
    TASKS,
    VARIANTS,
    compare,
    fast_losses,
    gradients,
    make_student,
    make_task,
    plain_losses,
    target_losses,
)

BUILT = {name: make_student(seed, **changes) for seed, (name, changes) in enumerate(VARIANTS.items())}


@pytest.fixture(params=VARIANTS)
def student(request: pytest.FixtureRequest) -> T5ForConditionalGeneration:
    return BUILT[request.param]


# ------------------------------------------------------------------------------------------------ any shape


@st.composite
def any_tasks(draw: st.DrawFn) -> list[TaskInputs]:
    tasks = []
    for number in range(draw(st.integers(1, 3))):
        rows = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 20)), min_size=1, max_size=7))
        if number == 0:
            rows[0] = (rows[0][0], max(rows[0][1], 1))
        tasks.append(
            make_task(
                [source for source, _ in rows],
                [target for _, target in rows],
                seed=draw(st.integers(0, 99)),
                holes=draw(st.sampled_from([0.0, 0.3])),
                extra=draw(st.integers(0, 3)),
            )
        )
    return tasks


@given(any_tasks())
@settings(max_examples=15, deadline=None)
def test_any_shapes(tasks: list[TaskInputs]) -> None:
    compare(BUILT["v1.1"], tasks)


@given(any_tasks())
@settings(max_examples=8, deadline=None)
def test_any_shapes_of_the_original_t5(tasks: list[TaskInputs]) -> None:
    compare(BUILT["original"], tasks)


SHAPES: dict[str, tuple[tuple[list[int], list[int]], ...]] = {
    "one token": (([1], [1]),),
    "one row": (([13], [6]),),
    "equal lengths": (([5, 5, 5], [4, 4, 4]),),
    "ragged": (([40, 1, 22, 3, 17, 2, 9], [1, 20, 3, 7, 12, 2, 5]),),
    "two tasks": (([8, 3, 5], [2, 1, 2]), ([9, 6], [20, 13])),
    "rows without targets": (([8, 3, 5], [2, 0, 2]), ([9, 6, 2], [0, 0, 7])),
    "a task without targets": (([8, 3], [2, 1]), ([9, 6], [0, 0])),
    "a first task without targets": (([9], [0]), ([8, 3], [2, 1]), ([4], [0])),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_student(student: T5ForConditionalGeneration, shape: str) -> None:
    compare(student, [make_task(*own, seed=seed) for seed, own in enumerate(SHAPES[shape])])


@pytest.mark.parametrize("changes", [VARIANTS["v1.1"], VARIANTS["original"]], ids=["v1.1", "original"])
def test_distances_beyond_the_last_bucket(changes: dict[str, Any]) -> None:
    student = make_student(
        3, **changes, relative_attention_num_buckets=8, relative_attention_max_distance=16, num_layers=1
    )
    compare(student, [make_task([150, 3, 141], [2, 40, 5], seed=4)])


def test_chunks_of_the_head_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 3 * 60 * 4)
    monkeypatch.setattr(head_module, "KEPT_BYTES", 2 * 3 * 60 * 4)
    compare(BUILT["v1.1"], TASKS)


def test_only_ignored_labels() -> None:
    task = make_task([4, 6], [3, 2])
    task["labels"].fill_(IGNORE_INDEX)
    found = fast_losses(BUILT["v1.1"], [task])
    assert found[0].item() == 0
    assert all(g is None or not g.any() for g in gradients(BUILT["v1.1"], found).values())


def test_padding_makes_no_difference() -> None:
    losses = [target_losses(BUILT["v1.1"], [make_task([4, 6], [3, 2], extra=extra)])[0] for extra in (0, 5)]
    for other in losses[1:]:
        assert torch.equal(losses[0], other)


def test_no_token_is_seen_twice() -> None:
    student = make_student()
    seen: list[int] = []
    blocks: Any = student.encoder.block
    handle = blocks[0].layer[0].SelfAttention.q.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    target_losses(student, TASKS)
    handle.remove()
    assert seen == [7 + 1 + 12 + 5 + 9 + 3 + 14]


# ------------------------------------------------------------------------------------------------ dropout


def test_every_dropout_of_the_plain_model_is_there() -> None:
    """Dropping at one place alone changes the loss on the fast path where, and only where, it does in the plain one."""
    names = [
        name
        for name, module in make_student(1, num_layers=1, num_decoder_layers=1).named_modules()
        if isinstance(module, torch.nn.Dropout) or type(module).__name__ == "T5Attention"
    ]
    for name in names:
        student = make_student(1, num_layers=1, num_decoder_layers=1).eval()
        module: Any = student.get_submodule(name)
        module.train(True)
        for child in module.children():
            child.eval()
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        else:
            module.dropout = 0.5
        for losses in (fast_losses, plain_losses):
            torch.manual_seed(0)
            first = float(losses(student, TASKS)[1].detach())
            torch.manual_seed(1)
            assert first != float(losses(student, TASKS)[1].detach()), f"{name} {losses.__name__}"


def test_the_seed_decides_loss_and_gradient() -> None:
    student = make_student(2, dropout_rate=0.3)
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        losses = fast_losses(student, TASKS)
        found.append((torch.stack(losses).detach(), gradients(student, losses)["shared.weight"]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])  # type: ignore[arg-type]
    assert not torch.equal(found[0][0], found[2][0])


def test_evaluation_has_no_dropout() -> None:
    student = make_student(2, dropout_rate=0.3).eval()
    state = torch.get_rng_state()
    compare(student, TASKS)
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------ from one encoding


def test_encoded_states_are_the_encoders(student: T5ForConditionalGeneration) -> None:
    encoded = encode(student, TASKS)
    rows = [row for task in TASKS for row in zip(task["input_ids"], task["attention_mask"], strict=True)]
    for (ids, mask), start, length in zip(rows, encoded.packing.starts, encoded.packing.lengths, strict=True):
        own = ids[mask.bool()][None]
        # float32 states of about 1, summed in an order that the processor's kernels choose
        torch.testing.assert_close(
            encoded.states[start : start + length], student.encoder(input_ids=own).last_hidden_state[0],
            rtol=1e-5, atol=5e-6,
        )  # fmt: skip


def test_log_likelihoods(student: T5ForConditionalGeneration) -> None:
    # row 0 twice in a row and once more, row 1 never, rows of both tasks
    rows = [0, 0, 2, 6, 3, 0, 6]
    targets = [[5, 1], [5, 9, 8, 1], [1], [7, 1], [3, 4, 5, 6, 7, 8, 9, 1], [2, 2, 1], [59, 1]]
    encoded = encode(student, TASKS)
    found = log_likelihoods(student, encoded, rows, targets)
    assert found.shape == (7,)
    sources = [ids[mask.bool()] for task in TASKS for ids, mask in zip(
        task["input_ids"], task["attention_mask"], strict=True)]  # fmt: skip
    expected = []
    for row, ids in zip(rows, targets, strict=True):
        labels = torch.tensor([ids])
        logits = student(input_ids=sources[row][None], labels=labels).logits
        logs = torch.log_softmax(logits[0], -1)
        expected.append(logs[range(len(ids)), ids].sum())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows_at_once", [1, 2, 1000])
def test_what_targets_begin_with_is_decoded_once(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 4 * 60 * rows_at_once)
    student = make_student().eval()
    seen: list[int] = []
    first: Any = student.get_submodule("decoder.block.0.layer.0.SelfAttention.q")
    first.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    # of row 0: start, 5, 5 9, 5 9 8 and 2; of row 2 the start alone, though row 0 has it too
    rows, targets = [0, 2, 0, 0, 0], [[5, 9, 1], [1], [5, 9, 8, 1], [2, 1], [5, 9, 1]]
    encoded = encode(student, TASKS)
    found = log_likelihoods(student, encoded, rows, targets)
    assert seen == [6]
    alone = [log_likelihoods(student, encoded, [row], [ids])[0] for row, ids in zip(rows, targets, strict=True)]
    assert seen[1:] == [len(ids) for ids in targets]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-5)


def test_log_likelihoods_by_hand() -> None:
    # a head of zeros: each token has the probability 1/60
    student = make_student()
    with torch.no_grad():
        student.lm_head.weight.zero_()
    found = log_likelihoods(student, encode(student, TASKS), [1, 0], [[4, 1], [4, 5, 1]])
    torch.testing.assert_close(found, -torch.tensor([60.0, 60.0]).log() * torch.tensor([2.0, 3.0]))


def test_a_start_token_of_its_own() -> None:
    student = make_student(decoder_start_token_id=7)
    compare(student, TASKS)
    encoded = encode(student, TASKS[:1])
    (losses,) = target_losses(student, TASKS[:1])
    likelihood = log_likelihoods(student, encoded, [0], [TASKS[0]["labels"][0][:3].tolist()])
    torch.testing.assert_close(likelihood[0], -losses[:3].sum())


def test_likelihoods_start_as_training_does() -> None:
    # as `prepare_decoder_input_ids_from_labels`, whatever `generate` is told to start with
    student = make_student()
    encoded = encode(student, TASKS[:1])
    ids = TASKS[0]["labels"][0][:3].tolist()
    expected = log_likelihoods(student, encoded, [0], [ids])
    student.generation_config.decoder_start_token_id = 7
    assert torch.equal(log_likelihoods(student, encoded, [0], [ids]), expected)


def test_the_parts_are_whole() -> None:
    # by hand: two tasks, a row without target in the first
    student = make_student(decoder_start_token_id=7)
    first, second = make_task([2, 3, 1], [2, 0, 1], seed=1), make_task([4], [3], seed=2)
    second["labels"][0, 1] = IGNORE_INDEX
    inputs, labels, packed, source_rows = fast_student.pack_targets(student, [first, second])
    a, b = first["labels"], second["labels"]
    assert labels.tolist() == [*a[0].tolist(), a[2, 0].item(), *b[0].tolist()]
    assert inputs.tolist() == [7, a[0, 0].item(), 7, 7, b[0, 0].item(), 0]
    assert source_rows == [0, 2, 3]
    assert packed.lengths == (2, 1, 3)
    ids, packing = fast_student.pack_sources([first, second])
    assert packing.lengths == (2, 3, 1, 4)
    rows = [*first["input_ids"], *second["input_ids"]]
    assert ids.tolist() == [token for row, n in zip(rows, packing.lengths, strict=True) for token in row[:n].tolist()]
