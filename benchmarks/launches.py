"""How many kernels does a training step launch on a GPU, how often does it wait for one, and how long does Python take?

    python benchmarks/launches.py --student google/t5-v1_1-base --batch_size 64 --data_dir data

Needs no GPU. The plain and the packed path run on PyTorch's meta device, in float32: every operation that is no view is
one launch. The compiled path, in bf16, is what inductor's scheduler leaves after fusing by the rules of its Triton
kernels, and what runs around the graph, counted as before. A synchronisation is whatever reads a value of the device,
or copies between it and the host without `non_blocking`. Host milliseconds are those of a step of the same layers with
tiny widths on the CPU, on one thread, under the real trainer: of the eager paths with their tiny kernels, of the
compiled one without its graph, which a GPU replays as a CUDA graph. The last line is a JSON object.

Without `--data_dir` rows have lengths as CQA's. An evaluated row is its share of a forward pass with the losses.
"""

import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config
from lightning.pytorch.callbacks import LambdaCallback
from options import OneLineParser, lacks_weights, one_line_errors
from quiet import quiet
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import ir, scheduler
from torch.nn.utils import clip_grad
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lit_distill import students
from lit_distill.batch import IGNORE_INDEX, TaskBatch, TaskInputs, pad_rows, remember_rows, take
from lit_distill.errors import UserError
from lit_distill.modules import StepByStepModule
from lit_distill.modules.window import Window
from lit_distill.students.fast import compiled, packed_graph
from lit_distill.students.seq2seq import PathName
from lit_distill.students.sharding import deferred

PATHS: dict[str, PathName] = {"plain": "plain", "fast": "packed", "compiled": "compiled"}
"""Name in the figures -> path."""

HOST_STEPS = 12
"""Steps whose host time is measured, after a third as many that do not count."""

TINY = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2}
"""Widths of which a step takes hardly more than Python does."""

TINY_VOCABULARY = 512

TINY_ROWS = 4
"""Rows of a batch of which the same is true; the host's work depends on the number of layers."""

BACKWARD_ATTENTION = 3
"""Kernels of the fused attention's backward pass: the sums of the output by its gradient, zeros, and the gradients."""

META = torch.device("meta")


# ------------------------------------------------------------------------------------------------ rows


def drawn_batch(rows: int, seed: int, vocabulary: int) -> TaskBatch:
    """Rows of random ids with lengths as CQA's: sources of about 40 tokens, labels of 3, rationales of 30."""
    draw = random.Random(seed)  # noqa: S311 - no secret

    def ids(mean: float, spread: float) -> list[int]:
        length = max(1, round(draw.lognormvariate(math.log(mean), spread)))
        return [draw.randrange(2, min(vocabulary, 100)) for _ in range(length)] + [1]

    sources = [ids(38, 0.25) for _ in range(rows)]
    return {
        "label": pad_rows(sources, [ids(2, 0.4) for _ in sources]),
        "rationale": pad_rows(sources, [ids(28, 0.35) for _ in sources]),
    }


def real_batch(student: str, data_dir: str, rows: int, seed: int) -> TaskBatch:
    """The first training batch of CQA."""
    from lit_distill.data import CQADataModule

    tasks = StepByStepModule.all_tasks({})
    data = CQADataModule(data_dir=data_dir, tokenizer=student, batch_size=rows, tasks=tasks, seed=seed)
    data.prepare_data()
    data.setup("fit")
    batch: TaskBatch = next(iter(data.train_dataloader()))
    return batch


def sent(batch: TaskBatch, device: torch.device) -> TaskBatch:
    """A batch as the data module sends it to a device."""
    moved: Any = {task: {name: own.to(device) for name, own in inputs.items()} for task, inputs in batch.items()}  # type: ignore[attr-defined]
    remember_rows(batch, moved)
    return moved


# ------------------------------------------------------------------------------------------------ counting operations

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "alias"}
"""Operations without a kernel, beside views."""


