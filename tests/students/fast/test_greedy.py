"""Greedy decoding against `generate` of the same student."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, T5ForConditionalGeneration

from lit_distill.students.fast import greedy as greedy_module
from lit_distill.students.fast import products
from lit_distill.students.fast.greedy import FIRST_CAPACITY, STEPS_BEHIND, Decoder, HostCopy, greedy
from lit_distill.students.fast.packing import Packing
from lit_distill.students.fast.t5 import Encoded, encode
from tests.students.fast.examples import VARIANTS, make_student, make_task

SOURCES = [7, 1, 12, 5, 12, 3, 2, 20, 9]
TASK = make_task(SOURCES, [1] * 9, seed=6)
ROWS = list(range(9))


def make(seed: int, end: int | list[int] | None = 1, **changes: Any) -> T5ForConditionalGeneration:
    """A student that changes its mind: a small vocabulary, embeddings and heads far from uniform."""
    student = make_student(seed, **changes)
    student.eval()
    with torch.no_grad():
        student.lm_head.weight.mul_(1.0 if changes.get("tie_word_embeddings") else 6.0)
        for stack in (student.encoder, student.decoder):
            blocks: Any = stack.block
            blocks[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(20)
        blocks = student.decoder.block
        for block in blocks:
            block.layer[1].EncDecAttention.o.weight.mul_(6)
            block.layer[0].SelfAttention.o.weight.mul_(4)
    student.generation_config.eos_token_id = end
    return student


def ends_of(student: T5ForConditionalGeneration) -> list[int]:
    ends: Any = student.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def generated(
    student: T5ForConditionalGeneration, rows: Sequence[int], steps: int, processor: LogitsProcessor | None = None
) -> list[list[int]]:
    chosen = torch.tensor(rows)
    found: Any = student.generate(  # type: ignore[misc]
        input_ids=TASK["input_ids"][chosen],
        attention_mask=TASK["attention_mask"][chosen],
        max_new_tokens=steps,
        num_beams=1,
        do_sample=False,
        # transformers 5.23 gives its cache as many layers as the encoder has
        use_cache=len(student.decoder.block) <= len(student.encoder.block),
        logits_processor=LogitsProcessorList([] if processor is None else [processor]),
    )
    ends, cut = ends_of(student), []
    for row in found.tolist():
        tokens = row[1:]
        first = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        cut.append(tokens[:first])
    return cut


def ours(student: T5ForConditionalGeneration, rows: Sequence[int], steps: int, **rest: Any) -> list[list[int]]:
    with torch.no_grad():
        return greedy(student, encode(student, [TASK]), rows, steps, **rest)


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_the_tokens_of_generate(kind: str, seed: int) -> None:
    # several ends: rows stop at many different lengths
    student = make(seed, list(range(1, 12)), **VARIANTS[kind])
    assert ours(student, ROWS, 24) == generated(student, ROWS, 24)


def test_the_examples_are_worth_it() -> None:
    found = [row for seed in range(3) for row in ours(make(seed, list(range(1, 12))), ROWS, 24)]
    assert len({len(row) for row in found}) >= 6, "rows end at many steps"
    assert len({token for row in found for token in row}) >= 20


@pytest.mark.parametrize("seed", range(12))
def test_one_end(seed: int) -> None:
    # the usual id; its row of the head is the mean of others', so that it is likely now and then
    student = make(seed)
    with torch.no_grad():
        student.lm_head.weight[1] = student.lm_head.weight[5:9].sum(0)
    assert ours(student, ROWS, 18) == generated(student, ROWS, 18)


@pytest.mark.parametrize("end", [None, 1, [1], [3, 1], [1, 2, 3, 4, 5, 6]], ids=str)
def test_ends(end: int | list[int] | None) -> None:
    student = make(4, end)
    found = ours(student, ROWS, 20)
    assert found == generated(student, ROWS, 20)
    if end is None:
        assert [len(row) for row in found] == [20] * 9


@pytest.mark.parametrize("rows", [[3], [8, 0, 4], [2, 2, 2], [5, 1, 5, 7, 1, 0, 8, 3], ROWS[::-1]], ids=str)
def test_any_rows_in_any_order(rows: list[int]) -> None:
    student = make(2, list(range(1, 9)))
    found = ours(student, rows, 20)
    assert found == generated(student, rows, 20)
    every = ours(student, ROWS, 20)
    assert found == [every[row] for row in rows]


@pytest.mark.parametrize("steps", [1, 2, FIRST_CAPACITY - 1, FIRST_CAPACITY, FIRST_CAPACITY + 1, 40, 70])
def test_any_number_of_steps(steps: int) -> None:
    student = make(3, None)
    found = ours(student, ROWS, steps)
    assert {len(row) for row in found} == {steps}
    assert found == generated(student, ROWS, steps)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rows_that_leave_make_no_difference(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr(greedy_module, "WORTH_LEAVING", share)
    student = make(2, list(range(1, 9)))
    assert ours(student, ROWS, 40) == generated(student, ROWS, 40)


def test_rows_that_have_ended_cost_nothing() -> None:
    student = make(2, list(range(1, 9)))
    rows: list[int] = []
    blocks: Any = student.decoder.block
    handle = blocks[0].layer[0].SelfAttention.q.register_forward_hook(lambda m, i, o: rows.append(len(i[0])))
    lengths = sorted(len(row) for row in ours(student, ROWS, 40))
    handle.remove()
    assert len(rows) == lengths[-1]
    assert lengths[0] < lengths[-1]
    # three quarters of what is in the cache are still going, at least
    for step, number in enumerate(rows):
        going = sum(length > step for length in lengths)
        assert going <= number
        assert going > 0.75 * number or going == number


class Shifted(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return shifted(scores, input_ids.shape[1] - 1, torch.arange(len(scores)))


def shifted(scores: Tensor, step: int, rows: Tensor) -> Tensor:
    """Each row of scores is turned by its row's number and the step, and may not be what it was."""
    turned = torch.stack([own.roll(int(row) * 3 + step) for own, row in zip(scores, rows, strict=True)])
    turned[:, 40:] = float("-inf")
    return turned


