"""The recipe that lit_distill is compared with: Distilling step-by-step as a user writes it with `Seq2SeqTrainer`.

After the published code (github.com/google-research/distilling-step-by-step, ``model_utils.py``): a collator that makes
a label batch and a rationale batch, a ``compute_loss`` with two forward passes, a ``prediction_step`` with two, and
today's fused AdamW. Nothing here knows of lit_distill's modules.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from operations import Texts
from options import Asked, Precision, Settings
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lit_distill.students import load_model

Feature = dict[str, Any]


class Features(Dataset[Feature]):
    """Tokenised rows under the names that the published code gives them (its ``aux_labels`` are the rationales)."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.features: list[Feature] = [
            {
                "input_ids": row["label.input_ids"][0],
                "labels": row["label.labels"][0] if row["label.labels"] else None,
                "rationale_input_ids": row["rationale.input_ids"][0],
                "rationale_labels": row["rationale.labels"][0] if row["rationale.labels"] else None,
            }
            for row in rows
        ]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, position: int) -> Feature:
        return self.features[position]


class RecipeCollator(DataCollatorForSeq2Seq):
    """Two batches, each padded to its longest row; a row without a rationale is only in the first."""

    def __call__(self, features: Sequence[Feature], return_tensors: str | None = None) -> dict[str, Any]:
        """``label`` and, where a row has one, ``rationale``."""
        labels = [{"input_ids": f["input_ids"], "labels": f["labels"]} for f in features]
        rationales = [
            {"input_ids": f["rationale_input_ids"], "labels": f["rationale_labels"]}
            for f in features
            if f["rationale_labels"] is not None
        ]
        batch = {"label": super().__call__(labels, return_tensors)}
        if rationales:
            batch["rationale"] = super().__call__(rationales, return_tensors)
        return batch


class EndAtGold(LogitsProcessor):
    """Makes each row end where its gold target does: the end token there, and not before.

    Args:
        lengths: tokens of each row's gold target, its end token included, ``(rows,)``.
        end: the id of the end token.
    """

    def __init__(self, lengths: Tensor, end: int) -> None:
        self.lengths = lengths
        self.end = end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Next-token scores ``(rows, vocabulary)`` after ``input_ids``, which begin with the decoder's start token."""
        ends = self.lengths <= input_ids.shape[1]
        scores = scores.masked_fill(ends[:, None], -torch.inf)
        scores[:, self.end] = torch.where(ends, 0.0, -torch.inf)
        return scores