class Launches(TorchDispatchMode):
    """Counts the kernels of operations on the meta device, and what would wait for a GPU there."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        given = [one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        on_device = any(one.is_meta for one in given)
        if on_device and name in ("_local_scalar_dense", "is_nonzero", "equal"):
            self.waits[name] += 1
            return 1
        if on_device and (name == "nonzero" or (name in ("index", "index_put", "_index_put_impl") and _by_mask(args))):
            self.waits[name] += 1
            self.kernels["nonzero"] += 1
            if name != "nonzero":
                self.kernels[name] += 1
            return _masked(name, args)
        if on_device and str(kwargs.get("device", "meta")) == "cpu" and name == "_to_copy":
            self._count_copy(kwargs.get("non_blocking", False))
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        found = func(*args, **kwargs)
        made = [one for one in torch.utils._pytree.tree_leaves(found) if isinstance(one, Tensor)]
        if not (on_device or any(one.is_meta for one in made)):
            return found
        if name in ("_to_copy", "copy") and any(not one.is_meta for one in given):
            blocking = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            self._count_copy(not blocking)
        elif name.startswith("_foreach"):
            lists = [one for one in args if isinstance(one, list | tuple) and one and isinstance(one[0], Tensor)]
            self.kernels[name] += foreach_launches([one.numel() for one in lists[0]], len(lists))
        elif name not in _FREE and not _is_view(func):
            self.kernels[name] += 1
        return found

    def _count_copy(self, non_blocking: bool) -> None:
        self.kernels["copy between host and device"] += 1
        if not non_blocking:
            self.waits["copy between host and device"] += 1


def _is_view(func: Any) -> bool:
    return any(found.alias_info is not None and not found.alias_info.is_write for found in func._schema.returns)


def _by_mask(args: Any) -> bool:
    return any(one is not None and one.dtype == torch.bool for one in args[1])


def _masked(name: str, args: Any) -> Tensor:
    """As if every element was chosen: the number of kernels is the same."""
    if name == "nonzero":
        return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long, device=META)
    if name != "index":
        chosen: Tensor = args[0]
        return chosen
    (mask,) = [one for one in args[1] if one is not None]
    return args[0].new_empty(mask.numel(), *args[0].shape[mask.dim() :])


def foreach_launches(sizes: Sequence[int], depth: int) -> int:
    """Kernels of one operation over lists of tensors: 320 blocks of 65,536 elements each, and so many tensors.

    The limits of ``multi_tensor_apply`` (ATen/native/cuda/MultiTensorApply.cuh).
    """
    most = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}[min(depth, 5)]
    launches = tensors = blocks = 0
    for size in sizes:
        tensors += 1
        for _ in range(-(-size // 65_536)):
            blocks += 1
            if blocks == 320:
                # the rest of this tensor is in the next one
                launches, tensors, blocks = launches + 1, 1, 0
        if tensors == most and blocks:
            launches, tensors, blocks = launches + 1, 0, 0
    return launches + bool(blocks)


def optimizer_launches(sizes: Sequence[int], *, skips: bool) -> int:
    """Kernels of a fused AdamW: the steps' counters, the update of four lists, and the counters of a skipped step."""
    counters = [1] * len(sizes)
    return foreach_launches(counters, 1) + foreach_launches(sizes, 4) + (foreach_launches(counters, 2) if skips else 0)


# ------------------------------------------------------------------------------------------------ eager


@contextmanager
def without_graph(losses: int) -> Iterator[None]:
    """The compiled path with a graph that does nothing."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *weights: Tensor) -> Tensor:
            ctx.save_for_backward(*weights)
            return weights[0].new_empty(losses, dtype=torch.float32)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.empty_like(weight) for weight in ctx.saved_tensors)

    def graph(device: str) -> Callable[..., packed_graph.Outputs]:
        return lambda design, weights, *rest: packed_graph.Outputs(Nothing.apply(*weights), [], [])  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        stack.enter_context(patch.object(compiled, "graph", graph))
        stack.enter_context(patch.object(compiled, "why_not_compiled", lambda device: None))
        yield


@contextmanager
def autocast_of_meta(*, enabled: bool) -> Iterator[None]:
    """Let the meta device have autocast: on, as far as it is asked for its state alone, or off."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda device=None: enabled))
        stack.enter_context(patch.object(torch, "get_autocast_dtype", lambda device=None: torch.bfloat16))
        stack.enter_context(patch.object(torch, "autocast", lambda *rest, **named: nullcontext()))
        yield