@pytest.mark.parametrize("rows", [ROWS, [8, 0, 4, 0]], ids=str)
def test_processed_logits(rows: list[int]) -> None:
    student = make(2, list(range(1, 7)))
    found = ours(student, rows, 25, process_logits=shifted)
    assert found == generated(student, rows, 25, Shifted())
    assert found != ours(student, rows, 25)
    assert len({len(row) for row in found}) > 1, "rows leave, and the others keep their numbers"


def test_logits_are_processed_of_rows_that_are_still_going() -> None:
    student = make(2, list(range(1, 9)))
    steps: list[int] = []

    def look(scores: Tensor, step: int, rows: Tensor) -> Tensor:
        assert scores.shape == (len(rows), 60)
        assert scores.dtype == torch.float32
        assert len(set(rows.tolist())) == len(rows)
        steps.append(step)
        return scores

    found = ours(student, [4, 0, 8], 20, process_logits=look)
    assert steps == list(range(max(len(row) for row in found)))


def test_a_start_token_of_its_own() -> None:
    student = make(1, list(range(1, 9)), decoder_start_token_id=9)
    assert ours(student, ROWS, 12) == generated(student, ROWS, 12)


def test_the_first_token_by_the_plain_forward() -> None:
    student = make(5, None)
    found = ours(student, ROWS, 1)
    for row in ROWS:
        ids = TASK["input_ids"][row][TASK["attention_mask"][row].bool()][None]
        logits = student(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits
        assert found[row] == [int(logits[0, 0].argmax())]


def test_distances_beyond_the_last_bucket() -> None:
    student = make(6, None, relative_attention_num_buckets=8, relative_attention_max_distance=16)
    assert ours(student, ROWS, 60) == generated(student, ROWS, 60)


class Squared(nn.Linear):
    """Nothing like a matrix product."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).square() + 0.5


@pytest.mark.parametrize("names", ["k", "v", "kv"])
@pytest.mark.parametrize("kind", ["bias", "square"])
@pytest.mark.parametrize("rows", [ROWS, [8, 0, 4, 0]], ids=str)
def test_projections_of_the_sources_that_are_no_matrices(names: str, kind: str, rows: list[int]) -> None:
    student = make(2, list(range(1, 9)))
    before = ours(student, ROWS, 24)
    blocks: Any = student.decoder.block
    for block in blocks:
        attend = block.layer[1].EncDecAttention
        for name in names:
            old = getattr(attend, name)
            new = (nn.Linear if kind == "bias" else Squared)(old.in_features, old.out_features)
            new.weight = old.weight
            nn.init.normal_(new.bias, std=2.0)
            setattr(attend, name, new)
    found = ours(student, rows, 24)
    assert found == generated(student, rows, 24)
    if (names, kind) != ("k", "bias"):
        # a bias of keys moves all scores of a query alike
        assert ours(student, ROWS, 24) != before


def test_only_rows_that_are_asked_for_are_projected() -> None:
    student = make(2, list(range(1, 9)))
    blocks: Any = student.decoder.block
    attend = blocks[0].layer[1].EncDecAttention
    attend.k, tokens = Squared(attend.k.in_features, attend.k.out_features), []
    attend.k.register_forward_hook(lambda m, i, o: tokens.append(len(i[0])))
    ours(student, [8, 0, 4, 0], 24)
    assert tokens == [9 + 7 + 12]


class Late(HostCopy):
    """A copy that is never there before it is waited for."""

    waited: ClassVar[list[Tensor]] = []

    def arrived(self) -> bool:
        return False

    def wait(self) -> Tensor:
        self.waited.append(self._copy)
        return super().wait()


class Unknown(Late):
    """A copy of a tensor without data."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(torch.ones(tensor.shape, dtype=tensor.dtype))


@pytest.mark.parametrize("rows", [ROWS, [8, 0, 4, 0]], ids=str)
def test_ends_that_are_heard_of_late(monkeypatch: pytest.MonkeyPatch, rows: list[int]) -> None:
    student, steps = make(2, 1), []

    def end(scores: Tensor, step: int, numbers: Tensor) -> Tensor:
        steps.append(step)
        ended = step >= 2 * numbers
        return scores.masked_fill(ended[:, None] & (torch.arange(60) == 1), torch.inf)

    expected = ours(student, rows, 40, process_logits=end)
    longest = max(len(row) for row in expected)
    assert steps == list(range(longest))
    assert longest <= 17
    steps.clear()
    monkeypatch.setattr(greedy_module, "HostCopy", Late)
    # no rows leave, as on an accelerator
    monkeypatch.setattr(greedy_module, "WORTH_LEAVING", 0.0)
    assert ours(student, rows, 40, process_logits=end) == expected
    assert steps == list(range(longest + STEPS_BEHIND))


@pytest.mark.parametrize("steps", [3, 30])
@pytest.mark.parametrize("kind", ["v1.1", "original", "wide heads"])
def test_a_token_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, steps: int, kind: str) -> None:
    # a tensor on meta has no data, so that whatever needs some fails: item, tolist, nonzero, a copy to the host
    monkeypatch.setattr(greedy_module, "HostCopy", Unknown)
    waited: list[Tensor] = []
    monkeypatch.setattr(Unknown, "waited", waited)
    student = make(2, list(range(2, 9)), **VARIANTS[kind])
    nn.Module.to(student, "meta")
    encoded = Encoded([torch.empty(71, student.config.d_model, device="meta")], Packing(SOURCES, "meta"))
    found = greedy(student, encoded, ROWS, steps, lambda scores, step, numbers: scores.roll(1, 0))
    assert found == [[1] * steps] * 9
    # what is waited for is what was launched eight tokens before, and at the end the tokens
    assert [len(copy.shape) for copy in waited] == [1] * max(steps - STEPS_BEHIND, 0) + [2]
    with pytest.raises(NotImplementedError, match="meta"):
        torch.empty(3, device="meta").tolist()


# torch.compile makes an instance of an autograd function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_steps_of_one_capacity_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    student, graphs = make(3, None), []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        encoded = encode(student, [TASK])
        plain, compiled = (Decoder(student.decoder, encoded, ROWS) for _ in range(2))
        run: Any = torch.compile(compiled._step, backend=backend, fullgraph=True, dynamic=False)
        monkeypatch.setattr(compiled, "_step", run)
        for position in range(2 * FIRST_CAPACITY):
            ids = torch.arange(9) + position
            torch.testing.assert_close(compiled.step(ids), plain.step(ids), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2
    torch.compiler.reset()
