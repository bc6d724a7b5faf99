"""Labels, likelihoods and rationales of rows."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from lit_distill.exporting.predictor import Predictor
from lit_distill.serving.schema import Prediction
from lit_distill.tasks import Parsed, Task, answer_task, rationale_task


class Question(NamedTuple):
    """One input of a request."""

    input: str
    rationale: bool = False  # whether a rationale is wanted


def answer(predictor: Predictor, questions: Sequence[Question]) -> list[Prediction]:
    """The student's prediction for each question, all in the engine's batches."""
    task, inputs = answer_task(predictor.tasks), [question.input for question in questions]
    sources = predictor.sources(inputs, task.name)
    ids = predictor.engine.generate(
        sources, max_new_tokens=task.max_length(), num_beams=predictor.num_beams.get(task.name, 1)
    )
    parsed = [task.read(text) for text in predictor.tokens.decode(ids)]
    # the label stands first among the targets that its likelihood compares
    targets = [_targets(predictor, task, *row) for row in zip(inputs, ids, parsed, strict=True)]
    pairs = [(source, target) for source, own in zip(sources, targets, strict=True) for target in own]
    scores = iter(predictor.engine.score([source for source, _ in pairs], [target for _, target in pairs]))
    likelihoods = [_likelihood([next(scores) for _ in own]) for own in targets]
    rationales = _rationales(predictor, task, questions, parsed)
    return [
        Prediction(label=one.label or "", likelihood=likelihood, rationale=rationale)
        for one, likelihood, rationale in zip(parsed, likelihoods, rationales, strict=True)
    ]


def _targets(predictor: Predictor, task: Task, text: str, ids: list[int], parsed: Parsed) -> list[list[int]]:
    """The student's text with each label of the closed set, its own first; the text alone where there is no set."""
    known = {"label", "input", "rationale"}
    open_set = predictor.labels is None or parsed.label not in predictor.labels
    if open_set or task.parser is not None or not {"label"} <= set(task.template_fields) <= known:
        eos = int(predictor.tokens.tokenizer.eos_token_id)
        return [ids if ids[-1:] == [eos] else [*ids, eos]]
    labels = dict.fromkeys([str(parsed.label), *(predictor.labels or ())])
    texts = [task.target.format(label=label, input=text, rationale=parsed.rationale or "") for label in labels]
    return predictor.tokens.targets(texts, 10**9).ids


def _likelihood(scores: list[float]) -> float:
    """Of the first among several targets, or of the only one, from log-likelihoods in nats."""
    if len(scores) == 1:
        return math.exp(scores[0])
    most = max(scores)
    return math.exp(scores[0] - most) / sum(math.exp(score - most) for score in scores)


def _rationales(
    predictor: Predictor, task: Task, questions: Sequence[Question], parsed: Sequence[Parsed]
) -> list[str | None]:
    """The rationale of each question that wants one, from the answer's text or from a text of its own."""
    giving, wanted = rationale_task(predictor.tasks), [row for row, one in enumerate(questions) if one.rationale]
    found: list[str | None] = [None] * len(questions)
    if giving is None or not wanted:
        return found
    if giving == task:
        own = [parsed[row] for row in wanted]
    else:
        own = [giving.read(text) for text in predictor.generate([questions[row].input for row in wanted], giving.name)]
    for row, one in zip(wanted, own, strict=True):
        found[row] = one.rationale
    return found
