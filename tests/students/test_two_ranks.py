"""Students of both families on two processes: as on one, also where no rank has all weights."""

from functools import cache
from pathlib import Path

import pytest
import torch

from lit_distill.students import load
from tests.ranks import Found, on_ranks
from tests.students import add_weights, make_causal_folder, make_student_folder
from tests.students.rank_runs import LORA, all_runs, one_process

NAMES = ("llama", "gpt2", "t5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("students")
    for kind in ("llama", "gpt2"):
        make_causal_folder(root / kind, kind)
        torch.manual_seed(11)
        load(root / kind, from_scratch=True).save(root / kind)
    add_weights(make_student_folder(root / "t5"))
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def ranks(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return on_ranks(all_runs, tmp_path_factory, folders)


alone = cache(one_process)


def check(found: Found, expected: Found, folder: Path) -> None:
    before = dict(load(folder).named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=name)
        # and it has learned something
        assert name not in before or not torch.equal(weight, before[name].detach()), name


@pytest.mark.parametrize("name", NAMES)
def test_ddp(name: str, ranks: list[Found], folders: dict[str, Path]) -> None:
    for rank in ranks:
        check(rank[f"ddp {name}"], alone(folders[name]), folders[name])


@pytest.mark.parametrize("name", NAMES)
def test_fsdp_is_given_weights_part_by_part(name: str, ranks: list[Found], folders: dict[str, Path]) -> None:
    expected = alone(folders[name])
    for number, rank in enumerate(ranks):
        found = rank[f"fsdp {name}"]
        assert found["empty"]
        assert found["blocks"] == (4 if name == "t5" else 2)
        # the second rank never reads them
        assert found["reads"] == (number == 0)
        check(found["weights"], expected, folders[name])


def test_fsdp_with_an_adapter(ranks: list[Found], folders: dict[str, Path]) -> None:
    # the adapter's first weights are drawn: those that learned are compared over the ranks, the others with the folder
    first, second = (rank["fsdp with an adapter"]["weights"] for rank in ranks)
    before = load(folders["llama"], adapter=LORA).state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        if "lora_B" in name:
            assert weight.any()
        elif "lora_" not in name:
            assert torch.equal(weight, before[name])


def test_ranks_make_as_many_forwards(ranks: list[Found]) -> None:
    assert ranks[0]["forwards"] == ranks[1]["forwards"] > 0
