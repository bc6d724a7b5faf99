"""Engines: what generates and scores for a student that is trained, PyTorch or CTranslate2."""

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lit_distill.batch import pad_rows, sum_rows
from lit_distill.errors import UserError
from lit_distill.students import Pass, Student, StudentFiles, Tokens, load
from lit_distill.students.files import reading
from lit_distill.students.seq2seq import Seq2SeqStudent

EngineName = Literal["transformers", "ctranslate2"]
"""The engines; `load_engine` makes one."""

MODEL = "model.bin"
"""The weights in a folder of CTranslate2."""

BATCH_SIZE = 32

Ids = Sequence[Sequence[int]]
"""Token ids of each row."""

_TASK = "rows"


class Engine(Protocol):
    """Generates and scores token ids, greedily or with beams.

    Ids that the tokenizer does not have are never generated. A search with beams ends as soon as there are as many
    finished texts as beams (``early_stopping`` of transformers): the rule that both engines can follow.
    """

    tokens: Tokens

    def generate(self, sources: Ids, *, max_new_tokens: int, num_beams: int = 1) -> list[list[int]]:
        """The target of each source up to end-of-sequence, which counts in ``max_new_tokens``."""

    def score(self, sources: Ids, targets: Ids) -> list[float]:
        """Log-likelihood in nats of each source's target, which ends in end-of-sequence."""


class TransformersEngine:
    """A student as PyTorch runs it; ``plain`` is transformers' own forward and ``generate`` for a T5, too."""

    def __init__(self, student: Student, *, plain: bool = False) -> None:
        self.student, self.tokens = student.eval(), student.tokens
        if plain and isinstance(student, Seq2SeqStudent):
            student.evaluation_path = "plain"
        self._known = len(student.tokenizer)
        self._settings: Any = student.network.generation_config

    def generate(self, sources: Ids, *, max_new_tokens: int, num_beams: int = 1) -> list[list[int]]:
        """See `Engine`."""
        before = {name: getattr(self._settings, name) for name in ("early_stopping", "num_beams")}
        if num_beams > 1:
            self._settings.update(early_stopping=True, num_beams=num_beams)
        process = partial(self._without_unknown, in_sum=num_beams > 1)

        def of(rows: list[int]) -> list[list[int]]:
            found = self._pass([sources[row] for row in rows], [[] for _ in rows])
            return found.generate(_TASK, max_new_tokens=max_new_tokens, num_beams=num_beams, process_logits=process)

        try:
            return in_batches(of, [len(source) for source in sources])
        finally:
            self._settings.update(**before)

    def _without_unknown(self, scores: Tensor, step: int, rows: Tensor, *, in_sum: bool) -> Tensor:
        if scores.shape[1] == self._known:
            return scores
        scores[:, self._known :] = -torch.inf
        # beams add up log-probabilities
        return scores.log_softmax(dim=-1) if in_sum else scores

    @torch.no_grad()
    def score(self, sources: Ids, targets: Ids) -> list[float]:
        """See `Engine`."""

        def of(rows: list[int]) -> list[float]:
            found = self._pass([sources[row] for row in rows], [targets[row] for row in rows])
            scores: list[float] = (-sum_rows(found.token_losses(_TASK), found.rows(_TASK), len(rows))).tolist()
            return scores

        return in_batches(of, [len(source) + len(target) for source, target in zip(sources, targets, strict=True)])

    def _pass(self, sources: Ids, targets: Ids) -> Pass:
        inputs: Any = pad_rows(sources, targets, int(self.tokens.tokenizer.pad_token_id))
        batch: Any = {_TASK: {name: each.to(self.student.device) for name, each in inputs.items()}}
        return self.student.forward(batch)


