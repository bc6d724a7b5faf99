"""The graph over packed tokens: here as plain Python, and once compiled."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lit_distill.batch import TaskInputs, targets_of
from lit_distill.students.fast import compiled, packed_graph
from lit_distill.students.fast.support import known
from lit_distill.students.seq2seq import CompiledPass, PackedPass
from tests.students.fast.examples import (
    BASE,
    TASKS,
    VARIANTS,
    as_student,
    check_gradients,
    checkpointed,
    gradients,
    make_student,
    make_task,
    packed,
    plain_losses,
)

# compiling imports parts of torch that warn of other parts
warns_of_itself = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "graph", lambda device: packed_graph.compute)
    monkeypatch.setattr(compiled, "why_not_compiled", lambda device: None)


def in_graph(model: Any, tasks: Any = TASKS, *, losses_only: bool = False) -> CompiledPass:
    student = as_student(model, fast="compiled")
    student.losses_only = losses_only
    own = student({str(number): task for number, task in enumerate(tasks)})
    assert isinstance(own, CompiledPass)
    return own


def compare(model: Any, tasks: Any = TASKS, bound: float = 1e-5, **settings: bool) -> None:
    """Losses and gradients are those of the plain model."""
    own = in_graph(model, tasks, **settings)
    ours, plain = [own.loss(task) for task in own.batch], plain_losses(model, tasks)
    torch.testing.assert_close([loss.detach() for loss in ours], [loss.detach() for loss in plain], rtol=bound, atol=0)
    check_gradients(gradients(model, ours), gradients(model, plain), bound)


@pytest.mark.parametrize("losses_only", [False, True])
@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.usefixtures("uncompiled")
def test_losses_and_gradients(kind: str, losses_only: bool) -> None:
    compare(make_student(1, **VARIANTS[kind]), losses_only=losses_only)


@pytest.mark.parametrize(
    "tasks",
    [
        TASKS[:1],
        [make_task([1], [1])],
        [make_task([3, 70], [2, 40]), make_task([5], [0])],
        [make_task([4] * 40, [3] * 40)],
        [make_task([20, 3, 9], [6, 0, 11], holes=0.4, extra=3), make_task([2], [1], extra=2)],
    ],
    ids=["one task", "one token", "long and without a target", "many rows", "holes and padding"],
)
@pytest.mark.usefixtures("uncompiled")
def test_batches(tasks: list[TaskInputs]) -> None:
    compare(make_student(1), tasks)


@pytest.mark.usefixtures("uncompiled")
def test_a_batch_without_targets_has_a_gradient_of_zero() -> None:
    model = make_student(1)
    own = in_graph(model, [make_task([4, 2], [0, 0])])
    own.loss("0").backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.usefixtures("uncompiled")
def test_states_are_those_of_the_packed_pass() -> None:
    model = make_student(1)
    own, right = in_graph(model), packed(model, TASKS)
    for task in own.batch:
        for layer in (0, 1, 2, -1):
            torch.testing.assert_close(own.hidden(task, layer), right.hidden(task, layer))
            torch.testing.assert_close(own.encoder(task, layer), right.encoder(task, layer))
        torch.testing.assert_close(own.logits(task), right.logits(task))
    found, expected = ([each.hidden("1", 1).square().mean(), each.encoder("0").mean()] for each in (own, right))
    check_gradients(gradients(model, found), gradients(model, expected), 1e-5)


@pytest.mark.usefixtures("uncompiled")
def test_losses_alone_have_no_states() -> None:
    model = make_student(1)
    own = in_graph(model, losses_only=True)
    assert own.loss("0").isfinite()
    with pytest.raises(RuntimeError, match="losses_only"):
        own.hidden("0", 1)
    with pytest.raises(RuntimeError, match="losses_only"):
        own.encoder("0")
    # an evaluation generates from the sources' states
    model.eval()
    own, right = in_graph(model, losses_only=True), packed(model, TASKS)
    torch.testing.assert_close(own.loss("1"), right.loss("1"))
    assert own.generate("1", max_new_tokens=4) == right.generate("1", max_new_tokens=4)
    assert own.score("1", [("a", "bc")] * 3) == [pytest.approx(row) for row in right.score("1", [("a", "bc")] * 3)]


@pytest.mark.parametrize("part", ["encoder", "decoder", "lm_head", "shared", "encoder.block.1.layer.0.SelfAttention.k"])
@pytest.mark.usefixtures("uncompiled")
def test_frozen_parts(part: str) -> None:
    model = make_student(1)
    model.get_submodule(part).requires_grad_(False)
    compare(model)


@pytest.mark.usefixtures("uncompiled")
def test_untied_input_embeddings() -> None:
    model = make_student(1)
    model.decoder.embed_tokens = deepcopy(model.decoder.embed_tokens)
    with torch.no_grad():
        model.decoder.embed_tokens.weight.add_(0.1)
    compare(model)


@pytest.mark.usefixtures("uncompiled")
def test_two_passes_of_a_step_have_gradients_of_their_own() -> None:
    model = make_student(1)
    first, second = in_graph(model).loss("0"), in_graph(model, TASKS[1:]).loss("0")
    check_gradients(gradients(model, [first, second]), gradients(model, plain_losses(model, TASKS)), 1e-5)


@pytest.mark.usefixtures("uncompiled")
def test_weights_that_change_are_read_anew() -> None:
    model = make_student(1)
    compare(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    compare(model)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    compare(model)
    model.lm_head = nn.Linear(BASE["d_model"], BASE["vocab_size"], bias=False)
    compare(model)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.usefixtures("uncompiled")
def test_bfloat16(whole: bool) -> None:
    exact = make_student(1)
    model = deepcopy(exact)
    if whole:
        nn.Module.to(model, torch.bfloat16)
        for module in model.modules():
            # as transformers loads it
            if hasattr(module, "wo"):
                module.wo.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        own = in_graph(model)
        losses = [own.loss(task) for task in own.batch]
    found = gradients(model, losses)
    for ours, right in zip(losses, plain_losses(exact, TASKS), strict=True):
        assert ours.dtype == torch.float32
        assert float(ours.detach()) == pytest.approx(float(right.detach()), rel=0.01)
    for name, parameter in model.named_parameters():
        gradient = found[name]
        assert gradient is not None
        assert gradient.dtype == parameter.dtype
        assert gradient.isfinite().all()


@pytest.mark.usefixtures("uncompiled")
def test_dropout_keeps_the_mean_and_depends_on_the_seed_alone() -> None:
    model = make_student(1, dropout_rate=0.2)
    tasks = [make_task([12, 9, 15, 7] * 4, [6, 9, 3, 8] * 4, seed=3)]

    def losses(make: Callable[[], Any]) -> Tensor:
        torch.manual_seed(5)
        with torch.no_grad():
            return torch.stack([make().loss("0") for _ in range(60)])

    ours, again, right = losses(lambda: in_graph(model, tasks)), losses(lambda: in_graph(model, tasks)), losses(
        lambda: packed(model, tasks)
    )  # fmt: skip
    assert ours.equal(again)
    assert len(set(ours.tolist())) == len(ours)
    # two samples of the same distribution: their means by their standard errors, their spreads within a third
    error = float((ours.var() / len(ours) + right.var() / len(right)).sqrt())
    assert abs(float(ours.mean() - right.mean())) < 4 * error
    assert float(ours.std() / right.std()) == pytest.approx(1, abs=0.35)
    model.eval()
    torch.testing.assert_close(in_graph(model, tasks).loss("0"), packed(model, tasks).loss("0"))


# ------------------------------------------------------------------------------------------------ what has no graph


def taken(model: Any, tasks: Any = TASKS) -> tuple[type, set[str]]:
    student = as_student(model, fast="compiled")
    return type(student({str(number): task for number, task in enumerate(tasks)})), student._warned


@pytest.mark.filterwarnings(
    # PEFT 0.21 asks transformers 5.23 by names that are going
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    "ignore:`gradient_checkpointing:FutureWarning",
)
@pytest.mark.usefixtures("uncompiled")
def test_an_adapter_takes_the_packed_path() -> None:
    model: Any = get_peft_model(make_student(1), LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q"]))
    kind, why = taken(model)
    assert kind is PackedPass
    assert why == {"encoder.block.0.layer.0.SelfAttention.q is a Linear, not torch's own without a bias"}


@pytest.mark.usefixtures("uncompiled")
def test_checkpointing_takes_the_packed_path() -> None:
    assert taken(checkpointed(make_student(1))) == (PackedPass, {"activation checkpointing is on"})


@pytest.mark.usefixtures("uncompiled")
def test_unequal_dropout_takes_the_packed_path() -> None:
    model: Any = make_student(1)
    model.encoder.dropout.p = 0.5
    assert taken(model) == (PackedPass, {"its layers have several rates of dropout"})


@pytest.mark.usefixtures("uncompiled")
def test_one_batch_of_rows_that_are_too_long_takes_the_packed_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_student(1)
    monkeypatch.setattr(packed_graph, "MOST_SCORES", 16 * 2 * 48**2)
    kind, why = taken(model, [make_task([49], [3])])
    assert kind is PackedPass
    assert why == {"for a batch, its rows are too long or too many for one graph"}
    assert taken(model, [make_task([48], [3])]) == (CompiledPass, set())


@pytest.fixture
def forgotten() -> Iterator[None]:
    compiled.why_not_compiled.cache_clear()
    yield
    compiled.why_not_compiled.cache_clear()


@warns_of_itself
@pytest.mark.usefixtures("forgotten")
def test_a_machine_that_compiles_nothing_takes_the_packed_path(monkeypatch: pytest.MonkeyPatch) -> None:
    # a compiler that there is not
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    kind, why = taken(make_student(1))
    assert kind is PackedPass
    [line] = why
    assert line.startswith("nothing can be compiled here: ")
    assert "C++ compiler" in line
    assert "\n" not in line


# ------------------------------------------------------------------------------------------------ sizes


def test_sizes_grow_by_few_steps() -> None:
    found = [packed_graph.round_up(number, 64, 8) * 64 for number in range(1, 20_000)]
    assert all(number <= size for number, size in enumerate(found, start=1))
    assert found == sorted(found)
    assert all(size <= max(number * 1.125 + 64, 128) for number, size in enumerate(found, start=1))
    assert len(set(found)) < 60
    assert [packed_graph.round_up(number, 16, 2) * 16 for number in (1, 33, 49, 64, 65, 97, 129)] == [
        32, 48, 64, 64, 96, 128, 192,
    ]  # fmt: skip


def test_a_changed_model_is_looked_at_again() -> None:
    model: Any = make_student(1)
    first = known(model)
    assert known(model) is first
    model.train()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert known(model) is first
    handle = model.encoder.register_forward_hook(lambda *rest: None)
    assert known(model).reason == "encoder has hooks"
    handle.remove()
    assert known(model).reason is None
    again = known(model)
    model.decoder.block[0].layer[0].dropout = nn.Dropout(0.1)
    assert known(model) is not again


# ------------------------------------------------------------------------------------------------ compiled


@warns_of_itself
@pytest.mark.slow  # g++ compiles for a minute
def test_compiled_once_for_batches_of_any_size() -> None:
    torch._dynamo.utils.counters.clear()
    model = make_student(1, **VARIANTS["one layer"])
    for tasks in (TASKS, [make_task([70, 3], [40, 7])], [make_task([4] * 40, [3] * 40)]):
        compare(model, tasks, losses_only=True)
    rows = targets_of(TASKS[0]).ends
    assert len(rows) == 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the first is that of `why_not_compiled`
