"""What the variants compute, against plain Hugging Face forwards; and that each costs one pass of the student."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

from lit_distill.batch import IGNORE_INDEX, TaskBatch
from lit_distill.modules import DistillModule, StepByStepModule
from lit_distill.students.fast import products
from tests.modules.batches import RowsData, collate, random_rows
from tests.modules.running import difference, gradients_of, make_trainer
from tests.runs import at_work_in, metric_rows, run, run_folders, small_model, small_trainer, toy_data
from tests.variants.hidden import HiddenMatch
from tests.variants.kl import KL
from tests.variants.smoothed import SmoothedModule

ROWS = random_rows(5, seed=21, without_rationale=(2,))
TASKS = ("label", "rationale")


def make(student: Path, kind: type[DistillModule] = StepByStepModule, **arguments: Any) -> Any:
    torch.manual_seed(7)
    return kind(student, from_scratch=True, dropout=0.0, **arguments)


def with_teacher(student: Path, teacher: Path, objective: Any, **arguments: Any) -> Any:
    return make(student, objectives=[objective], teachers={"big": {"model": str(teacher)}}, **arguments)


def loaded(folder: Path) -> T5ForConditionalGeneration:
    model: T5ForConditionalGeneration = T5ForConditionalGeneration.from_pretrained(folder).eval()
    return model


def plain(model: T5ForConditionalGeneration, batch: TaskBatch, what: str) -> Tensor:
    """Logits or last hidden states at all target tokens, by two padded forwards, in float64."""
    found = []
    for task in TASKS:
        inputs = batch[task]
        output = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["labels"],
            output_hidden_states=True,
        )  # fmt: skip
        own = output.logits if what == "logits" else output.decoder_hidden_states[-1]
        found.append(own[inputs["labels"] != IGNORE_INDEX])
    return torch.cat(found).double()


def kl_token_by_token(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over tokens of the sum over ids of p (log p - log q), each written out, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for own, other in zip(student, teacher, strict=True):
        p, q = other.exp() / other.exp().sum(), own.exp() / own.exp().sum()
        total = total + sum((p[i] * (p[i].log() - q[i].log()) for i in range(len(p))), torch.zeros(()))
    return total / len(student)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("chunk", [1, 2**26])
def test_kl_is_the_sum_over_ids_and_the_mean_over_tokens(
    student_folder: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, chunk: int
) -> None:
    monkeypatch.setattr("lit_distill.objectives.chunks.CHUNK_BYTES", chunk)
    module = with_teacher(student_folder, teacher_folder, KL(teacher="big"), fast=fast)
    batch = collate(ROWS, TASKS)
    found = module.loss_terms(module.step(batch))["kl"]
    found.backward()
    gradients = gradients_of(module.student.model)
    module.zero_grad()
    with torch.no_grad():
        teacher = plain(loaded(teacher_folder), batch, "logits")
    # the teacher's head has eight rows more
    expected = kl_token_by_token(plain(module.student.model, batch, "logits"), teacher[:, :64])
    expected.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert difference(gradients, gradients_of(module.student.model)) < 1e-5


def test_a_student_that_is_its_teacher_has_no_kl(weights_folder: Path) -> None:
    torch.manual_seed(7)
    objective = KL(teacher="same")
    module = StepByStepModule(weights_folder, objectives=[objective], teachers={"same": {"model": str(weights_folder)}})
    term = module.eval().loss_terms(module.step(collate(ROWS, TASKS)))["kl"]
    term.backward()
    assert abs(float(term.detach())) < 1e-6
    assert max(float(gradient.abs().max()) for gradient in gradients_of(module.student.model).values()) < 1e-6


def test_hidden_match_to_a_wider_teacher(student_folder: Path, teacher_folder: Path) -> None:
    torch.manual_seed(7)
    objective = HiddenMatch(teacher="big", student_width=16, teacher_width=24, tasks=["rationale"], weight=0.5)
    module = with_teacher(student_folder, teacher_folder, objective)
    batch = collate(ROWS, TASKS)
    terms = module.loss_terms(module.step(batch))
    rationales = sum(len(row["rationale"][1]) for row in ROWS if "rationale" in row)
    with torch.no_grad():
        ours, theirs = (plain(m, batch, "hidden") for m in (module.student.model, loaded(teacher_folder)))
        expected = F.mse_loss((ours.float() @ objective.widen.weight.t())[-rationales:], theirs.float()[-rationales:])
    assert float(terms["hiddenmatch"].detach()) == pytest.approx(float(expected), rel=1e-5)
    total = terms["label"] + terms["rationale"] + 0.5 * terms["hiddenmatch"]
    assert float(module.total_loss(terms).detach()) == pytest.approx(float(total.detach()))


def test_smoothed_module(student_folder: Path) -> None:
    module = make(student_folder, SmoothedModule, bonus=0.2)
    batch = collate(ROWS, TASKS)
    terms = module.loss_terms(module.step(batch))
    tokens = sum(len(row["label"][1]) for row in ROWS)
    with torch.no_grad():
        logits = plain(module.student.model, batch, "logits")[:tokens]
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert float(terms["entropy"].detach()) == pytest.approx(-0.2 * float(entropy), rel=1e-5)


@pytest.mark.parametrize("variant", ["kl", "hidden", "smoothed"])
def test_one_pass_of_each_model_a_micro_batch(
    student_folder: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    if variant == "smoothed":
        module = make(student_folder, SmoothedModule, fast=True)
    else:
        wide = HiddenMatch(teacher="big", student_width=16, teacher_width=24)
        both = [KL(teacher="big"), wide] if variant == "hidden" else [KL(teacher="big")]
        module = make(student_folder, objectives=both, teachers={"big": {"model": str(teacher_folder)}}, fast=True)
    seen: list[nn.Module] = []
    original = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        seen.append(self)
        return original(self, x)

    # so that each layer is called
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(nn.Linear, "forward", forward)
    make_trainer(max_epochs=1).fit(module, datamodule=RowsData(random_rows(8, seed=3), 2, TASKS))
    models = [module.student.model] if variant == "smoothed" else [
        module.student.model, module.teachers.loaded("big")[0].model
    ]  # fmt: skip
    for model in models:
        for path in ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"):
            assert seen.count(model.get_submodule(path)) == 4, "four micro-batches"


def test_variants_by_name_in_yaml(
    student_folder: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "method.yaml").write_text(f"""\
