"""Rows that are streamed from shards: each once a pass, in another order each, and exactly on after a stop."""

import gzip
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lit_distill.data import JSONLDataModule
from lit_distill.data.streaming import StreamLoader
from lit_distill.errors import UserError

ROWS = 47


def rows(start: int, end: int) -> list[dict[str, Any]]:
    return [{"input": f"r{i}", "label": "a", "rationale": [f"x{i}", f"y{i}"]} for i in range(start, end)]


def write_shards(folder: Path, cuts: Sequence[int] = (0, 9, 10, 31, ROWS)) -> None:
    """Shards of unequal sizes: JSON lines, the second compressed, and Parquet."""
    folder.mkdir(exist_ok=True)
    for number, (start, end) in enumerate(pairwise(cuts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows(start, end)).encode()
        if number == 1:
            (folder / "1.jsonl.gz").write_bytes(gzip.compress(lines))
        elif number == 2:
            pq.write_table(pa.Table.from_pylist(rows(start, end)), folder / "2.parquet", row_group_size=4)
        else:
            (folder / f"{number}.jsonl").write_bytes(lines)


def build(
    folder: Path, tokenizer: PreTrainedTokenizerFast, world: int = 1, rank: int = 0, **settings: Any
) -> JSONLDataModule:
    val = folder.parent / "val.jsonl"
    val.write_text('{"input": "v", "label": "a"}\n')
    arguments: dict[str, Any] = {"batch_size": 4, "shuffle_buffer": 7, "seed": 3} | settings
    train = arguments.pop("train", str(folder / "*"))
    data = JSONLDataModule(train=train, val=val, streaming=True, tokenizer=tokenizer, **arguments)
    data.prepare_data()
    data.trainer = trainer(max_steps=1, global_rank=rank, world_size=world)
    data.setup("fit")
    return data


def trainer(**settings: Any) -> Any:
    return SimpleNamespace(**{"limit_train_batches": 1.0, "fast_dev_run": False} | settings)


def open_loader(*arguments: Any, **settings: Any) -> StreamLoader:
    loader = build(*arguments, **settings).train_dataloader()
    assert isinstance(loader, StreamLoader)
    return loader


def inputs(batch: Any, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The rows' texts."""
    return tokenizer.batch_decode(batch["label"]["input_ids"], skip_special_tokens=True)


def first_pass(loader: StreamLoader, tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    """The batches until every stream of the loader has begun its second pass."""
    found: list[list[str]] = []
    for batch in loader:
        if min(state["pass"] for state in loader.state_dict()["streams"]) > 0:
            return found
        found.append(inputs(batch, tokenizer))
    raise AssertionError


def flat(batches: list[list[str]]) -> list[str]:
    return [text for batch in batches for text in batch]


def test_a_pass_has_each_row_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    loader = open_loader(tmp_path / "shards", tokenizer)
    passes: list[list[str]] = [[], [], []]
    for batch in loader:
        number = loader.state_dict()["streams"][0]["pass"]
        if number == 3:
            break
        passes[number] += inputs(batch, tokenizer)
    expected = sorted(f"r{i}" for i in range(ROWS))
    assert [sorted(found) for found in passes] == [expected] * 3
    assert passes[0] != passes[1] != passes[2] != passes[0]
    # neighbours are shuffled, shards come in another order
    assert passes[0][:7] != sorted(passes[0][:7], key=lambda name: int(name[1:]))
    again = open_loader(tmp_path / "shards", tokenizer)
    assert flat(first_pass(again, tokenizer)) == passes[0]
    (tmp_path / "shards").rename(tmp_path / "shards [1]")
    listed = open_loader(tmp_path, tokenizer, train=[str(file) for file in sorted((tmp_path / "shards [1]").iterdir())])
    assert flat(first_pass(listed, tokenizer)) == passes[0]
    (tmp_path / "shards [1]").rename(tmp_path / "shards")
    other = open_loader(tmp_path / "shards", tokenizer, seed=4)
    assert flat(first_pass(other, tokenizer)) != passes[0]


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 0), (2, 2), (7, 0)])
def test_ranks_and_workers_share_a_pass(
    world: int, workers: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_shards(tmp_path / "shards")
    seen: Counter[str] = Counter()
    for rank in range(world):
        loader = open_loader(tmp_path / "shards", tokenizer, world, rank, num_workers=workers)
        states = loader.state_dict()["streams"]
        for batch in loader:
            before, states = states, loader.state_dict()["streams"]
            [moved] = [i for i, state in enumerate(states) if state is not before[i]]
            if states[moved]["pass"] == 0:
                seen.update(inputs(batch, tokenizer))
            if all(state["pass"] > 0 for state in states):
                break
    assert seen == Counter(f"r{i}" for i in range(ROWS))


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(one[task][name], other[task][name]) for task in one for name in one[task])


