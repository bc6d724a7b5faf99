"""The figures of the paper's released data, on the data itself where it is at hand."""

from pathlib import Path

import pytest

from lit_distill.data import ANLIDataModule, CQADataModule, ESNLIDataModule, RationaleDataModule, SVAMPDataModule
from lit_distill.data.selection import teacher_accuracy, teacher_counts
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split

# dataset, split: rows, unparsed, teacher accuracy in per cent, answers outside the closed choices
FIGURES: dict[tuple[type[RationaleDataModule], Split], tuple[int, int, float, int | None]] = {
    (CQADataModule, "train"): (9741, 3, 74.26, 445),
    (CQADataModule, "test"): (1221, 0, 77.23, 46),
    (SVAMPDataModule, "train"): (800, 13, 73.5, 0),
    (SVAMPDataModule, "test"): (200, 2, 74.0, 0),
    (ESNLIDataModule, "train"): (10_000, 170, 69.86, None),
    (ESNLIDataModule, "val"): (9842, 4, 73.17, None),
    (ESNLIDataModule, "test"): (9824, 0, 72.99, None),
    (ANLIDataModule, "val"): (1000, 9, 66.8, None),
    (ANLIDataModule, "test"): (1000, 10, 65.6, None),
}


@pytest.mark.parametrize(("dataset", "split"), FIGURES)
def test_released_files(dataset: type[RationaleDataModule], split: Split, shared_data: Path) -> None:
    module = dataset(data_dir=shared_data, allow_extra_outputs=True)
    tally = module.tally(split, released=True)
    count, unparsed, accuracy, outside = FIGURES[dataset, split]
    found = teacher_counts(tally)
    assert (found["rows"], found["parsed"], found["unparsed"]) == (count, count - unparsed, unparsed)
    assert 100 * (teacher_accuracy(tally) or 0) == pytest.approx(accuracy, abs=0.0051)
    assert outside is None or found["outside_label_set"] == outside


def test_more_outputs_than_rows(shared_data: Path) -> None:
    with pytest.raises(UserError, match=r"10000 rows.* 11000 outputs.*allow_extra_outputs"):
        ESNLIDataModule(data_dir=shared_data).released("train")


def test_premise_and_hypothesis_are_parted_by_t5_s_end_token(shared_data: Path, shared_tokenizer: Path) -> None:
    module = ANLIDataModule(data_dir=shared_data, tokenizer=shared_tokenizer)
    module.setup("test")
    ids = next(iter(module.test_dataloader()))["label"]["input_ids"][0].tolist()
    assert ids.count(1) == 2
    assert module.answer_key("test").inputs[0].count("</s>") == 1
