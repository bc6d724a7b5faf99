"""Bad inputs for every command: made from the arguments' own types, and by changing files that are right."""

import csv
import io
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger

from lit_distill.annotation.store import FILE, METADATA
from lit_distill.commands.dispatch import dispatch
from lit_distill.commands.parser import Parser
from lit_distill.messages import known_subclasses
from lit_distill.records import PREDICTIONS, RECORD
from tests.runs import run, run_folders, small_toy, write_release
from tests.students import make_student_folder

HUGE = [2**31, 10**12, 10**30, 1e20, -(10**12)]
WRONG: list[Any] = [None, "", " ", "x", 0, -1, 1, 0.5, True, [], [1], [None], {}, {"a": 1}, "no/such/file", *HUGE]
ODD: list[Any] = [
    float("nan"), float("inf"), -float("inf"), "\0", "a" * 5000, "é", "{x}", "{0.__class__}", "\ud800", "[", "a: b: c",
]  # fmt: skip
PATHS = ["blocked/below", "blocked", "loop/below", "/proc/none/below", "/dev/full", "a" * 300, ".", "/", ""]
DEEP = 5000

PLACES = ("blocked", "loop")
"""A file where a folder is wanted, and a link to itself."""


@dataclass(frozen=True)
class Case:
    """One bad input."""

    name: str
    arguments: list[str]
    names: str = ""
    """What the line has to name."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Path in the folder of the case -> content."""
    others: tuple[str, ...] = ()
    """Or one of these."""
    file_size: int | None = None
    """Bytes that a file may hold, as on a full disk."""


@dataclass(frozen=True)
class Assets:
    """Inputs that are right."""

    root: Path
    student: Path
    """With weights."""
    scratch: Path
    """A configuration and a tokenizer."""
    run: Path
    checkpoint: Path
    release: Path
    base: Mapping[str, list[str]]
    """Command -> arguments with which it does what it is for."""


def make_assets(root: Path) -> Assets:
    """Make them, in the working directory."""
    scratch = make_student_folder(root / "tiny")
    run("fit", small_toy(scratch, 1))
    done = run_folders()[-1].resolve()
    checkpoint = next(iter((done / "checkpoints").glob("best*.ckpt")))
    release = write_release(root / "release")
    toy = small_toy(scratch, 1)
    inspect = ["--data=ToyDataModule", f"--data.tokenizer={scratch}", "--data.train_size=4", "--data.val_size=2"]
    teacher = ["--teacher=OpenAITeacher", "--teacher.model=m", "--teacher.base_url=http://127.0.0.1:9/v1"]
    base = {
        "fit": toy,
        "test": [*toy, f"--ckpt_path={checkpoint}"],
        "predict": [*toy, f"--ckpt_path={checkpoint}"],
        "inspect": [*inspect, "--data.test_size=2"],
        "annotate": ["--data=ToyDataModule", "--data.train_size=4", *teacher, "--out=annotations", "--dry_run"],
        "compare": [str(done), "--resamples=100"],
        "experiment": [f"--config={root / 'grid.yaml'}", "--dry_run"],
    }
    (root / "grid.yaml").write_text(json.dumps({"base": str(done / "config.yaml"), "grid": {"seed": [0]}}))
    (root / "rows.jsonl").write_bytes(as_lines(ROWS))
    return Assets(root, done / "student", scratch, done, checkpoint, release, base)


# ---------------------------------------------------------------------- arguments


class _Captured(BaseException):
    def __init__(self, parser: Any) -> None:
        self.parser = parser


