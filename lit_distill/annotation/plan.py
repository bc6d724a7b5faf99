"""The prompt and the questions about each row, and their keys, by which each is asked only once."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from lit_distill.annotation.prompts import GIVEN, Choose, Demonstration, Fields, PromptTemplate, written_answer
from lit_distill.annotation.record import Annotation, answer_schema, digest, input_hash
from lit_distill.questions import Layout, Message, Prompt, Question, Sampling
from lit_distill.tasks import Row


@dataclass(frozen=True)
class Plan:
    """The settings of all questions of a job."""

    template: PromptTemplate
    choose: Choose
    fields: Fields
    layout: Layout
    split: str = "train"  # of all rows
    teacher: str = ""  # the teacher's name
    teacher_settings: Mapping[str, Any] = field(default_factory=dict)  # settings that influence its answers
    sampling: Sampling = field(default_factory=Sampling)
    num_samples: int = 1
    until_agrees: int | None = None  # maximum samples of a row until the teacher agrees with the gold label
    kind: str = "rationale"  # what the prompt asks for besides the label
    structured: bool = False  # whether answers follow a JSON schema
    label_set: tuple[str, ...] = ()  # the closed choices of rows that have none of their own
    wrong_label: Callable[[Row], str | None] = lambda row: None  # the answer that the prompt may ask to argue for
    selection: Any = None  # how demonstrations are selected, in plain values; `None` for the first ones

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Teacher and sampling in plain values."""
        return {"teacher": self.teacher_settings, "sampling": asdict(self.sampling), "structured": self.structured}

    @cached_property
    def columns(self) -> dict[str, Any]:
        """The columns that tell its samples from others; prompt and settings are hashes."""
        prompt = self.template.hash if self.selection is None else digest(self.template.hash, self.selection)
        own = {"split": self.split, "teacher": self.teacher, "kind": self.kind}
        return {**own, "prompt": prompt, "settings": digest(self.settings)}

    def prompt(self, row: Row) -> Prompt:
        """The prompt for a row: a chat, whose turns replace the template's cues, or one text."""
        template = self.template
        form = " Give the answer as one JSON object with the keys rationale and label." if self.structured else ""
        instruction = (template.instruction.strip() + form).strip()
        shown = [(self._question(one.row), self._answer(one)) for one in self.choose(row)]
        # never reveal the gold label
        asked = self._question(replace(row, label=self.wrong_label(row) if "wrong" in template.needs else None))
        if self.layout == "chat":
            turns = [Message("system", instruction)] if instruction else []
            for question, answer in shown:
                turns += [Message("user", question), Message("assistant", answer)]
            return (*turns, Message("user", asked))
        parts = [instruction] if instruction else []
        parts += [f"{template.question_cue}{question}\n{template.answer_cue}{answer}" for question, answer in shown]
        parts.append(f"{template.question_cue}{asked}\n{template.answer_cue}".rstrip(" "))
        return "\n\n".join(parts)

    def _question(self, row: Row) -> str:
        return self.template.question.format_map(self.fields(row)).strip()

    def _answer(self, shown: Demonstration) -> str:
        if self.structured:
            return json.dumps({"rationale": shown.rationale, "label": shown.label}, ensure_ascii=False)
        return written_answer(self.template, self.fields, shown)

    def questions(self, row: Row, answered: Mapping[str, bool]) -> Iterator[list[tuple[Annotation, Question]]]:
        """The questions about a row, each with the sample that its answer goes into, in rounds.

        ``answered`` has the keys not to ask again, and whether the answer agrees with the gold label; it may grow
        between rounds.
        """
        prompt = self.prompt(row)
        stop = self.template.stop if self.layout == "completion" else ()
        schema = answer_schema(row.choices or self.label_set) if self.structured else None
        written = prompt if isinstance(prompt, str) else [[turn.role, turn.content] for turn in prompt]
        # choices are part of a row even if its prompt shows none; older keys have no kind
        more = [*([list(row.choices)] if row.choices else []), *([self.kind] if self.kind != "rationale" else [])]
        # one hash for what all samples share, then a short one for each sample
        asked_of = (self.teacher, self.settings, stop, schema)
        shared = digest(self.split, row.id, row.input, written, *asked_of, *more, length=32)
        given: dict[str, Any] = {name: self.fields(row)[name] for name in self.template.needs & GIVEN}
        common = Annotation(row.id, structured=self.structured, input=input_hash(row), **self.columns, **given)
        rounds = [range(self.num_samples)]
        if self.until_agrees is not None and row.label is not None:
            rounds += [range(sample, sample + 1) for sample in range(self.num_samples, self.until_agrees)]
        keys: list[str] = []
        for samples in rounds:
            if samples.start and any(answered.get(key) for key in keys):
                return
            asked = []
            for sample in samples:
                key = digest(shared, sample, length=32)
                keys.append(key)
                if key not in answered:
                    sampling = replace(self.sampling, seed=self.sampling.seed + sample)
                    asked.append((replace(common, sample=sample, key=key), Question(prompt, sampling, stop, schema)))
            if asked:
                yield asked
