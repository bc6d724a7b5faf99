"""What is to be asked about each row, and the key of each question, by which it is asked once for good."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from lit_distill.annotation.demonstrations import Choose
from lit_distill.annotation.prompts import Fields, PromptTemplate, write_prompt
from lit_distill.annotation.record import Annotation, answer_schema, digest, input_hash
from lit_distill.questions import Layout, Prompt, Question, Sampling
from lit_distill.tasks import Row


@dataclass(frozen=True)
class Plan:
    """How every row is asked about."""

    template: PromptTemplate
    choose: Choose
    """The demonstrations of a row."""
    fields: Fields
    """The dataset's, for the templates."""
    layout: Layout
    teacher: str
    """The teacher's name."""
    teacher_settings: dict[str, Any]
    """What its answers depend on."""
    sampling: Sampling
    num_samples: int
    """Samples of each row."""
    until_agrees: int | None = None
    """Samples at most of a row on which the teacher has not agreed with the gold label yet; ``None``: no more."""
    structured: bool = False
    """Whether answers follow a JSON schema."""
    closed: Callable[[Row], Sequence[str]] = lambda example: example.choices or ()
    """The closed choices of a row."""
    selection: Any = None
    """How demonstrations are chosen, in plain values."""

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

    def prompt(self, example: Row) -> Prompt:
        """What the teacher is asked about a row."""
        return write_prompt(
            self.template, self.layout, self.fields, self.choose(example), example, structured=self.structured
        )

    def questions(
        self, example: Row, split: str, answered: Collection[bytes], agreeing: Collection[bytes]
    ) -> Iterator[list[tuple[Annotation, Question]]]:
        """The questions about a row that are not answered yet, round by round.

        Args:
            example: the row.
            split: where it is from.
            answered: keys of what is not to be asked again; looked at again for each round.
            agreeing: keys of the answers that agree with the gold label; looked at again, too.

        Yields:
            For each question the annotation that its answer goes into.
        """
        prompt = self.prompt(example)
        stop = self.template.stop if self.layout == "completion" else ()
        schema = answer_schema(self.closed(example)) if self.structured else None
        written = prompt if isinstance(prompt, str) else [[turn.role, turn.content] for turn in prompt]
        row = input_hash(example)
        # choices are part of a row even where its prompt shows none
        choices = [list(example.choices)] if example.choices else []
        # one hash of what all samples share, then a short one a sample
        shared = digest(
            split, example.id, example.input, written, self.teacher, self.settings, stop, schema, *choices, length=32
        )
        keys: list[str] = []

        def ask(sample: int) -> list[tuple[Annotation, Question]]:
            keys.append(digest(shared, sample, length=32))
            if bytes.fromhex(keys[-1]) in answered:
                return []
            annotation = Annotation(
                id=example.id,
                split=split,
                sample=sample,
                teacher=self.teacher,
                structured=self.structured,
                prompt=self.prompt_hash,
                settings=self.settings_hash,
                input=row,
                key=keys[-1],
            )
            sampling = replace(self.sampling, seed=self.sampling.seed + sample)
            return [(annotation, Question(prompt, sampling, stop, schema))]

        if first := [one for sample in range(self.num_samples) for one in ask(sample)]:
            yield first
        if self.until_agrees is None or example.label is None:
            return
        for sample in range(self.num_samples, self.until_agrees):
            if any(bytes.fromhex(key) in agreeing for key in keys):
                return
            if asked := ask(sample):
                yield asked


def shown(prompt: Prompt) -> str:
    """A prompt as it is looked at."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in prompt)
