"""A corpus: its files, its documents, the sequences that are made of them, and where it goes on."""

import gzip
import json
import lzma
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch

from lit_distill.batch import IGNORE_INDEX
from lit_distill.data import CorpusDataModule
from lit_distill.data import streaming as streaming_module
from lit_distill.data.corpus.documents import Sorting, normal, rows_of
from lit_distill.data.corpus.documents import tested_lines as read_test_sets
from lit_distill.data.streaming import StreamLoader, find_shards
from lit_distill.errors import UserError
from lit_distill.students import Tokens
from lit_distill.students.tokens import CausalTokens
from tests.data.test_streaming import check_going_on
from tests.students import CAUSAL_WORDS, WORDS, make_causal_tokenizer, make_tokenizer

# words of the tokenizer, so that a document can be read again from its tokens
NUMBERS = [word for word in WORDS if word.isdecimal()]
EOS = 1


def documents(start: int, end: int) -> list[str]:
    """Different texts of 6 words."""
    return [f"{NUMBERS[i // 30]} {NUMBERS[i % 30]} the cat is red" for i in range(start, end)]


def write(path: Path, texts: Sequence[Any]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    lines = "".join((text if path.name.startswith("plain") else json.dumps(text)) + "\n" for text in texts).encode()
    compress: Any = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(lines))
    return path


def build(train: Any, world: int = 1, rank: int = 0, **settings: Any) -> CorpusDataModule:
    # a source of 26 tokens is made of 28, which are four whole documents
    arguments: dict[str, Any] = {"batch_size": 4, "shuffle_buffer": 50, "max_length": 26, "val_documents": 3, "seed": 3}
    arguments |= {"tokenizer": Tokens(make_tokenizer(20))} | settings
    data = CorpusDataModule(train, **arguments)
    data.prepare_data()
    trainer: Any = SimpleNamespace(global_rank=rank, world_size=world, max_steps=9)
    trainer.limit_train_batches, trainer.fast_dev_run = 1.0, False
    trainer.strategy = SimpleNamespace(broadcast=lambda found: found)
    data.trainer = trainer
    data.setup("fit")
    return data


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """300 documents in four formats."""
    write(tmp_path / "c" / "plain.txt.gz", documents(0, 60))
    write(tmp_path / "c" / "strings.jsonl.xz", [*documents(60, 150), "", "  "])
    write(tmp_path / "c" / "objects.json", [{"text": text, "other": 1} for text in documents(150, 220)])
    pq.write_table(pa.Table.from_pylist([{"text": text} for text in documents(220, 300)]), tmp_path / "c" / "p.parquet")
    return str(tmp_path / "c" / "*")


def sequences(batch: Any, tokens: Tokens) -> Iterator[list[int]]:
    """What was corrupted, put together from sources and targets."""
    vocabulary = tokens.tokenizer.get_vocab()
    sentinels = {vocabulary[f"<extra_id_{i}>"] for i in range(20)}
    for source, target in zip(batch["text"]["input_ids"].tolist(), batch["text"]["labels"].tolist(), strict=True):
        gaps: dict[int, list[int]] = {}
        for token in target[: target.index(IGNORE_INDEX) if IGNORE_INDEX in target else None][:-1]:
            if token in sentinels:
                gaps[token] = []
            else:
                gaps[next(reversed(gaps))].append(token)
        real = source[: source.index(0) if 0 in source else None][:-1]
        yield [token for mark in real for token in gaps.get(mark, [mark])]


def texts(stream: Sequence[int], tokens: Tokens) -> list[str]:
    """The documents in joined sequences."""
    found: list[list[int]] = [[]]
    for token in stream:
        if token == EOS:
            found.append([])
        else:
            found[-1].append(token)
    return [str(tokens.tokenizer.decode(ids)) for ids in found if ids]