class RecipeTrainer(Seq2SeqTrainer):
    """The published ``TaskPrefixTrainer``: label loss plus weighted rationale loss, each a forward pass of its own."""

    rationale_weight = 1.0
    order: Sequence[int] | None = None
    """Row positions to train on in this order, in place of the sampler's: what makes a measurement comparable."""
    asked = Asked()
    """Of an evaluation; the published code computes the rationale's loss only where it generates rationales."""
    max_new_tokens: Mapping[str, int] = {}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Eq. 1 of the paper; each loss is the mean over its target tokens."""
        outputs = {task: model(**inputs[task]) for task in inputs}
        loss = outputs["label"].loss
        if "rationale" in outputs:
            loss = loss + self.rationale_weight * outputs["rationale"].loss
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.order is None else self.order

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """The label's loss and text; the rationale's if asked for."""
        loss, texts, labels = super().prediction_step(
            model, inputs["label"], False, ignore_keys, **self._generation("label", inputs)
        )
        if "rationale" not in inputs or not self.asked.every_loss:
            return loss, (texts,), (labels,)
        if not self.asked.rationales:
            with torch.no_grad(), self.compute_loss_context_manager():
                explained = model(**self._prepare_inputs(inputs["rationale"])).loss
            return loss + self.rationale_weight * explained, (texts,), (labels,)
        explained, rationales, references = super().prediction_step(
            model, inputs["rationale"], False, ignore_keys, **self._generation("rationale", inputs)
        )
        return loss + self.rationale_weight * explained, (texts, rationales), (labels, references)

    def _generation(self, task: str, inputs: dict[str, Any]) -> dict[str, Any]:
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens[task], "do_sample": False}
        if self.asked.stop_at_gold:
            lengths = (inputs[task]["labels"] != -100).sum(dim=1).to(self.model.device)
            end = self.model.config.eos_token_id
            settings["logits_processor"] = LogitsProcessorList([EndAtGold(lengths, end)])
        return settings


class Recipe:
    """A student with its settings, which is trained or evaluated once in a process.

    Args:
        settings: the benchmark's.
        tokenizer: the student's.
        precision: of the trainer.
        folder: where a trainer may write.
    """

    def __init__(
        self, settings: Settings, tokenizer: PreTrainedTokenizerBase, precision: Precision, folder: str
    ) -> None:
        # the weights of both sides
        torch.manual_seed(settings.seed)
        self.student = load_model(settings.student, from_scratch=settings.from_scratch)
        self.tokenizer = tokenizer
        self.collator = RecipeCollator(tokenizer, model=self.student)
        self.settings: dict[str, Any] = {
            "per_device_train_batch_size": settings.batch_size,
            "per_device_eval_batch_size": settings.batch_size,
            "bf16": precision == "bf16",
            "use_cpu": settings.device == "cpu",
            "seed": settings.seed,
            "output_dir": folder,
        }

    def train(self, rows: Features, order: Sequence[int], on_step: Callable[[int], None]) -> None:
        """Train on rows in this order, ``batch_size`` of them a step.

        Args:
            rows: all rows.
            order: positions.
            on_step: called after each optimizer step with the number of steps done.
        """
        steps = len(order) // self.settings["per_device_train_batch_size"]
        trainer = self._trainer(max_steps=steps, train_dataset=rows)
        trainer.order = order
        trainer.add_callback(_OnStep(on_step))
        trainer.train()

    def grouped_order(self, rows: Features) -> list[int]:
        """The order of an epoch under the trainer's own sampling by length."""
        trainer = self._trainer(train_dataset=rows, train_sampling_strategy="group_by_length")
        return list(trainer._get_train_sampler())

    def evaluator(self, rows: Features, asked: Asked, max_new_tokens: Mapping[str, int]) -> Callable[[], Texts]:
        """A ready trainer's evaluation, of at most so many tokens a task: each call gives the texts of each row."""
        texts = Texts()

        def compute_metrics(found: EvalPrediction) -> dict[str, float]:
            columns = [self._decode(ids) for ids in found.predictions]
            gold = self._decode(found.label_ids[0])
            texts[:] = zip(*columns, strict=True)
            return {"accuracy": sum(a == b for a, b in zip(columns[0], gold, strict=True)) / len(gold)}

        trainer = self._trainer(eval_dataset=rows, predict_with_generate=True)
        trainer.compute_metrics = compute_metrics
        trainer.asked = asked
        trainer.max_new_tokens = max_new_tokens

        def evaluate() -> Texts:
            trainer.evaluate()
            return list(texts)

        return evaluate

    def _trainer(self, **arguments: Any) -> RecipeTrainer:
        data = {name: arguments.pop(name) for name in ("train_dataset", "eval_dataset") if name in arguments}
        settings = Seq2SeqTrainingArguments(
            learning_rate=5e-5,
            lr_scheduler_type="linear",
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            # the collator reads columns that the model's signature does not name
            remove_unused_columns=False,
            dataloader_pin_memory=not self.settings["use_cpu"],
            **self.settings,
            **arguments,
        )
        trainer = RecipeTrainer(
            self.student, settings, data_collator=self.collator, processing_class=self.tokenizer, **data
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _decode(self, ids: Any) -> list[str]:
        # rows of different lengths are joined with -100, which is no token
        ids[ids < 0] = self.tokenizer.pad_token_id
        decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in decoded]


class _OnStep(TrainerCallback):
    def __init__(self, on_step: Callable[[int], None]) -> None:
        self.on_step = on_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the optimizer, the schedule and the gradients' reset."""
        self.on_step(state.global_step)