def parser_of(command: str) -> Any:
    """The parser that a command makes."""

    def capture(self: Any, *args: object, **kwargs: object) -> None:
        raise _Captured(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", capture)
        try:
            dispatch([command])
        except _Captured as captured:
            subparsers = captured.parser._subcommands_action
            return captured.parser if subparsers is None else subparsers._name_parser_map[command]
    raise AssertionError(f"{command} parses nothing")


def arguments_of(parser: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a parser with its type."""
    for action in parser._actions:
        if action.option_strings and not {"help", "print_config", "print_shtab"} & {action.dest.split(".")[-1]}:
            if action.option_strings[0].endswith(".help") or action.dest.startswith("print_"):
                continue
            yield action.dest, getattr(action, "_typehint", None) or action.type


def class_arguments(base: str, key: str) -> Iterator[tuple[str, str, Any]]:
    """Each class below one, with the keys of its arguments and their types."""
    for name, found in sorted(known_subclasses(base).items()):
        if found.__module__.startswith("lit_distill.") and not getattr(found, "__abstractmethods__", None):
            parser = LightningArgumentParser()
            parser.add_class_arguments(found, "init_args")
            for argument, kind in arguments_of(parser):
                if argument != "init_args":
                    yield name, f"{key}.{argument}", kind


def bad_values(kind: Any) -> list[Any]:
    """Values that are wrong for a type, and those at the ends of what it allows."""
    leaves = set(_leaves(kind))
    values = [*WRONG, *ODD]
    if leaves & {str, Path} or not leaves:
        values += PATHS
    for literal in (leaf for leaf in leaves if isinstance(leaf, str)):
        values += [literal + "s", literal.upper(), [literal]]
    return values


def _leaves(kind: Any) -> Iterator[Any]:
    if get_origin(kind) is Literal:
        yield from (value for value in get_args(kind))
    elif get_args(kind):
        for part in get_args(kind):
            yield from _leaves(part)
    elif isinstance(kind, type):
        yield kind


def nested(key: str, value: Any) -> dict[str, Any]:
    """A key with dots as mappings in each other."""
    for part in reversed(key.split(".")):
        value = {part: value}
    found: dict[str, Any] = value
    return found


def as_yaml(value: Any) -> bytes:
    """YAML of whatever can be said in it; a character that is none goes as bytes that are none."""
    return yaml.dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")


def argument_cases(assets: Assets, draw: random.Random) -> Iterator[Case]:
    """Every argument of every command with every value that is wrong for its type."""
    bases = {
        "model": "lit_distill.modules.base.DistillModule",
        "data": "lit_distill.data.base.RationaleDataModule",
        "teacher": "lit_distill.teachers.base.Teacher",
    }
    own_data: dict[str, dict[str, Any]] = {
        "JSONLDataModule": {"test": str(assets.root / "rows.jsonl"), "train": str(assets.root / "rows.jsonl")},
    }
    for command, base in assets.base.items():
        keys: list[tuple[str | None, str, Any]] = [(None, key, kind) for key, kind in arguments_of(parser_of(command))]
        groups = [group for group in bases if (None, group) in {(None, key) for _, key, _ in keys}]
        for group in groups:
            if command in ("test", "predict") or (command == "inspect" and group == "model"):
                continue
            if command == "annotate" and group == "data":
                continue
            keys += list(class_arguments(bases[group], group))
        if command in ("test", "predict"):
            keys = [one for one in keys if one[1].split(".")[0] not in ("checkpoint", "validation")]
        if command == "fit":
            own = LightningArgumentParser()
            own.add_class_arguments(CSVLogger, "init_args")
            keys += [("CSVLogger", f"trainer.logger.{key}", kind) for key, kind in arguments_of(own)]
        for name, key, kind in keys:
            if key in ("config", "init_args") and command == "experiment":
                continue
            for value in bad_values(kind):
                group = key.split(".")[0]
                config: dict[str, Any] = nested(key, value)
                if name == "CSVLogger":
                    config["trainer"]["logger"]["class_path"] = name
                elif name is not None:
                    given: dict[str, Any] = own_data.get(name, {})
                    if group == "data" and name != "ToyDataModule" and not given:
                        given = {"data_dir": str(assets.release)}
                    if group == "teacher":
                        given = {"model": "m"}
                    if group == "model":
                        given = {"student": str(assets.scratch), "from_scratch": True, "max_label_length": 3}
                    if group == "data" and command == "inspect":
                        given = {"tokenizer": str(assets.scratch)} | given
                    config[group] = {"class_path": name, "init_args": given | config[group].get("init_args", {})}
                flag = (name is None and draw.random() < 0.5) or command == "experiment"
                label = f"{command} {name or ''} {key}={value!r:.60}"
                if flag:
                    text = value if isinstance(value, str) else yaml.dump(value, default_flow_style=True, width=10**6)
                    text = text.removesuffix("\n...\n").strip("\n")
                    if "\0" in text or "\ud800" in text:
                        continue
                    yield Case(label, [command, *base, f"--{key}={text}"], key, others=(repr(value)[:300],))
                else:
                    overlay = {"over.yaml": as_yaml(config)}
                    # a teacher in this process looks for its model or tokenizer before all else
                    others = (repr(value)[:300], *(["cannot load"] if group == "teacher" else []))
                    yield Case(label, [command, *base, "--config=over.yaml"], key, overlay, others)
            # no value, on the command line
            yield Case(f"{command} {key} without a value", [command, *base, f"--{key.replace('.init_args', '')}"], key)


# ---------------------------------------------------------------------- files


def changed_tree(value: Any, draw: random.Random) -> Any:
    """A value in which one place holds something else, or is gone."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value, key=str))
        rest = {name: one for name, one in value.items() if name != key}
        return rest if draw.random() < 0.15 else {**value, key: changed_tree(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        return [*value[:place], changed_tree(value[place], draw), *value[place + 1 :]]
    return draw.choice([*WRONG, *ODD])


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bytes that are cut, overwritten or put in."""
    place = draw.randrange(len(content) + 1)
    insert = draw.choice([b"\0", b"\xff\xfe", b"\xf0\x28", b"\\ud800", b"\n", b'"', b"}", b"9" * 6000, b"\t", b"{{"])
    changes: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: content[:place],
        lambda: content[place:],
        lambda: content[:place] + insert + content[place:],
        lambda: content[:place] + insert + content[place + len(insert) :],
        lambda: content + content,
        lambda: content.decode("latin-1").encode("utf-16"),
        lambda: b"[" * DEEP + b"]" * DEEP,
        lambda: b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        lambda: draw.randbytes(200),
    ]
    return draw.choice(changes)()


def bombs(merge: bool = False) -> bytes:
    """YAML of ten lines that stands for 10^10 values."""
    lines = ["a: &a {k: [x, x, x, x, x, x, x, x, x, x]}"]
    for before, name in zip("abcdefghij", "bcdefghijk", strict=True):
        aliases = ", ".join([f"*{before}"] * 10)
        lines.append(f"{name}: &{name} {{<<: [{aliases}]}}" if merge else f"{name}: &{name} [{aliases}]")
    return "\n".join(lines).encode()


def mapping_file(content: Any, write: Callable[[Any], bytes], draw: random.Random) -> bytes:
    """A file of a value, changed in one way or another."""
    if draw.random() < 0.55:
        return write(changed_tree(content, draw))
    return changed_bytes(write(content), draw)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def as_lines(rows: list[Any]) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in rows) if isinstance(rows, list) else as_json(rows)


def as_csv(rows: Any) -> bytes:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return str(rows).encode("utf-8", "replace")
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)) or ["input"])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode("utf-8", "replace")


def parquet(rows: list[dict[str, Any]], draw: random.Random) -> bytes:
    """A Parquet file whose columns, or what other tools left in its metadata, are not what is read."""
    columns: dict[str, Any] = {
        name: pa.array([row.get(name) for row in rows]) for name in dict.fromkeys(key for row in rows for key in row)
    }
    name = draw.choice(sorted(columns))
    columns[name] = draw.choice(
        [
            pa.array([b"\xff"] * len(rows)),
            pa.array([None] * len(rows)),
            pa.array([[1]] * len(rows)),
            pa.array([{"a": 1}] * len(rows)),
            pa.array([1e308] * len(rows)),
            pa.array([2**62] * len(rows)),
            pa.array([""] * len(rows)),
        ]
    )
    told = draw.choice(["", "{", "[]", '{"info": 3}', '{"info": {"features": {"a": {"_type": "No"}}}}', "null", '"x"'])
    table = pa.table(columns).replace_schema_metadata({"huggingface": told, "lit_distill": told})
    out = io.BytesIO()
    pq.write_table(table, out)
    found = out.getvalue()
    return found if draw.random() < 0.7 else changed_bytes(found, draw)


ROWS: list[dict[str, Any]] = [
    {"id": f"r{i}", "input": f"cat {i} ?", "label": "cat", "choices": ["cat", "dog"], "rationale": "because a"}
    | {"teacher_label": "cat"}
    for i in range(12)
]


def file_cases(assets: Assets, draw: random.Random) -> Iterator[Case]:
    """Endless: hostile files of every kind that a command reads."""
    makers = [
        config_file, rows_file, rationales_store, student_folder, checkpoint_file, run_folder, grid_file,
        prompt_file, released_file, demonstrations_file, full_disk,
    ]  # fmt: skip
    while True:
        for make in makers:
            yield make(assets, draw)


def config_file(assets: Assets, draw: random.Random) -> Case:
    content = yaml.safe_load((assets.run / "config.yaml").read_text())
    command = draw.choice(["fit", "inspect"])
    if draw.random() < 0.15:
        found = draw.choice([bombs(), bombs(merge=True), b"&a [*a]", b"data: &d {init_args: *d}", b"!!python/none x"])
    else:
        found = mapping_file(content, as_yaml, draw)
    limits = ["--trainer.max_steps=1"] if command == "fit" else []
    return Case(f"config of {command}", [command, "--config=c.yaml", *limits], "", {"c.yaml": found})


def rows_file(assets: Assets, draw: random.Random) -> Case:
    writers: dict[str, Callable[[Any], bytes]] = {"jsonl": as_lines, "json": as_json, "csv": as_csv}
    suffix = draw.choice([*writers, "parquet"])
    content = mapping_file(ROWS, writers[suffix], draw) if suffix in writers else parquet(ROWS, draw)
    name = f"rows.{suffix}"
    source = [f"--data.test={name}"] if draw.random() < 0.5 else [f"--data.train={name}"]
    if draw.random() < 0.3:
        template = ["{input:>9999999999}", "{input.x}", "{", "{}", "{input!z}", "{label:d}", "{input:{id}}"]
        source.append(f"--data.input_template={draw.choice(template)}")
    arguments = ["inspect", "--data=JSONLDataModule", f"--data.tokenizer={assets.scratch}", *source]
    return Case(f"rows in {suffix}", arguments, "", {name: content})


def rationales_store(assets: Assets, draw: random.Random) -> Case:
    told = [
        {"id": f"toy-train-{i}", "split": "train", "sample": 0, "teacher": "m", "text": "x", "rationale": "because",
         "label": "cat", "key": f"{i:064x}", "prompt": "p", "settings": "s", "agrees": True}
        for i in range(4)
    ]  # fmt: skip
    files = {f"told/{FILE}": mapping_file(told, as_lines, draw)}
    if draw.random() < 0.3:
        files = {"told/rationales.parquet": parquet(told, draw)}
    if draw.random() < 0.3:
        files[f"told/{METADATA}"] = mapping_file({"jobs": [{"teacher": "m"}], "format": 1}, as_json, draw)
    if draw.random() < 0.3:
        return Case("store to go on with", ["annotate", *assets.base["annotate"], "--out=told"], "", files)
    conditions = ["none", "label_agrees", "agrees", "builtins.open", "os._exit", "agrees and", "(" * 500, "votes > 1"]
    chosen = f"--data.rationale_filter={draw.choice(conditions)}"
    return Case("rationales", ["inspect", *assets.base["inspect"], "--data.rationales=told", chosen], "", files)


def student_folder(assets: Assets, draw: random.Random) -> Case:
    files = {f"s/{path.name}": path.read_bytes() for path in sorted(assets.student.iterdir()) if path.is_file()}
    name = draw.choice(["config.json"] * 4 + sorted(path.removeprefix("s/") for path in files))
    if name.endswith(".json"):
        content = json.loads(files[f"s/{name}"])
        files[f"s/{name}"] = mapping_file(content, as_json, draw)
        if name == "config.json" and draw.random() < 0.5:
            numbers = [key for key, value in content.items() if isinstance(value, int | float)]
            value = draw.choice([0, -1, 10**6, 10**9, 10**18, 2**70, 0.5, 1e308, "1", None])
            files[f"s/{name}"] = as_json(content | {draw.choice(numbers): value})
    else:
        files[f"s/{name}"] = changed_bytes(files[f"s/{name}"], draw)
    if draw.random() < 0.1:
        del files[f"s/{name}"]
    scratch = f"--model.from_scratch={draw.choice(['true', 'false'])}"
    return Case(f"student's {name}", ["fit", *assets.base["fit"], "--model.student=s", scratch], "", files)


def checkpoint_file(assets: Assets, draw: random.Random) -> Case:
    content = assets.checkpoint.read_bytes()
    if draw.random() < 0.8:
        found = torch.load(io.BytesIO(content), weights_only=True)
        found = changed_checkpoint(found, draw)
        out = io.BytesIO()
        torch.save(found, out)
        content = out.getvalue()
    else:
        content = changed_bytes(content, draw)
    command = draw.choice(["fit", "test", "predict", "validate"])
    base = [one for one in assets.base["fit"] if "max_steps" not in one]
    more = (
        ["--trainer.max_steps=2"] if draw.random() < 0.8 else ["--trainer.max_steps=2", "--model.optimizer=adafactor"]
    )
    return Case(f"checkpoint for {command}", [command, *base, *more, "--ckpt_path=c.ckpt"], "", {"c.ckpt": content})


def changed_checkpoint(value: Any, draw: random.Random) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        if draw.random() < 0.25:
            return {name: one for name, one in value.items() if name != key}
        return {**value, key: changed_checkpoint(value[key], draw)}
    if isinstance(value, torch.Tensor):
        nothing = torch.zeros(0)
        return draw.choice([value.reshape(-1), nothing, value.to(torch.int8), torch.full_like(value, 127), None, "x"])
    if isinstance(value, list) and value and draw.random() < 0.7:
        return [*value[:-1], changed_checkpoint(value[-1], draw)]
    return draw.choice([None, 0, -1, 10**12, "x", [], {}, 1.5, [1], {"a": 1}])


def run_folder(assets: Assets, draw: random.Random) -> Case:
    files = {f"run/{name}": (assets.run / name).read_bytes() for name in (RECORD, PREDICTIONS, "config.yaml")}
    name = draw.choice([RECORD, RECORD, PREDICTIONS])
    if name == RECORD:
        files[f"run/{name}"] = mapping_file(json.loads(files[f"run/{name}"]), as_json, draw)
    else:
        rows = [json.loads(line) for line in files[f"run/{name}"].splitlines()]
        files[f"run/{name}"] = mapping_file(rows, as_lines, draw)
    others = [str(assets.run)] if draw.random() < 0.5 else []
    return Case(f"run's {name}", ["compare", "run", *others, "--resamples=100"], "", files)


def grid_file(assets: Assets, draw: random.Random) -> Case:
    content = {
        "base": str(assets.run / "config.yaml"),
        "out": "cells",
        "set": {"trainer.max_steps": 1, "data.train_size": 4},
        "grid": {"method": ["standard", "step_by_step"], "seed": [0, 1]},
        "when": [{"if": {"method": "standard"}, "set": {"model.warmup_steps": 1}}],
        "tolerance": 1.0,
        "deviations": ["none"],
    }
    found = bombs() if draw.random() < 0.05 else mapping_file(content, as_yaml, draw)
    return Case("grid", ["experiment", "--config=g.yaml", "--dry_run"], "", {"g.yaml": found})


def prompt_file(assets: Assets, draw: random.Random) -> Case:
    source = Path(__file__).parents[2] / "lit_distill" / "data" / "prompts" / "toy.yaml"
    found = bombs() if draw.random() < 0.05 else mapping_file(yaml.safe_load(source.read_text()), as_yaml, draw)
    return Case("prompt", ["annotate", *assets.base["annotate"], "--prompt=p.yaml"], "", {"p.yaml": found})


def demonstrations_file(assets: Assets, draw: random.Random) -> Case:
    found = mapping_file(ROWS, as_lines, draw)
    near = ["--nearest_demonstrations"] if draw.random() < 0.3 else []
    arguments = ["annotate", *assets.base["annotate"], "--demonstrations=d.jsonl", *near]
    return Case("demonstrations", arguments, "", {"d.jsonl": found})


def released_file(assets: Assets, draw: random.Random) -> Case:
    name = draw.choice(["cqa", "svamp", "esnli", "anli1"])
    files = {
        f"d/{path.relative_to(assets.release)}": path.read_bytes() for path in (assets.release / name).rglob("*.json")
    }
    chosen = draw.choice(sorted(files))
    try:
        rows: list[Any] = [json.loads(line) for line in files[chosen].splitlines()]
        whole = "CoT" in chosen
        files[chosen] = mapping_file(rows[0] if whole else rows, as_json if whole else as_lines, draw)
    except ValueError:
        files[chosen] = changed_bytes(files[chosen], draw)
    classes = {"cqa": "CQA", "svamp": "SVAMP", "esnli": "ESNLI", "anli1": "ANLI"}
    data = [f"--data={classes[name]}DataModule", "--data.data_dir=d", f"--data.tokenizer={assets.scratch}"]
    return Case(f"released {chosen}", ["inspect", *data], "", files)


def full_disk(assets: Assets, draw: random.Random) -> Case:
    command = draw.choice(["fit", "predict", "inspect", "annotate", "compare"])
    more = {
        "annotate": ["--dry_run=false"],
        "predict": ["--predictions=answers.jsonl"],
    }.get(command, [])
    arguments = [command, *assets.base[command], *more]
    return Case(f"full disk for {command}", arguments, "", file_size=draw.choice([0, 100, 2000, 20_000]))