def first_pass(loader: StreamLoader, tokens: Tokens, count: int) -> list[str]:
    """The documents of the first batches, as many as ``count`` at least."""
    stream: list[int] = []
    for batch in loader:
        for sequence in sequences(batch, tokens):
            stream += sequence
        if stream.count(EOS) >= count:
            return texts(stream, tokens)
    raise AssertionError


def test_each_document_is_read_whole_and_once_a_pass(corpus: str) -> None:
    data = build(corpus, val_documents=300)
    held_out = data._val_texts()
    assert 0 < len(held_out) < 10
    left = [text for text in documents(0, 300) if text not in held_out]
    # one block, whose sequences are shuffled: however large, it ends with the pass
    whole = build(corpus, shuffle_buffer=10_000, batch_size=1)
    loader = whole.train_dataloader()
    found: list[int] = []
    together: set[tuple[str, str]] = set()
    for batch in loader:
        if loader.state_dict()["streams"][0]["block"] == 1:
            break
        for sequence in sequences(batch, whole.tokens):
            assert loader.counts["documents"] == len(found) // 7 + len(sequence) // 7
            assert len(sequence) <= whole.packing.length
            together |= {*pairwise(texts(sequence, whole.tokens))}
            found += sequence
    read = texts(found, whole.tokens)
    assert sorted(read) == sorted(left)
    assert read != left
    # what stands together is read together, but where a file ends
    assert len(together - set(pairwise(left))) <= 3
    assert len(together) > 200
    # now in the second pass, whose documents are known
    assert whole.counts == {"documents": len(left), "blank": 2, "held_out": len(held_out)}
    assert len(found) == 7 * len(left)


def test_a_document_of_a_small_source_is_counted_at_the_first_of_its_copies(corpus: str, tmp_path: Path) -> None:
    mixture = {name: {"paths": corpus.replace("*", name)} for name in ("plain*", "p.*")}
    val = str(write(tmp_path / "val.jsonl", ["the cat"]))
    data = build(mixture, shuffle_buffer=400, batch_size=1, val=val)
    loader, seen = data.train_dataloader(), set[str]()
    for batch in islice(loader, 60):
        for sequence in sequences(batch, data.tokens):
            seen |= {*texts(sequence, data.tokens)}
        assert loader.counts["documents"] == len(seen)
    assert len(seen) > 100


def test_a_sentinel_in_a_text_is_left_out(tmp_path: Path) -> None:
    marked = ["the <extra_id_0> cat is<extra_id_12> red <pad>", "<extra_id_3>", "<pad>"]
    path = write(tmp_path / "marked.jsonl", marked)
    found = [(text.split(), kind) for text, kind in Sorting("text", holds_out=False).sorted(rows_of([path]))]
    assert found == [(["the", "cat", "is", "red"], "documents"), ([], "blank"), ([], "blank")]


def test_a_path_through_a_link_names_the_file_that_it_opens(tmp_path: Path) -> None:
    right, _ = write(tmp_path / "big" / "c.jsonl", ["right"]), write(tmp_path / "c.jsonl", ["wrong"])
    (tmp_path / "big" / "data").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "big" / "data")
    [found] = find_shards(["../c.jsonl"], tmp_path / "data", [".jsonl"])
    assert cast(Path, found).read_text() == right.read_text()
    with pytest.raises(UserError, match=rf"^train: {right} is there twice"):
        find_shards(["../c.jsonl", str(right)], tmp_path / "data", [".jsonl"])


def test_ranks_and_workers_share_a_pass(corpus: str) -> None:
    seen: Counter[str] = Counter()
    for rank in range(2):
        data = build(corpus, 2, rank, num_workers=2, shuffle_buffer=20)
        loader = data.train_dataloader()
        stopped = list(islice(loader, 40))
        streams = loader.state_dict()["streams"]
        assert len(stopped) == 40
        assert len(streams) == 2
        assert all(state["sources"][0][0] > 0 for state in streams)
        for batch in stopped:
            for sequence in sequences(batch, data.tokens):
                seen.update(texts(sequence, data.tokens))
    val = build(corpus, val_documents=300)._val_texts()
    assert seen.keys() == set(documents(0, 300)) - set(val)