def check_going_on(make: Callable[[], StreamLoader], stops: Sequence[int]) -> tuple[list[Any], Any]:
    """Go on in another loader from the states at some of 40 batches; return all batches, and the last state."""
    loader = make()
    states, batches = [loader.state_dict()], []
    counts: list[dict[str, int]] = [{}]
    for batch in islice(loader, 40):
        states.append(json.loads(json.dumps(loader.state_dict())))
        batches.append(batch)
        counts.append(dict(loader.counts))
    for stop in stops:
        resumed = make()
        iterator = iter(resumed)
        resumed.load_state_dict(states[stop])  # Lightning may load it after the iterator is made
        assert resumed.state_dict() == states[stop]
        for number, batch in enumerate(islice(iterator, 40 - stop), start=stop):
            assert same(batch, batches[number])
            assert resumed.state_dict() == states[number + 1]
            assert resumed.counts == counts[number + 1]
    return batches, states[-1]


@pytest.mark.parametrize(("workers", "stops"), [(0, (1, 2, 3, 11, 12, 13, 14, 25, 30)), (2, (1, 12, 25))])
def test_it_goes_on_exactly(
    workers: int, stops: Sequence[int], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_shards(tmp_path / "shards")
    task = {"label": {}, "why": {"target": "{rationale}", "prefix": "why ", "select": "sample"}}
    settings: dict[str, Any] = {"num_workers": workers, "tasks": task}
    batches, last = check_going_on(lambda: open_loader(tmp_path / "shards", tokenizer, **settings), stops)
    assert max(state["pass"] for state in last["streams"]) >= 2
    # one of a row's two rationales is drawn, not always the same one
    drawn = [
        tokenizer.decode([i for i in ids if i > 2]) for batch in batches for ids in batch["why"]["labels"].tolist()
    ]
    assert {text[0] for text in drawn} == {"x", "y"}


def test_a_state_of_other_shards_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    state = open_loader(tmp_path / "shards", tokenizer).state_dict()
    told = "^ckpt_path: training rows cannot go on where they were: "
    changes: list[dict[str, int]] = [{"num_workers": 2}, {"seed": 4}, {"batch_size": 5}, {"shuffle_buffer": 8}]
    for settings in [*changes, {"world": 2}, {"shuffle_buffer": 8, "seed": 4}]:
        other = open_loader(tmp_path / "shards", tokenizer, **settings)
        name = " and ".join("number of devices" if name == "world" else name for name in settings)
        with pytest.raises(UserError, match=rf"{told}{name} must be as in the checkpoint$"):
            other.load_state_dict(state)
    (tmp_path / "shards" / "3.jsonl").rename(tmp_path / "shards" / "4.jsonl")
    with pytest.raises(UserError, match=rf"{told}the shards must be"):
        open_loader(tmp_path / "shards", tokenizer).load_state_dict(state)
    with pytest.raises(UserError, match=rf"{told}an earlier version"):
        open_loader(tmp_path / "shards", tokenizer).load_state_dict(state | {"setup": [1, 2]})


def test_dropped_rows_are_counted_and_said(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path / "shards")
    with (tmp_path / "shards" / "0.jsonl").open("a") as file:
        file.write('\n{"input": "no target"}\n{"input": "a long label", "label": "abcdefghijklmnopqrstuvwxyz"}\n')
    data = build(tmp_path / "shards", tokenizer, max_target_length=10)
    loader = data.train_dataloader()
    with caplog.at_level(logging.INFO):
        batches = first_pass(loader, tokenizer)
    assert [len(batch) for batch in batches] == [4] * 12
    [told] = [record.message for record in caplog.records if "pass" in record.message]
    assert told.startswith("jsonl train, pass 1: rows 49, parsed 47, no output 2,")
    assert "dropped without target 1, used 48, truncated targets 1, truncated labels 1" in told
    counts = data.describe()["splits"]["train"]
    assert counts["used"] == 48 + 4
    assert counts["dropped_without_target"] == 1


@pytest.mark.parametrize("extra", ["", '{"input": "no target"}\n'])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_without_rows_to_train_on(
    workers: int, extra: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_shards(tmp_path / "shards", (0, 9))
    (tmp_path / "shards" / "1.jsonl").write_text(extra)
    data = build(tmp_path / "shards", tokenizer, num_workers=workers)
    loader, passes = data.train_dataloader(), list[tuple[int, int]]()
    loader.on_pass = lambda number, counts: passes.append((number, counts["used"]))
    seen = [inputs(batch, tokenizer) for batch in islice(loader, 20)]
    assert passes[:3] == [(0, 9), (1, 9), (2, 9)]
    assert data.describe()["splits"]["train"]["used"] == len(flat(seen))


def test_fewer_rows_than_streams(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", (0, 1))
    told = r"^train: no row to train on in .*0\.jsonl and 0 more shards for one of 2 loader processes; take fewer"
    with pytest.raises(UserError, match=told):
        list(open_loader(tmp_path / "shards", tokenizer, num_workers=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_is_named(workers: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    loader = open_loader(tmp_path / "shards", tokenizer, num_workers=workers)
    (tmp_path / "shards" / "3.jsonl").unlink()
    with pytest.raises(UserError, match=r"^train: the shard .*3\.jsonl is not there any more$"):
        list(loader)


def test_bad_rows_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for content, message in [
        (b'{"input": "x", "label": "a"}\n{"input": ', r"0\.jsonl:2: not JSON"),
        (b'{"input": "x", "label": "a"}\n{"label": "a"}\n', r"0\.jsonl:2: column 'input' is empty"),
        (b'{"input": "x"}\n', r"tasks: label has no target in train"),
    ]:
        (tmp_path / "shards").mkdir(exist_ok=True)
        (tmp_path / "shards" / "0.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            list(open_loader(tmp_path / "shards", tokenizer))
        assert "\n" not in str(caught.value)
    # found after the rows that are checked at first
    (tmp_path / "shards" / "0.jsonl").write_text('{"input": "x", "label": "a"}\n')
    (tmp_path / "shards" / "1.parquet").write_bytes(b"PAR1 not really PAR1")
    loader = open_loader(tmp_path / "shards", tokenizer)
    with pytest.raises(UserError, match=r"^train: the shard .*1\.parquet cannot be read \("):
        list(loader)


def test_shards_at_urls(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    files, name = fsspec.filesystem("memory"), uuid4().hex
    for path in (tmp_path / "shards").iterdir():
        files.pipe(f"/{name}/{path.name}", path.read_bytes())
    remote = open_loader(tmp_path / "shards", tokenizer, train=f"memory://{name}/*")
    listed = open_loader(tmp_path / "shards", tokenizer, data_dir=f"memory://{name}", train=["*.jsonl", "1.*", "2.*"])
    local = first_pass(open_loader(tmp_path / "shards", tokenizer), tokenizer)
    assert first_pass(remote, tokenizer) == local
    assert sorted(flat(first_pass(listed, tokenizer))) == sorted(flat(local))
    files.rm(f"/{name}", recursive=True)
    with pytest.raises(UserError, match=rf"^train: there is no file memory://{name}/\*$"):
        open_loader(tmp_path / "shards", tokenizer, train=f"memory://{name}/*")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_fraction": 0.5}, "train_fraction: 0.5 is not for streaming, as it draws from all rows"),
        ({"rationale_pairing": "shuffled"}, "rationale_pairing: 'shuffled' is not for streaming"),
        ({"batching": "by_length"}, "batching: 'by_length' is not for streaming, as it sorts many rows"),
        ({"rationales": "elsewhere"}, "rationales: 'elsewhere' is not for streaming, as it looks for all ids"),
        ({"val": None}, "val: must be given with streaming, which takes no rows from train"),
        ({"train": None}, "train: must be given with streaming"),
        ({"hub": "a/b"}, "hub: not with streaming"),
        ({"train": []}, "train: a list of shards is for streaming: true, and not empty"),
        ({"train": ["x.jsonl"], "streaming": False}, "train: a list of shards is for streaming"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be"),
    ],
)
def test_what_streaming_refuses(settings: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"train": "x.jsonl", "val": "v.jsonl", "streaming": True} | settings
    with pytest.raises(UserError) as caught:
        JSONLDataModule(**arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_what_a_trainer_needs(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    data = build(tmp_path / "shards", tokenizer)
    for settings, message in [
        ({"max_steps": -1}, "max_steps: must be given with streaming"),
        *[
            ({"max_steps": 9, "limit_train_batches": some}, "limit_train_batches: not with streaming")
            for some in (1, 5)
        ],
    ]:
        data.trainer = trainer(**settings)
        with pytest.raises(UserError, match=f"^{message}"):
            data.setup("fit")
    with pytest.raises(UserError, match=r"^streaming: annotate asks rows of files"):
        data.rows_to_ask("train")
    with pytest.raises(UserError, match=r"^streaming: keeps no tokenised training rows"):
        data.token_rows("train")