model:
  init_args:
    teachers:
      big: {{model: {teacher_folder}, dtype: bfloat16}}
    objectives:
      - class_path: tests.variants.kl.KL
        init_args: {{teacher: big, weight: 0.5}}
      - class_path: tests.variants.hidden.HiddenMatch
        init_args: {{teacher: big, student_width: 16, teacher_width: 24}}
""")
    with at_work_in(tmp_path, monkeypatch):
        model = small_model(student_folder)
        run("fit", model, "--config=method.yaml", toy_data(), small_trainer(2))
        [folder] = run_folders()
        steps = [row for row in metric_rows(folder) if "train/kl_loss" in row]
        assert len(steps) == 2
        for row in steps:
            parts = (float(row[f"train/{name}_loss"]) for name in ("label", "rationale", "kl", "hiddenmatch"))
            label, rationale, kl, hidden = parts
            assert float(row["train/loss"]) == pytest.approx(label + rationale + 0.5 * kl + hidden, rel=1e-5)
        again = StepByStepModule.load_from_checkpoint(folder / "checkpoints" / "last.ckpt")
        assert [(each.name, each.weight) for each in again.objectives] == [("kl", 0.5), ("hiddenmatch", 1.0)]
        state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(again.objectives[1].widen.weight, state["objectives.1.widen.weight"])  # type: ignore[union-attr, arg-type]
        assert all(name.startswith(("student.model.", "objectives.1.")) for name in state)
        exported = T5ForConditionalGeneration.from_pretrained(folder / "student")
        assert exported.num_parameters() == again.student.model.num_parameters()


@pytest.mark.parametrize("name", ["kl", "hidden", "smoothed"])
def test_a_variant_is_20_lines_at_most(name: str) -> None:
    lines = [line for line in (Path(__file__).parent / f"{name}.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 20