def test_documents_of_a_sequence_are_those_whose_tokens_it_has(corpus: str) -> None:
    packing, some = build(corpus).packing, (documents(0, 600) * 2)[:1_003]
    some[500] = " ".join(["the cat"] * 40)
    owners = [number for number, text in enumerate(some) for _ in range(len(text.split()) + 1)]
    found = [list(range(own.start, own.stop)) for _, own in packing.sequences(some)]
    assert found == [sorted({*owners[at : at + 28]}) for at in range(0, len(owners), 28)]


@pytest.mark.parametrize(("workers", "mixed"), [(0, True), (2, True), (0, False)])
def test_it_goes_on_exactly(workers: int, mixed: bool, corpus: str) -> None:
    mixture = {"a": {"paths": corpus, "weight": 3}, "b": {"paths": [corpus.replace("*", "p*")]}}
    settings: dict[str, Any] = {"num_workers": workers, "shuffle_buffer": 50 if mixed else 120}
    data = build(mixture if mixed else corpus, **settings)
    _, last = check_going_on(data.train_dataloader, (1, 7, 16, 33))
    # the states were of more than a pass
    assert last["streams"][0]["sources"][-1][0] > 0


def test_a_resumed_run_reads_what_it_read(corpus: str, tmp_path: Path) -> None:
    val = str(write(tmp_path / "val.jsonl", ["the cat"]))
    tests = [str(write(tmp_path / f"test{number}.jsonl", [f"the cat is red and {number}"])) for number in range(2)]
    base: dict[str, Any] = {"test_sets": tests[:1], "tokenizer": Tokens(make_tokenizer(20))}
    state = build(corpus, **base).train_dataloader().state_dict()
    # files of the same lines, and other documents of validation that are held out all the same
    other = str(write(tmp_path / "again.jsonl", ["The cat is red, and 0."]))
    build(corpus, **base | {"test_sets": [other], "val_documents": 2}).train_dataloader().load_state_dict(state)
    base |= {"batch_size": 4, "shuffle_buffer": 50, "max_length": 26, "seed": 3}
    changes: dict[str, Any] = {"max_length": 30, "noise_density": 0.2, "mean_span_length": 5.0, "column": "body"}
    for name, value in (changes | {"overlap": "drop", "val": val, "test_sets": tests}).items():
        # nothing is read, as the other column is in no file
        data = CorpusDataModule(corpus, **base | {name: value})
        with pytest.raises(UserError, match=rf"^ckpt_path: training rows cannot .*: {name} must be as in the check"):
            data.train_dataloader().load_state_dict(state)


def test_what_one_rank_finds_all_ranks_raise(corpus: str, tmp_path: Path) -> None:
    tests = str(write(tmp_path / "test.jsonl", documents(4, 5)))
    ranks: list[Any] = [
        CorpusDataModule(corpus, tokenizer=Tokens(make_tokenizer(20)), test_sets=[tests]) for _ in range(2)
    ]
    trainer: Any = SimpleNamespace(global_rank=0, world_size=2)
    trainer.strategy = SimpleNamespace(broadcast=lambda found: ranks[0]._fault)
    for data in ranks:
        data.trainer = trainer
    # by one rank alone, from which no other would hear
    ranks[0].prepare_data()
    for data in ranks:
        with pytest.raises(UserError, match=r"^train: .*plain\.txt\.gz:5 has a line of a test set"):
            data.setup("fit")