class CTranslate2Engine:
    """A student that `lit_distill.exporting.convert` wrote, on the CPU.

    Args:
        folder: with CTranslate2's files, and the tokenizer in ``student``.
        threads: of one batch; by default as many as PyTorch has.
    """

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        package, files = import_ctranslate2(), StudentFiles(folder)
        self.tokens = files.tokens()
        self._seq2seq = self.tokens.family == "seq2seq"
        self._positions = files.config.get("max_position_embeddings") or files.config.get("n_positions") or 2**30
        kind = package.Translator if self._seq2seq else package.Generator
        with reading("export: cannot read", str(folder)):
            [path] = folder.glob("*vocabulary.json")
            self._words: list[str] = json.loads(path.read_text(encoding="utf-8"))
            self._model = kind(str(folder), intra_threads=threads or torch.get_num_threads())
        self._ids = {word: number for number, word in enumerate(self._words)}
        unknown = [[word] for word in self._words[len(self.tokens.tokenizer) :]]
        self._settings: dict[str, Any] = {
            "max_batch_size": BATCH_SIZE, "return_end_token": True, "suppress_sequences": unknown or None,
        }  # fmt: skip

    def _named(self, ids: Ids) -> list[list[str]]:
        return [[self._words[one] for one in row] for row in ids]

    def generate(self, sources: Ids, *, max_new_tokens: int, num_beams: int = 1) -> list[list[int]]:
        """See `Engine`."""
        settings = self._settings | {"beam_size": num_beams}
        if self._seq2seq:
            lengths = {"max_input_length": 0, "max_decoding_length": max_new_tokens, "min_decoding_length": 0}
            found = self._model.translate_batch(self._named(sources), **lengths, **settings)
            return [[self._ids[word] for word in one.hypotheses[0]] for one in found]

        def of(rows: list[int]) -> list[list[int]]:
            left = self._positions - len(sources[rows[0]])
            found = self._model.generate_batch(
                self._named([sources[row] for row in rows]),
                max_length=min(max_new_tokens, max(left, 1)),
                include_prompt_in_result=False,
                **settings,
            )
            return [list(one.sequences_ids[0]) for one in found]

        # prompts longer than a batch's shortest are read token by token, and their beams are searched otherwise
        return in_batches(of, [len(source) for source in sources], equal=True)

    def score(self, sources: Ids, targets: Ids) -> list[float]:
        """See `Engine`."""
        limits = {"max_input_length": 0, "max_batch_size": BATCH_SIZE}
        if self._seq2seq:
            # which adds end-of-sequence itself
            found = self._model.score_batch(self._named(sources), self._named([row[:-1] for row in targets]), **limits)
        else:
            whole = [[*source, *target] for source, target in zip(sources, targets, strict=True)]
            found = self._model.score_batch(self._named(whole), **limits)
        return [sum(one.log_probs[-len(target) :]) for one, target in zip(found, targets, strict=True)]


def check_engine(folder: str | Path, name: EngineName | None = None) -> EngineName:
    """The name of the engine that runs a student. Raises a ``UserError`` if the engine ``name`` cannot."""
    converted = (Path(folder) / MODEL).is_file()
    if name == "ctranslate2" and not converted:
        raise UserError(
            f"engine: {str(folder)!r} holds no CTranslate2 model ({MODEL});"
            f" `lit-distill export {folder} --to ctranslate2 --out FOLDER` writes one"
        )
    if name == "transformers" and converted:
        raise UserError(f"engine: {str(folder)!r} holds a CTranslate2 model; allowed is ctranslate2")
    if converted:
        import_ctranslate2()
    return "ctranslate2" if converted else "transformers"


def load_engine(folder: str | Path, name: EngineName | None = None) -> Engine:
    """The engine of an exported student's folder, or of any student that `lit_distill.students.load` reads.

    Raises a ``UserError`` if the folder is not one of the engine ``name``.
    """
    if check_engine(folder, name) == "ctranslate2":
        return CTranslate2Engine(Path(folder))
    return TransformersEngine(load(folder))


def import_ctranslate2() -> Any:
    """The package. Raises a ``UserError`` if it is not installed."""
    try:
        import ctranslate2  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError('ctranslate2 is not installed: pip install "lit_distill[ctranslate2]"') from error
    # it would warn that bfloat16 is computed in float32 where the processor has nothing faster, as PyTorch does here
    ctranslate2.set_log_level(logging.ERROR)
    return ctranslate2


def in_batches(of: Callable[[list[int]], list[Any]], lengths: Sequence[int], *, equal: bool = False) -> list[Any]:
    """What ``of`` finds for each row, in batches of rows of similar length, or of ``equal`` length."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    found: dict[int, Any] = {}
    while order:
        end = next((i for i, row in enumerate(order) if equal and lengths[row] < lengths[order[0]]), len(order))
        rows, order = order[: min(end, BATCH_SIZE)], order[min(end, BATCH_SIZE) :]
        found |= zip(rows, of(rows), strict=True)
    return [found[row] for row in range(len(lengths))]
