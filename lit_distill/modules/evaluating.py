"""Evaluation: losses and answers of each batch, and the metrics of a split."""

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_distill.batch import PADDING_ROW, TaskBatch, TaskInputs, join, take
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Answer, AnswerKey, Evaluation, Split
from lit_distill.evaluation.summaries import gather_answers, summarise
from lit_distill.modules.hooks import Hooks
from lit_distill.modules.training import Part, Training
from lit_distill.objectives import Step
from lit_distill.tasks import Row


class Evaluating(Training):
    """The validation, test and predict hooks of `DistillModule`."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluation: Evaluation | None = None
        """The last complete evaluation, sanity checks excluded."""
        self._warned: set[str] = set()
        self._forget_evaluation()

    def _forget_evaluation(self) -> None:
        """Reset the state, also after an interrupted evaluation."""
        self._eval_parts: list[Part] = []
        self._eval_sums: dict[str, Tensor] = {}
        self._eval_answers: list[Answer] = []
        self._eval_samples: list[TaskInputs] = []

    def on_validation_epoch_start(self) -> None:
        """Reset the state."""
        self._forget_evaluation()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Losses and answers of a batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Losses and answers of a batch."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of val."""
        self._finish_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of test."""
        self._finish_evaluation("test")

    def predict_step(self, batch: TaskBatch, batch_idx: int) -> list[Answer]:
        """Answers of a batch, with rationales.

        Rows are sorted by length, longest first; ``Answer.index`` is the row's number.
        """
        key = self.answer_key(cast(Split, getattr(self.trainer.datamodule, "predict_split", "predict")))  # type: ignore[attr-defined]
        return self.answers(self.step(batch), key, rationales=True)

    def answers(self, step: Step, key: AnswerKey, *, rationales: bool) -> list[Answer]:
        """The student's answer to each row of an evaluation batch, without rows that pad a distributed sampler.

        Args:
            step: an evaluation batch.
            key: the answers of its split.
            rationales: also generate the rationales, where they have a task of their own.
        """
        task = self.tasks[self.answer_task]
        index = step.batch[task.name]["index"].tolist()
        found = []
        for row, text in zip(index, self.generate_texts(step, task.name), strict=True):
            parsed = task.read(text)
            found.append(Answer(row, parsed.label or "", text, parsed.rationale))
        if rationales and self.rationale_task not in (None, task.name):
            self._add_rationales(found, step)
        if self.hparams["score_choices"] and key.choices is not None and task.needs_label and not task.uses_output:
            choices = [key.choices[max(row, 0)] for row in index]
            inputs = [key.inputs[max(row, 0)] for row in index]
            targets = [
                tuple(task.render(Row("", text, choice)) or "" for choice in own)
                for text, own in zip(inputs, choices, strict=True)
            ]
            scores = step.student.score(task.name, targets)
            for answer, own, likelihoods in zip(found, choices, scores, strict=True):
                answer.scored = own[likelihoods.index(max(likelihoods))] if own else None
        return [answer for answer in found if answer.index != PADDING_ROW]

    def generate_texts(self, step: Step, task: str) -> list[str]:
        """The generated text of each row of a task, see `generation_settings`."""
        index = step.batch[task].get("index")

        def process_logits(scores: Tensor, number: int, rows: Tensor) -> Tensor:
            return self.process_logits(task, scores, number, rows if index is None else index[rows])

        overridden = type(self).process_logits is not Hooks.process_logits
        settings = self.generation_settings(task)
        ids = step.student.generate(
            task,
            max_new_tokens=settings["max_new_tokens"],
            num_beams=settings["num_beams"],
            process_logits=process_logits if overridden else None,
        )
        return self.student.tokens.decode(ids)

    def _add_rationales(self, answers: Sequence[Answer], step: Step) -> None:
        """Add the generated rationales to this batch's answers."""
        task = cast(str, self.rationale_task)
        by_row = {answer.index: answer for answer in answers}
        texts = self.generate_texts(step, task)
        for row, text in zip(step.batch[task]["index"].tolist(), texts, strict=True):
            if row in by_row:
                by_row[row].rationale = self.tasks[task].read(text).rationale

    def _evaluate(self, batch: TaskBatch, split: Literal["val", "test"]) -> None:
        key = self.answer_key(split)
        every = self.hparams["evaluate_losses"] == "all"
        counted = dict(batch) if every else {self.answer_task: batch[self.answer_task]}
        step = self.step(counted)
        terms, counts = self.checked_terms(step), self.term_counts(counted)
        self._eval_parts.append(Part.of({name: term for name, term in terms.items() if counts.get(name, 1)}, batch))
        rationales = self.hparams["evaluate_rationales"]
        found = self.answers(step, key, rationales=rationales and every)
        if rationales and not every:
            self._add_rationales(found, self.step(dict(batch)))
        self._eval_answers += found
        self._sample_rationales(batch)
        if not every:
            terms = {self.answer_task: terms[self.answer_task]}
        for name, term in terms.items():
            number = counts.get(name, 1)
            if number == 0:
                # a term over nothing may be NaN
                term = torch.zeros_like(term)
            pair = torch.stack([term.detach().float() * number, torch.tensor(float(number), device=term.device)])
            self._eval_sums[name] = self._eval_sums.get(name, torch.zeros_like(pair)) + pair

    def _sample_rationales(self, batch: TaskBatch) -> None:
        """Generate the rationales of all sample rows at once, with the evaluation's last batch."""
        task, number = self.rationale_task, self.hparams["num_samples"]
        if task in (None, self.answer_task) or self.hparams["evaluate_rationales"] or self.trainer.sanity_checking:
            return
        inputs = batch[task]
        rows = [i for i, row in enumerate(inputs["index"].tolist()) if 0 <= row < number]
        last = self.trainer._evaluation_loop.batch_progress.is_last_batch
        if last and self.sharded and number and not rows and not self._eval_samples:
            # every rank must generate equally often, if only for a dummy row
            rows = [0]
        if rows:
            self._eval_samples.append(take(inputs, rows))
        if last and self._eval_samples:
            self._add_rationales(self._eval_answers, self.step({task: join(self._eval_samples)}))

    def _finish_evaluation(self, split: Literal["val", "test"]) -> None:
        sums, answers, parts = self._eval_sums, self._eval_answers, self._eval_parts
        self._forget_evaluation()
        names = sorted(sums)
        pairs = torch.stack([sums[name] for name in names]) if names else torch.zeros(0, 2, device=self.device)
        if self.trainer.world_size > 1:
            pairs = cast(Tensor, self.trainer.strategy.reduce(pairs, reduce_op="sum"))
            answers = gather_answers(answers, self.gather, self.device)
        else:
            # rows come longest first
            answers = sorted(answers, key=lambda answer: answer.index)
        if self.trainer.sanity_checking:
            return
        means = {name: total / count.clamp(min=1) for name, (total, count) in zip(names, pairs, strict=True)}
        measured = [name for name, (_, count) in zip(names, pairs, strict=True) if count > 0]
        metrics = {f"{name}_loss": float(means[name]) for name in measured}
        if self.hparams["evaluate_losses"] == "all" and measured:
            # linear, so a term of 0 is left out
            metrics["loss"] = float(self.total_loss(means))
        if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
            found = self.first_not_finite(parts, split)
            what = f"{split}/{bad[0]} is {metrics[bad[0]]}{found[3] if found else ''}"
            fitting = self.trainer.state.fn == "fit"
            raise UserError(
                f"step {self.trainer.global_step}: {what}; {self.last_good_checkpoint()}" if fitting else what
            )
        self._say_unmeasured(split, [name for name in names if name not in measured])
        key, settings = self.answer_key(split), self.hparams
        metrics |= summarise(answers, key, rationales=settings["evaluate_rationales"], intervals=split == "test")
        samples = [answer for answer in answers if answer.index < settings["num_samples"]]
        self.evaluation = Evaluation(split, metrics, samples, key, answers)
        for name, value in metrics.items():
            # every rank holds the same value; Lightning asks for the flag on any DDP run
            shown = split == "val" and name == "accuracy"
            self.log(f"{split}/{name}", value, sync_dist=True, batch_size=1, prog_bar=shown)

    def _say_unmeasured(self, split: Literal["val", "test"], names: Sequence[str]) -> None:
        """Warn once about terms without targets, and about targets longer than what is generated."""
        lines = []
        if names:
            keys = ", ".join(f"{split}/{name}_loss" for name in names)
            lines.append(f"{split} has no targets for {', '.join(names)}: no {keys}, {split}/loss is without")
        task, count = self.answer_task, getattr(self.trainer.datamodule, "longer_targets", None)  # type: ignore[attr-defined]
        limit = self.generation_settings(task)["max_new_tokens"]
        if count is not None and (longer := count(split, task, limit)):
            lines.append(
                f"{split}: {longer} targets of {task} are longer than the {limit} tokens that are generated at most,"
                " and such answers are cut (max_..._length sets them)"
            )
        for line in lines:
            if line not in self._warned:
                self._warned.add(line)
                rank_zero_info(line)