def test_a_mixture_has_its_shares(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["a " * 6] * 70)
    write(tmp_path / "b.jsonl", ["b " * 6] * 900)
    val = write(tmp_path / "v.jsonl", ["c"])
    train = {"a": {"paths": str(tmp_path / "a.jsonl"), "weight": 0.5}, "b": {"paths": str(tmp_path / "b.jsonl")}}
    data = build(train, val=str(val), shuffle_buffer=10)
    found = first_pass(data.train_dataloader(), data.tokens, 300)
    # whole documents; the smaller source is read again
    share = sum(text == "a a a a a a" for text in found) / len(found)
    assert share == pytest.approx(1 / 3, abs=0.02)
    loader = data.train_dataloader()
    for _ in islice(loader, 60):
        pass
    [state] = loader.state_dict()["streams"]
    assert state["sources"][0][0] >= 1
    assert state["sources"][1][0] == 0


def test_validation_is_the_same_each_time_and_never_trained_on(corpus: str) -> None:
    data = build(corpus, eval_batch_size=2)
    one, other = list(data.val_dataloader()), list(build(corpus, eval_batch_size=2).val_dataloader())
    assert len(one) == len(other) > 0
    assert all(torch.equal(a["text"]["labels"], b["text"]["labels"]) for a, b in zip(one, other, strict=True))
    told = texts([token for batch in one for found in sequences(batch, data.tokens) for token in found], data.tokens)
    assert told == data._val_texts()
    assert len(told) == 2
    # two ranks have each sequence once, and none for the row that fills the last round
    other_train = str(write(Path(corpus).parent.parent / "other.jsonl", documents(0, 9)))
    rows: list[int] = []
    for rank in range(2):
        data = build(other_train, 2, rank, val=corpus, val_documents=20, eval_batch_size=1)
        for batch in data.val_dataloader():
            index = batch["text"]["index"].tolist()
            real = (batch["text"]["labels"] != IGNORE_INDEX).any(1)
            assert real.tolist() == [row >= 0 for row in index]
            rows += [row for row in index if row >= 0]
    assert sorted(rows) == list(range(len(cast(Any, data._val_rows))))


def test_a_decoder_only_student_predicts_each_token_but_the_first(corpus: str) -> None:
    tokens = CausalTokens(make_causal_tokenizer())
    data = build(corpus, tokenizer=tokens, max_length=24)
    batch = next(iter(data.train_dataloader()))["text"]
    assert batch["input_ids"].shape == (4, 1)
    assert batch["labels"].shape == (4, 23)
    joined = torch.cat([batch["input_ids"], batch["labels"]], dim=1)[0].tolist()
    assert EOS in joined
    assert set(texts(joined, tokens)[1:-1]) <= set(documents(0, 300))
    assert all(token < len(CAUSAL_WORDS) for token in joined)
    assert data.tokens_per_row() == 24
    assert "noise_density" not in data.describe()


def test_a_corpus_at_a_url() -> None:
    place = f"memory://{uuid4().hex}"
    for number, part in enumerate((documents(0, 150), documents(150, 300))):
        with fsspec.open(f"{place}/{number}.jsonl.gz", "wb") as file:
            file.write(gzip.compress("".join(json.dumps(text) + "\n" for text in part).encode()))
    data = build(f"{place}/*.jsonl.gz")
    assert len(data.sources[0].shards) == 2
    assert set(first_pass(data.train_dataloader(), data.tokens, 40)) <= set(documents(0, 300))


