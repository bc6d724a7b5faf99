"""Evaluation: losses and answers of each batch, and the metrics of a split."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from lit_distill.batch import PADDING_ROW, TaskBatch, TaskInputs, join, pad_rows, take
from lit_distill.checkpoints import last_good_checkpoint
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Answer, AnswerKey, Evaluation, Split, gather_answers, summarise
from lit_distill.evaluation.metrics import judge
from lit_distill.modules.training import Training
from lit_distill.modules.voting import Vote, vote_paths
from lit_distill.objectives import Step
from lit_distill.students.base import ProcessLogits
from lit_distill.tasks import Parsed, Row, TeacherOutput, answer_task, rationale_task


@dataclass
class _Collected:
    """What an evaluation has found so far, on this rank."""

    sums: dict[str, Tensor] = field(default_factory=dict)  # term -> its sum over what it counts, and their number
    answers: list[Answer] = field(default_factory=list)
    exits: dict[int, list[Answer]] = field(default_factory=dict)  # decoder layer -> the answers after it
    samples: list[TaskInputs] = field(default_factory=list)  # rows whose rationales are generated at the end


class Evaluating(Training):
    """What `DistillModule` generates, and its validation, test and predict hooks."""

    evaluation: Evaluation | None = None
    """The last complete evaluation, sanity checks excluded."""
    vote: Vote | None = None
    _collected: _Collected

    def process_logits(self, task: str, scores: Tensor, step: int, rows: Tensor) -> Tensor:
        """Change the float32 scores of a task's next token, ``(rows, vocabulary)``; the identity by default.

        ``step`` is the number of tokens generated so far, ``rows`` are positions in the split.
        """
        return scores

    @property
    def answer_task(self) -> str:
        """The first task whose text contains the label."""
        return answer_task(self.tasks).name

    @property
    def rationale_task(self) -> str | None:
        """The task whose text contains the rationale: the answer task if it does, else the first that does."""
        return found.name if (found := rationale_task(self.tasks)) is not None else None

    @property
    def sampling_seed(self) -> int:
        """The seed of samples in evaluation: that of training, or without one that of the first process."""
        return self._seed if self._seed >= 0 else self._given_seed

    def generation_settings(self, task: str) -> dict[str, int]:
        """``generate``'s arguments for a task.

        The maximum length is that of `Task.max_length`; without training data the student's configuration says what
        the targets need.
        """
        exported = (getattr(self.student.model.config, "task_specific_params", None) or {}).get(task, {})
        known = self._target_limits.get(task, exported.get("max_new_tokens"))
        settings = self.hparams
        length = self.tasks[task].max_length(settings["max_label_length"], settings["max_rationale_length"], known)
        return {"max_new_tokens": length, "num_beams": settings["num_beams"]}

    def answer_key(self, split: Split) -> AnswerKey:
        """The data module's answer key of a split. Raises a ``UserError`` if the trainer has bare data loaders."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(datamodule, "answer_key"):
            raise UserError(
                "datamodule: evaluation needs the data's answers: pass a RationaleDataModule to the trainer"
            )
        found: AnswerKey = datamodule.answer_key(split)
        return found

    def on_validation_epoch_start(self) -> None:
        self._collected = _Collected()

    def on_validation_batch_start(self, batch: TaskBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """On an accelerator, choose the path of evaluation.

        On a CPU the default evaluates twice as many rows a second as plain with every student that was measured.
        """
        if self.device.type != "cpu":
            self.choose_path("evaluation", batch)

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Collect the losses and answers of a batch."""
        step, sums = self.step(batch), self._collected.sums
        counts = self.term_counts(batch)
        for name, term in self.loss_terms(step).items():
            number = counts.get(name, 1)
            # a term over nothing may be NaN
            total = term.detach().float() * number if number else torch.zeros_like(term, dtype=torch.float32)
            sums[name] = sums.get(name, 0.0) + torch.stack([total, total.new_tensor(number)])
        self.collect_answers(step, batch)

    def collect_answers(self, step: Step, batch: TaskBatch) -> None:
        """Generate and collect the answers to a batch."""
        key = self.answer_key(self._split)
        answers = self.answers(step, key, rationales=self.hparams["evaluate_rationales"])
        if self._split == "test":
            self._add_votes(answers, step, key)
        self._collected.answers += answers
        for layer in sorted({layer for objective in self.objectives for layer in objective.exits}):
            with self.student.exit_at(layer):
                self._collected.exits.setdefault(layer, []).extend(self.answers(step, key, rationales=False))
        self._sample_rationales(batch)

    def _sample_rationales(self, batch: TaskBatch) -> None:
        """Generate the rationales of all sample rows at once, with the evaluation's last batch."""
        task, number, samples = self.rationale_task, self.hparams["num_samples"], self._collected.samples
        # an answer that comes after a rationale has it already
        if (
            task in (None, self.answer_task, self.tasks[self.answer_task].after)
            or self.hparams["evaluate_rationales"]
            or self.trainer.sanity_checking
        ):
            return
        rows = [i for i, row in enumerate(batch[task]["index"].tolist()) if 0 <= row < number]
        last = self.trainer._evaluation_loop.batch_progress.is_last_batch
        if last and self.sharded and number and not rows and not samples:
            # every rank must generate equally often, if only for a dummy row
            rows = [0]
        if rows:
            samples.append(take(batch[task], rows))
        if last and samples:
            self._add_rationales(self._collected.answers, self.step({task: join(samples)}))

    def on_validation_epoch_end(self) -> None:
        """Reduce over the ranks, and log the metrics."""
        found, split = self._collected, self._split
        names = sorted(found.sums)
        sums = torch.stack([found.sums[name] for name in names]) if names else torch.zeros(0, 2, device=self.device)
        if self.trainer.world_size > 1:
            sums = cast(Tensor, self.trainer.strategy.reduce(sums, reduce_op="sum"))
        if self.trainer.sanity_checking:
            return
        counts = sums[:, 1]
        means = dict(zip(names, sums[:, 0] / counts.clamp(min=1), strict=True))
        metrics = {f"{name}_loss": float(means[name]) for name, count in zip(names, counts, strict=True) if count > 0}
        if metrics:
            # linear, so a term over nothing, which is 0, is left out
            metrics["loss"] = float(self.total_loss(means))
        if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
            good = f"; {last_good_checkpoint(self.trainer)}" if self.trainer.state.fn == "fit" else ""
            raise UserError(f"step {self.trainer.global_step}: {split}/{bad[0]} is {metrics[bad[0]]}{good}")
        metrics |= self.answer_metrics(metrics)
        if self.trainer.state.fn == "fit":
            self.teachers.on_validation_end(metrics)
            for objective in self.objectives:
                objective.on_validation_end(metrics)
        for name, value in metrics.items():
            # every rank holds the same value; Lightning asks for the flag on any DDP run
            shown = split == "val" and name == "accuracy"
            self.log(f"{split}/{name}", value, sync_dist=True, batch_size=1, prog_bar=shown)

    def answer_metrics(self, losses: Mapping[str, float]) -> dict[str, float]:
        """The metrics of the collected answers, which with the split's losses become the last `Evaluation`."""
        found, split = self._collected, self._split
        answers = gather_answers(found.answers, self)
        exits = {layer: gather_answers(own, self) for layer, own in found.exits.items()}
        key, settings = self.answer_key(split), self.hparams
        metrics = summarise(answers, key, rationales=settings["evaluate_rationales"], intervals=split == "test")
        for layer, own in exits.items():
            of_exit = summarise(own, key, rationales=False, intervals=split == "test")
            metrics |= {f"exit_{layer}_{name}": value for name, value in of_exit.items()}
        samples = [answer for answer in answers if answer.index < settings["num_samples"]]
        self.evaluation = Evaluation(split, dict(losses) | metrics, samples, key, answers)
        return metrics

    # test is evaluated as val is
    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    @property
    def _split(self) -> Split:
        return "test" if self.trainer.testing else "val"

    def predict_step(self, batch: TaskBatch, batch_idx: int) -> list[Answer]:
        """Answers of a batch, with rationales and the paths of a vote.

        Rows are sorted by length, longest first; ``Answer.index`` is the row's number.
        """
        key = self.answer_key(cast(Split, getattr(self.trainer.datamodule, "predict_split", "predict")))  # type: ignore[attr-defined]
        step = self.step(batch)
        found = self.answers(step, key, rationales=True)
        self._add_votes(found, step, key, keep_paths=True)
        return found

    def answers(self, step: Step, key: AnswerKey, *, rationales: bool) -> list[Answer]:
        """The student's answer to each row of an evaluation batch, without rows that pad a distributed sampler.

        ``rationales`` also generates the rationales, where they have a task of their own.
        """
        task = self.tasks[self.answer_task]
        index = step.batch[task.name]["index"].tolist()
        own, before, written = self.follow(step, task.name, key)
        found, ids = [], self.generate_ids(own, task.name)
        for row, first, last, text in zip(index, before, ids, self.student.tokens.decode(ids), strict=True):
            parsed = task.read(text)
            found.append(Answer(row, parsed.label or "", text, parsed.rationale, tokens=len(first) + len(last)))
        if task.after is not None and task.after == self.rationale_task:
            for answer, parsed in zip(found, written, strict=True):
                answer.rationale = parsed.rationale
        elif rationales and self.rationale_task not in (None, task.name):
            self._add_rationales(found, step)
        if self.hparams["score_choices"] and key.choices is not None and task.scores_labels:
            # a row that pads gets those of the first
            rows = [max(row, 0) for row in index]
            choices = [key.choices[row] for row in rows]
            targets = [
                tuple(task.target.format(label=choice, input=key.inputs[row]) for choice in key.choices[row])
                for row in rows
            ]
            scores = own.student.score(task.name, targets)
            for answer, of_row, likelihoods in zip(found, choices, scores, strict=True):
                answer.scored = of_row[likelihoods.index(max(likelihoods))] if of_row else None
        return [answer for answer in found if answer.index != PADDING_ROW]

    def follow(
        self,
        step: Step,
        task: str,
        key: AnswerKey,
        rows: Sequence[int] | None = None,
        then: ProcessLogits | None = None,
    ) -> tuple[Step, list[list[int]], list[Parsed]]:
        """A step in which a task's sources have what the student writes for the task that it comes after, if any.

        Returns that step, of these rows alone, the tokens that were generated for each, and what they say; without such
        a task the same step, and nothing. ``rows`` and ``then`` as in `generate_ids`.
        """
        own, index = self.tasks[task], step.batch[task]["index"]
        index = index if rows is None else index[list(rows)]
        if own.after is None:
            return step, [[] for _ in index], []
        ids, tokens = self.generate_ids(step, own.after, rows, then), self.student.tokens
        written = [self.tasks[own.after].read(text) for text in tokens.decode(ids)]
        # a row that pads gets the input of the first
        asked = [Row("", key.inputs[max(row, 0)], None) for row in index.tolist()]
        outputs = [TeacherOutput(one.rationale, one.label) for one in written]
        texts = [own.source(row, output) for row, output in zip(asked, outputs, strict=True)]
        sources = tokens.sources(texts, key.max_source_length).ids
        made = pad_rows(sources, [[] for _ in sources], int(tokens.tokenizer.pad_token_id))
        made["index"] = index
        return self.step({task: made}), ids, written

    def generate_texts(self, step: Step, task: str) -> list[str]:
        """The generated text of each row of a task."""
        return self.student.tokens.decode(self.generate_ids(step, task))

    def generate_ids(
        self, step: Step, task: str, rows: Sequence[int] | None = None, then: ProcessLogits | None = None
    ) -> list[list[int]]:
        """The generated tokens of each row of a task up to end-of-sequence, see `generation_settings`.

        ``rows`` are positions in the batch, also several times; ``then`` changes the scores after `process_logits`.
        """
        index = step.batch[task].get("index")
        if index is not None and rows is not None:
            index = index[list(rows)]

        def process_logits(scores: Tensor, number: int, own: Tensor) -> Tensor:
            if overridden:
                scores = self.process_logits(task, scores, number, own if index is None else index[own])
            return scores if then is None else then(scores, number, own)

        overridden = type(self).process_logits is not Evaluating.process_logits
        settings = self.generation_settings(task)
        return step.student.generate(
            task,
            rows=rows,
            max_new_tokens=settings["max_new_tokens"],
            num_beams=settings["num_beams"],
            process_logits=process_logits if overridden or then else None,
        )

    def _add_votes(self, answers: Sequence[Answer], step: Step, key: AnswerKey, *, keep_paths: bool = False) -> None:
        """Add the votes of several paths, if the module has them vote, to this batch's answers."""
        if self.vote is None:
            return
        found = dict(
            zip(step.batch[self.answer_task]["index"].tolist(), vote_paths(self, step, key, self.vote), strict=True)
        )
        for answer in answers:
            paths = found[answer.index]
            answer.vote = self.vote.winner(paths, judge(key.metric))
            answer.vote_tokens = sum(path["tokens"] for path in paths)
            answer.paths = paths if keep_paths else None

    def _add_rationales(self, answers: Sequence[Answer], step: Step) -> None:
        """Add the generated rationales to this batch's answers."""
        task = cast(str, self.rationale_task)
        by_row = {answer.index: answer for answer in answers}
        texts = self.generate_texts(step, task)
        for row, text in zip(step.batch[task]["index"].tolist(), texts, strict=True):
            if row in by_row:
                by_row[row].rationale = self.tasks[task].read(text).rationale
