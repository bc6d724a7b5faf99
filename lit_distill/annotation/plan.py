"""The questions about each row, and their keys, by which each is asked only once."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from lit_distill.annotation.prompts import Choose, Fields, PromptTemplate, write_prompt
from lit_distill.annotation.record import Annotation, answer_schema, digest, input_hash
from lit_distill.questions import Layout, Prompt, Question, Sampling
from lit_distill.tasks import Row

Asked = tuple[Annotation, Question]
"""A question and the annotation for its answer."""


@dataclass(frozen=True)
class Plan:
    """The settings of all questions of a job."""

    template: PromptTemplate
    choose: Choose
    fields: Fields
    layout: Layout
    teacher: str  # the teacher's name
    teacher_settings: dict[str, Any]  # settings that influence its answers
    sampling: Sampling
    num_samples: int
    until_agrees: int | None = None  # maximum samples of a row until the teacher agrees with the gold label
    kind: str = "rationale"  # what the prompt asks for besides the label
    structured: bool = False  # whether answers follow a JSON schema
    closed: Callable[[Row], Sequence[str]] = lambda row: row.choices or ()  # the closed choices of a row
    selection: Any = None  # how demonstrations are selected, in plain values; `None` for the first ones

    @cached_property
    def prompt_hash(self) -> str:
        """Hash of the template, its demonstrations and their selection."""
        return digest(self.template.hash, self.selection) if self.selection is not None else self.template.hash

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Teacher and sampling in plain values."""
        return {"teacher": self.teacher_settings, "sampling": asdict(self.sampling), "structured": self.structured}

    @cached_property
    def settings_hash(self) -> str:
        """Hash of `settings`."""
        return digest(self.settings)

    def prompt(self, row: Row) -> Prompt:
        """The prompt for a row."""
        return write_prompt(self.template, self.layout, self.fields, self.choose(row), row, structured=self.structured)

    def questions(
        self, row: Row, split: str, answered: Collection[bytes], agreeing: Collection[bytes]
    ) -> Iterator[list[Asked]]:
        """The unanswered questions about a row, in rounds.

        Args:
            row: the row.
            split: its split.
            answered: keys not to ask again; may grow between rounds.
            agreeing: keys of answers that agree with the gold label; may grow, too.
        """
        prompt = self.prompt(row)
        stop = self.template.stop if self.layout == "completion" else ()
        schema = answer_schema(self.closed(row)) if self.structured else None
        written = prompt if isinstance(prompt, str) else [[turn.role, turn.content] for turn in prompt]
        # choices are part of a row even if its prompt shows none; older keys have no kind
        more = [*([list(row.choices)] if row.choices else []), *([self.kind] if self.kind != "rationale" else [])]
        # one hash for what all samples share, then a short one for each sample
        shared = digest(split, row.id, row.input, written, self.teacher, self.settings, stop, schema, *more, length=32)
        hashed = input_hash(row)
        keys: list[str] = []

        def ask(sample: int) -> list[Asked]:
            keys.append(digest(shared, sample, length=32))
            if bytes.fromhex(keys[-1]) in answered:
                return []
            annotation = Annotation(
                id=row.id,
                split=split,
                sample=sample,
                teacher=self.teacher,
                kind=self.kind,
                structured=self.structured,
                prompt=self.prompt_hash,
                settings=self.settings_hash,
                input=hashed,
                key=keys[-1],
            )
            sampling = replace(self.sampling, seed=self.sampling.seed + sample)
            return [(annotation, Question(prompt, sampling, stop, schema))]

        if first := [one for sample in range(self.num_samples) for one in ask(sample)]:
            yield first
        if self.until_agrees is None or row.label is None:
            return
        for sample in range(self.num_samples, self.until_agrees):
            if any(bytes.fromhex(key) in agreeing for key in keys):
                return
            if asked := ask(sample):
                yield asked


def shown(prompt: Prompt) -> str:
    """A prompt as text, for a dry run."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in prompt)