def test_lines_of_test_sets_are_refused_or_dropped(tmp_path: Path) -> None:
    common = "Two CATS, sleep on the red-mat!"
    train = [*documents(0, 200), f"b\nPremise: {common}", *documents(200, 300)]
    path = write(tmp_path / "train.jsonl", train)
    row = {"premise": "short text", "choices": ["x", "two cats sleep on   the red mat"], "id": 5}
    tests = write(tmp_path / "test.jsonl", [row])
    settings: dict[str, Any] = {"test_sets": [str(tests)]}
    message = (
        rf"^train: {path}:201 has a line of a test set \({tests}:1: 'two cats sleep on the red mat'\); overlap: drop"
    )
    with pytest.raises(UserError, match=message):
        build(str(path), **settings)
    dropped = build(str(path), overlap="drop", shuffle_buffer=301, **settings)
    next(iter(dropped.train_dataloader()))
    loader = dropped.train_dataloader()
    next(iter(loader))
    assert loader.counts["overlapping"] == 1
    # what is not scanned before is found as it is read
    remote = build(str(path), **settings | {"test_sets": None}, shuffle_buffer=301)
    object.__setattr__(remote.sorting, "tested", dropped.sorting.tested)
    with pytest.raises(UserError, match=message):
        next(iter(remote.train_dataloader()))
    assert normal(" A-b\tÇé_1 ") == "a b çé 1"
    # without a line of enough words no document could be found
    for number, content in enumerate((["the cat is red"], [], ["一个男人在台上弹吉他。"])):
        short = write(tmp_path / f"short{number}.jsonl", content)
        with pytest.raises(UserError, match=rf"^test_sets: {short} has no line of at least 5 words"):
            build(str(path), test_sets=[str(tests), str(short)])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A man is playing a guitar on stage.", True),
        ("Premise: A man is playing a guitar on stage. Hypothesis: He sleeps.", True),
        ("1. a man is playing a guitar, on stage", True),
        ("premise:A man is playing a guitar on stage", True),
        ("He sleeps! A man is playing a guitar on stage? Yes", True),
        ("Q: Why? It costs 2.50 dollars at noon. Tell me why.", True),
        ("A man is playing a guitar on stage</s>He sleeps", True),
        ("Premise: A man is playing a guitar on stage Hypothesis: He sleeps", True),
        ("He sleeps [SEP] A man is playing a guitar on stage", True),
        ("He sleeps\tA man is playing a guitar on stage\t0", True),
        ("He sleeps - a man is playing a guitar on stage", True),
        ("He said 'a man is playing a guitar on stage' and left", True),
        ("A man is playing a guitar on stage--he sleeps", True),
        ("He _a man is playing a guitar on stage_ he", True),
        ("Premise 1 : A man is playing a guitar on stage Hypothesis 2 : He sleeps", True),
        ("A man is playing a guitar on stage-left", False),
        ("A man is playing a guitar on stage\u2011left", False),
        ("A man is playing a guitar on stage std::vector", False),
        ("The price of the car is 20,000 dollars", False),
        ("The price of the car is 20, I say", True),
        ("अभी वह आदमी मंच पर गिटार बजा रहा है और वह खुश है", False),
        ("वह आदमी मंच पर गिटार बजा रहा है।", True),
        ("Then it costs 2.50 dollars at noon. Tell me why.", False),
        ("A man is playing a guitar on stage with a band.", False),
        ("Is a man is playing a guitar on stage?", False),
        ("A man is playing a\nguitar on stage", False),
    ],
)
def test_a_line_of_a_test_set_is_found_among_others(text: str, found: bool, tmp_path: Path) -> None:
    lines = ["A man is playing a guitar on stage.", "It costs 2.50 dollars at noon. Tell me why.", "a b c d e"]
    lines += ["The price of the car is 20", "वह आदमी मंच पर गिटार बजा रहा है"]
    path = write(tmp_path / "test.jsonl", lines)
    sorting = Sorting("text", holds_out=False, tested=read_test_sets([path]))
    row = (path, 0, json.dumps(text).encode())
    assert [kind for _, kind in sorting.sorted([row])] == ["overlapping" if found else "documents"]