def eager_counts(student: str, batch: TaskBatch, path: PathName) -> tuple[Launches, int, int]:
    """Operations of a training step, kernels of its optimizer, and kernels of a forward pass in evaluation."""
    with deferred():
        module = StepByStepModule(student, from_scratch=True, fast=path)
    module.student.losses_only = True
    # what Lightning gives a module
    module._device = META  # type: ignore[assignment]
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=1, precision_plugin=SimpleNamespace(scaler=None), global_step=0, accumulate_grad_batches=1,
        training=True, estimated_stepping_batches=1, current_epoch=0,
        strategy=SimpleNamespace(model=None),
    )  # fmt: skip
    module.log = lambda *rest, **named: None  # type: ignore[method-assign]
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = AdamW(parameters)
    # a fused one cannot be built on the meta device
    optimizer.defaults["fused"] = True
    moved = sent(batch, META)
    counts = module.term_counts(batch)
    module.train()
    # a GPU has this
    with patch.object(clip_grad, "_has_foreach_support", lambda *rest: True), Launches() as step:
        window = Window(0, [counts], len(batch["label"]["labels"]), 0)
        module.window, module._window_weights, module._window_terms = window, module.window_weights(window), {}
        module.training_step(moved, 0).backward()
        module.on_before_optimizer_step(optimizer)
        module.configure_gradient_clipping(optimizer, 1.0, "norm")
    module.eval()
    with Launches() as evaluation, torch.no_grad():
        module.loss_terms(module.step(moved))
    sizes = [parameter.numel() for parameter in parameters]
    return step, optimizer_launches(sizes, skips=path == "compiled"), evaluation.kernels.total()


# ------------------------------------------------------------------------------------------------ compiled


def graph_counts(student: str, batch: TaskBatch, precision: str) -> dict[str, int]:
    """Kernels of the compiled path's graphs, as inductor schedules them: forward, backward, and in evaluation."""
    network = students.load(student, from_scratch=lacks_weights(student)).network
    counts: list[int] = []

    def count(self: scheduler.Scheduler) -> None:
        counts.append(sum(map(kernels_of, self.nodes)))

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, rate: float) -> Tensor:
        # the operation that a GPU takes
        bias = bias.expand(*q.shape[:3], k.shape[2])
        fused: Any = torch.ops.aten._scaled_dot_product_efficient_attention
        found: Tensor = fused(q, k, v, bias, torch.is_grad_enabled(), rate, False, scale=1.0)[0]
        return found

    tasks: list[TaskInputs] = list(batch.values())
    with ExitStack() as stack:
        for place, name, value in (
            (packed_graph, "_attention", attention),
            (scheduler.Scheduler, "codegen", count),
            (torch._dynamo, "maybe_mark_dynamic", lambda *rest: None),
        ):
            stack.enter_context(patch.object(place, name, value))
        stack.enter_context(
            torch._inductor.config.patch(  # type: ignore[attr-defined]
                # what the kernels are fused by, though none are compiled; and as a GPU's lowering fuses them
                cpu_backend="triton",
                force_pointwise_cat=True,
                graph_partition=False,
                fx_graph_cache=False,
            )
        )
        stack.enter_context(
            torch._functorch.config.patch(  # type: ignore[attr-defined]
                force_non_lazy_backward_lowering=True, enable_autograd_cache=False
            )
        )
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"))
        for training in (True, False):
            network.train(training)
            with torch.set_grad_enabled(training):
                try:
                    compiled.run(network, tasks, states=not training)
                except NameError:
                    # the program calls no kernels, and then misses what they would have made
                    continue
                raise RuntimeError("a graph without kernels ran")
    forward, backward, evaluation = counts
    return {"forward": forward, "backward": backward, "evaluation": evaluation}


