"""The script that makes the students of the evidence."""

import json
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.students import make_student_folder

SCRIPT = Path(__file__).parent.parent / "docs" / "evidence" / "make_student.py"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A student whose texts have two kinds of animals, and its tokenizer."""
    folder, draw = tmp_path_factory.mktemp("started"), random.Random(0)  # noqa: S311
    kinds = [(("cat", "dog"), ("sleeps", "barks")), (("carp", "pike"), ("swims", "dives"))]
    texts = []
    for _ in range(400):
        names, verbs = draw.choice(kinds)
        texts.append({"text": f"The {draw.choice(names)} {draw.choice(verbs)}.", "label": 1})
    (folder / "texts.jsonl").write_text("\n".join(json.dumps(text) for text in texts))
    like = make_student_folder(folder / "like", d_model=64)
    arguments = ["--like", like, "--words", folder / "texts.jsonl", "--width", 64, "--out", folder / "made"]
    arguments += ["--embeddings"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_student.py", *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return AutoModelForSeq2SeqLM.from_pretrained(folder / "made"), AutoTokenizer.from_pretrained(folder / "made")


def test_a_vocabulary_has_t5s_sentinels(started: tuple[Any, Any]) -> None:
    _, tokenizer = started
    last = len(tokenizer) - 1
    assert [tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in (0, 1, 99)] == [last, last - 1, last - 99]
    ids = [last, *tokenizer("The cat")["input_ids"]]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The cat"


def test_words_alike_begin_alike(started: tuple[Any, Any]) -> None:
    student, tokenizer = started
    weight = student.get_input_embeddings().weight.detach()

    def cosine(one: str, other: str) -> float:
        first, second = (weight[tokenizer.convert_tokens_to_ids(f"▁{word}")] for word in (one, other))
        return float(torch.cosine_similarity(first, second, dim=0))

    assert min(cosine("cat", "dog"), cosine("carp", "pike")) > 0.8
    assert max(cosine(a, b) for a in ("cat", "dog") for b in ("carp", "pike")) < 0.5
    # as long as random ones
    assert float(weight[tokenizer.convert_tokens_to_ids("▁cat")].square().mean()) == pytest.approx(1)