def test_what_a_corpus_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str, content: Sequence[Any] | bytes, name: str = "c.jsonl", **settings: Any) -> None:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            write(path, content)
        with pytest.raises(UserError, match=match):
            list(islice(build(str(path), **settings).train_dataloader(), 30))

    many = documents(0, 300)
    with pytest.raises(UserError, match=r"^train: there is no file .*nowhere"):
        build(str(tmp_path / "nowhere"))
    refused(r"^train: .*c\.csv is none of \.txt, ", many, "c.csv")
    refused(r"^train: no text in train: .*c\.jsonl, 1 file", ["", " "])
    refused(r"^val: must be given for so small a corpus: of 2 documents none", ["a", "b"])
    refused(r"^val: there is no file", many, val=str(tmp_path / "no"))
    refused(r"^val: .*c\.jsonl is in train, too", many, val=str(tmp_path / ".." / tmp_path.name / "c.jsonl"))
    blank, val = b"\n \n\n", str(write(tmp_path / "val.jsonl", ["a"]))
    refused(r"^train: no text in train: .*c\.jsonl, 1 file", blank, val=val)
    overlapping: dict[str, Any] = {"test_sets": [str(write(tmp_path / "test.jsonl", many))], "overlap": "drop"}
    for of_val in ({}, {"val": val}):
        refused(
            r"^train: no text to train on in .*: 9 documents have a line of test_sets", many[:9], **overlapping | of_val
        )
    refused(r"^test_sets: there is no file", many, test_sets=[str(tmp_path / "no")])
    refused(r"c\.jsonl:1: no column 'text'; there are x$", [{"x": "a"}])
    refused(r"c\.jsonl:2: 'body' must be a text, got 5$", [{"body": "a"}, {"body": 5}], column="body")
    refused(r"c\.jsonl:1 must be a text, got \['a'\]$", [["a"]])
    refused(r"c\.jsonl:2: not JSON: ", b'"a"\n{\n')
    refused(r"plain\.txt:1: not UTF-8", b"\xff\xfe\n", "plain.txt")
    refused(r"plain\.txt\.gz is damaged", gzip.compress(b"a\n" * 9)[:-9], "plain.txt.gz")
    monkeypatch.setattr(streaming_module, "LONGEST", 2**20)
    refused(r"c\.jsonl:301: the line has more than 1 MiB; cut it into several$", [*many, "a" * 2**20], val_documents=9)
    settings: list[tuple[str, dict[str, Any]]] = [
        (
            r"^train: a: weight must be above 0 and at most 1e\+09, got 0$",
            {"train": {"a": {"paths": "x", "weight": 0}}},
        ),
        (r"^train: a: weight must be a number above 0, got none$", {"train": {"a": {"paths": "x", "weight": None}}}),
        (r"^max_length must be an integer in \[4, 1048576\], got 1000000000$", {"max_length": 10**9}),
        (r"^train: a must map paths and weight", {"train": {"a": "x"}}),
        (r"^train: a: paths must be a path or a list of paths, got \[\]$", {"train": {"a": {"paths": []}}}),
        (r"^train: a mixture must name sources", {"train": {}}),
        (r"^train must be a path or a list of paths", {"train": 5}),
        (r"^noise_density must be above 0 and at most 0.5, got 0.6$", {"noise_density": 0.6}),
        (r"^mean_span_length must be at least 1, got 0.5$", {"mean_span_length": 0.5}),
        (r"^overlap must be one of refuse, drop", {"overlap": "x"}),
    ]
    for match, given in settings:
        with pytest.raises(UserError, match=match):
            CorpusDataModule(**cast(Any, {"train": "x"} | given))
    path = write(tmp_path / "c.jsonl", many)
    with pytest.raises(UserError, match=rf"^train: {path} is there twice"):
        build([str(path), f"{tmp_path}/../{tmp_path.name}/c.jsonl"])
    limited = build(str(path), val_documents=9)
    cast(Any, limited.trainer).limit_train_batches = 5
    with pytest.raises(UserError, match=r"^limit_train_batches: not with streaming"):
        limited.setup("fit")
    with pytest.raises(UserError, match=r"^tokenizer: .* has 2 sentinels .* need 5: "):
        build(str(write(tmp_path / "c.jsonl", many)), tokenizer=Tokens(make_tokenizer(2)), max_length=100)
