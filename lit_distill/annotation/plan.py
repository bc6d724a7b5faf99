"""What is to be asked about each row, and the key of each question, by which it is asked only once."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from lit_distill.annotation.prompts import Choose, Fields, PromptTemplate, write_prompt
from lit_distill.annotation.record import Annotation, answer_schema, digest, input_hash
from lit_distill.questions import Layout, Prompt, Question, Sampling
from lit_distill.tasks import Row

Asked = tuple[Annotation, Question]
"""A question, and the annotation that its answer goes into."""


@dataclass(frozen=True)
class Plan:
    """How every row is asked about."""

    template: PromptTemplate
    choose: Choose
    fields: Fields
    layout: Layout
    teacher: str
    """The teacher's name."""
    teacher_settings: dict[str, Any]
    """What its answers depend on."""
    sampling: Sampling
    num_samples: int
    until_agrees: int | None = None
    """Samples at most of a row on which the teacher has not agreed with the gold label yet."""
    kind: str = "rationale"
    """What the prompt asks for beside the label."""
    structured: bool = False
    """Whether answers follow a JSON schema."""
    closed: Callable[[Row], Sequence[str]] = lambda row: row.choices or ()
    """The closed choices of a row."""
    selection: Any = None
    """How demonstrations are chosen, in plain values; ``None`` for the first ones."""

    @cached_property
    def prompt_hash(self) -> str:
        """Tells the template, its demonstrations and their choice from others."""
        return digest(self.template.hash, self.selection) if self.selection is not None else self.template.hash

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Teacher and sampling in plain values."""
        return {"teacher": self.teacher_settings, "sampling": asdict(self.sampling), "structured": self.structured}

    @cached_property
    def settings_hash(self) -> str:
        """Tells them from others."""
        return digest(self.settings)

    def prompt(self, row: Row) -> Prompt:
        """What the teacher is asked about a row."""
        return write_prompt(self.template, self.layout, self.fields, self.choose(row), row, structured=self.structured)

    def questions(
        self, row: Row, split: str, answered: Collection[bytes], agreeing: Collection[bytes]
    ) -> Iterator[list[Asked]]:
        """The questions about a row that are not answered yet, round by round.

        Args:
            row: the row.
            split: its split.
            answered: keys of what is not to be asked again; may grow between the rounds.
            agreeing: keys of the answers that agree with the gold label; may grow, too.
        """
        prompt = self.prompt(row)
        stop = self.template.stop if self.layout == "completion" else ()
        schema = answer_schema(self.closed(row)) if self.structured else None
        written = prompt if isinstance(prompt, str) else [[turn.role, turn.content] for turn in prompt]
        # choices are part of a row even where its prompt shows none; a kind was not always there
        more = [*([list(row.choices)] if row.choices else []), *([self.kind] if self.kind != "rationale" else [])]
        # one hash of what all samples share, then a short one a sample
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
    """A prompt as a dry run shows it."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in prompt)