def kernels_of(node: Any) -> int:
    """Kernels of a scheduled node."""
    if isinstance(node, scheduler.NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return 0
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        return BACKWARD_ATTENTION if "attention_backward" in str(getattr(node.node, "op_overload", "")) else 1
    # a sum over many tokens into few places is split over the GPU, and needs a second kernel
    sums = [part.group[1] for part in node.get_nodes() if part.is_reduction()]
    return 1 + any(int(places) < 2048 <= int(many) for places, many in sums)


# ------------------------------------------------------------------------------------------------ host


def replay(graph: Any, example: Any) -> Any:
    """A compiler whose programs give zeros of the right shapes: what a CUDA graph's replay leaves to Python."""
    outputs = [one for node in graph.graph.nodes if node.op == "output" for one in node.args[0]]
    values = [one.meta["val"] if isinstance(one, torch.fx.Node) else one for one in outputs]
    made: list[Any] = []

    def run(args: list[Any]) -> list[Any]:
        if not made:
            made.extend(
                torch.zeros(tuple(map(int, one.shape)), dtype=one.dtype) if isinstance(one, Tensor) else one
                for one in values
            )
        args.clear()
        return made

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _few_rows(inputs: TaskInputs) -> TaskInputs:
    few = take(inputs, range(TINY_ROWS))
    for ids in (few["input_ids"], few["labels"]):
        ids.masked_scatter_(ids > 1, ids[ids > 1] % (TINY_VOCABULARY - 2) + 2)
    return few


def host_ms(student: str, batch: TaskBatch, path: PathName) -> float:
    """Milliseconds of a core for a training step with tiny widths."""
    import lightning.pytorch as pl

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tiny"
        students.load_tokenizer(student).save_pretrained(folder)
        config = json.loads((Path(student) / "config.json").read_text()) | TINY
        (folder / "config.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        module = StepByStepModule(folder, from_scratch=True, fast=path, num_samples=0)
        module.student.network.resize_token_embeddings(TINY_VOCABULARY)
        if path == "compiled":
            backend = aot_autograd(fw_compiler=replay, bw_compiler=replay)
            program = torch.compile(packed_graph.compute, backend=backend, fullgraph=True)
            stack.enter_context(patch.object(compiled, "graph", lambda device: program))
            stack.enter_context(patch.object(compiled, "why_not_compiled", lambda device: None))
            stack.enter_context(patch.object(torch._dynamo, "maybe_mark_dynamic", lambda *rest: None))
        rows = {task: _few_rows(inputs) for task, inputs in batch.items()}
        marks: list[float] = []
        # after the optimizer and the schedule
        clock = LambdaCallback(on_train_batch_end=lambda *rest: marks.append(time.process_time()))
        count = HOST_STEPS + HOST_STEPS // 3
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=count, gradient_clip_val=1.0, logger=False, callbacks=[clock],
            precision="bf16-mixed" if path == "compiled" else "32-true", enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader([rows] * count, batch_size=None))
    times = [after - before for before, after in pairwise(marks)]
    return 1000 * statistics.median(times[-HOST_STEPS:])


# ------------------------------------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``argv`` are its arguments, by default the process's."""
    parser = OneLineParser(prog="launches", description=__doc__)
    parser.add_argument("--student", required=True, help="folder of a T5, with weights or without")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--data_dir", help="folder that holds the datasets' folders, for CQA's own rows")
    parser.add_argument("--precision", choices=["32", "bf16"], default="bf16", help="of the compiled path")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    # sizes as they are: symbols for them would take minutes to trace
    sizes = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    with one_line_errors(parser.prog), quiet(1), sizes:
        if arguments.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {arguments.batch_size}")
        if not (Path(arguments.student) / "config.json").is_file():
            raise UserError(f"student: {arguments.student} is no folder with a config.json")
        figures = measured(arguments)
    print(json.dumps(figures))


def measured(arguments: Any) -> dict[str, dict[str, Any]]:
    """The figures of each path, which are printed as well."""
    student, rows = arguments.student, arguments.batch_size
    if arguments.data_dir is None:
        batch = drawn_batch(rows, arguments.seed, 100)
    else:
        batch = real_batch(student, arguments.data_dir, rows, arguments.seed)
    tokens = [int((inputs[name] != padding).sum()) for inputs in batch.values() for name, padding in (
        ("attention_mask", 0), ("labels", IGNORE_INDEX))]  # fmt: skip
    print(f"{rows} rows: source and target tokens of labels {tokens[0]:,} and {tokens[1]:,}, of rationales "
          f"{tokens[2]:,} and {tokens[3]:,}")  # fmt: skip
    figures: dict[str, dict[str, Any]] = {}
    for name, path in PATHS.items():
        on = path == "compiled" and arguments.precision == "bf16"
        with without_graph(sum(tokens[1::2])), autocast_of_meta(enabled=on):
            step, optimizer, evaluation = eager_counts(student, batch, path)
        found: dict[str, Any] = {"optimizer": optimizer}
        if path == "compiled":
            graphs = graph_counts(student, batch, arguments.precision)
            found |= {"forward": graphs["forward"], "backward": graphs["backward"]}
            evaluation += graphs["evaluation"]
        found["around" if path == "compiled" else "forward_and_backward"] = step.kernels.total()
        found = {"launches": sum(found.values()), **found, "launches_an_evaluated_row": evaluation / rows}
        found |= {"synchronisations": step.waits.total(), "waits": dict(step.waits)}
        found["host_ms"] = round(host_ms(student, batch, path), 2)
        figures[name] = found
        print(f"{name:<9} {json.dumps(found)}", flush=True)
        print(f"{'':<9} most: {dict(step.kernels.most_common(12))}", file=sys.stderr, flush=True)
    return figures


if __name__ == "__main__":
    main()
