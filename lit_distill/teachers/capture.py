"""A teacher's distributions of given targets, as the head and draws of each that a store keeps."""

import socket
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from numpy.typing import NDArray
from torch import Tensor

from lit_distill import students
from lit_distill.batch import pad_rows
from lit_distill.errors import UserError
from lit_distill.progress import ticker
from lit_distill.teachers.store import LEVELS, Header, keys_of, revision, write_shard

SHARD = 4096
"""Rows of a file."""

_CHUNK_BYTES = 16 * 2**20
"""Size of the probabilities of a chunk of positions."""


class Capturer:
    """A teacher in memory, which writes rows' distributions into a store.

    Rows are a table of ``source`` and ``target`` token ids. What is stored of a row depends on its ids and the header's
    seed, not on its place; the batches, of ``batch_size`` rows in the table's order, change rounding errors alone.
    """

    def __init__(self, header: Header, batch_size: int, device: str | torch.device) -> None:
        self.header, self.batch_size, self.device = header, batch_size, torch.device(device)
        teacher = students.load(header.teacher, dtype=header.dtype)  # type: ignore[arg-type]  # checked by the command
        self.teacher = teacher.to(self.device).eval().requires_grad_(False)

    def write(self, folder: Path, rows: pa.Table, advance: Callable[[int], None] = lambda rows: None) -> Path:
        """Capture rows and write them as one shard."""
        parts = []
        for start in range(0, len(rows), self.batch_size):
            parts.append(self.capture(rows[start : start + self.batch_size]))
            advance(min(self.batch_size, len(rows) - start))
        return write_shard(folder, rows, np.concatenate(parts))

    @torch.inference_mode()
    def capture(self, rows: pa.Table) -> NDArray[Any]:
        """The records of the target positions of a batch, row by row, see `Header.record`."""
        targets = rows["target"].to_pylist()
        batch = {"rows": pad_rows(rows["source"].to_pylist(), targets)}
        made = self.teacher(move_data_to_device(batch, self.device))
        states = made.states("rows")
        numbers = [_uniform(self.header, *one) for one in zip(keys_of(rows), map(len, targets), strict=True)]
        uniform = torch.from_numpy(np.concatenate(numbers)).to(self.device)
        records = np.empty(len(states), self.header.record)
        size = max(1, _CHUNK_BYTES // (8 * self.header.vocabulary))
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            logits = made.project(states[part])[:, : self.header.vocabulary]
            for name, values in draw(logits, uniform[part], self.header).items():
                records[name][part] = values.cpu().numpy()
        return records


def _uniform(header: Header, key: bytes, positions: int) -> NDArray[np.float64]:
    """Uniform random numbers for a row's positions, a function of its key and the seed, ``(positions, 1 + draws)``."""
    words = blake2b(key, digest_size=16, salt=header.seed.to_bytes(8, "little")).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(words, "little")))
    return generator.random((positions, 1 + header.draws))


def draw(logits: Tensor, uniform: Tensor, header: Header) -> dict[str, Tensor]:
    """The fields of `Header.record`, from a teacher's logits ``(positions, vocabulary)``.

    ``uniform`` are random numbers in [0, 1), ``(positions, 1 + draws)``. The first rounds the head's probabilities to
    multiples of 1 / LEVELS by systematic sampling: sums of the first few are rounded, so that the mass of the tail is
    rounded with them and all remain positive; the expectation of each is exact. The others draw from the tail.
    """
    # in place, as such tensors are large: on a CPU their memory costs more than their numbers
    logs = logits.to(torch.float64, copy=True).div_(header.temperature)
    # an id that is excluded has a logarithm of minus infinity, and an entropy of 0
    logs.sub_(logs.logsumexp(-1, keepdim=True)).clamp_(min=-1e4)
    probabilities = logs.exp()
    top, ids = probabilities.topk(header.head)
    if header.renormalised:
        top = top / top.sum(-1, keepdim=True)
        entropy = torch.special.entr(top).sum(-1)
    else:
        entropy = -torch.einsum("ij,ij->i", probabilities, logs)
    bounds = F.pad(top.cumsum(-1).clamp(max=1), (1, 0))
    if header.renormalised:
        # what rounding errors leave
        bounds[:, -1] = 1
    levels = (bounds * LEVELS + uniform[:, :1]).floor().diff(dim=-1)
    if header.draws:
        tail = torch.cumsum(probabilities.scatter_(1, ids, 0), -1, out=logs)
        drawn = torch.searchsorted(tail, uniform[:, 1:] * tail[:, -1:], right=True).clamp(max=header.vocabulary - 1)
        # a tail that is rounded to nothing needs no ids, and zeros take no space on the disk
        empty = levels.sum(-1, keepdim=True) == LEVELS
        ids = torch.cat([ids, drawn.sort(-1).values.masked_fill(empty, 0)], dim=-1)
    return {"ids": ids, "head": levels, "entropy": entropy}


def capture_on_ray(header: Header, folder: Path, parts: Sequence[pa.Table], batch_size: int, workers: int) -> None:
    """Capture the rows of each part by Ray Data, on machines that all read the teacher and write the folder.

    Uses the cluster of ``RAY_ADDRESS``, else a local one; a worker has a GPU if the cluster has any.
    """
    try:
        import ray.data  # type: ignore[import-not-found, unused-ignore] # an extra
    except ImportError as error:
        raise UserError(f'ray.data cannot be imported ({error}): pip install "lit_distill[ray]"') from error
    ray.init(ignore_reinit_error=True)
    items = [{"rows": _to_bytes(part)} for part in parts]
    done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Worker,
        fn_constructor_args=(header, str(folder.resolve()), batch_size),
        concurrency=workers,
        batch_size=1,
        num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
    )
    with ticker("Capturing", sum(map(len, parts)), unit=" rows") as advance:
        for row in done.iter_rows():
            advance(row["rows"])


class _Worker:
    """What a worker of Ray does."""

    def __init__(self, header: Header, folder: str, batch_size: int) -> None:
        if revision(header.teacher) != header.revision:
            raise UserError(f"teacher: {header.teacher} on {socket.gethostname()} is not {header.revision}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.capturer, self.folder = Capturer(header, batch_size, device), Path(folder)

    def __call__(self, items: dict[str, Any]) -> dict[str, Any]:
        tables = [pa.ipc.open_stream(item).read_all() for item in items["rows"]]
        for rows in tables:
            self.capturer.write(self.folder, rows)
        return {"rows": np.array([len(rows) for rows in tables])}


def _to_bytes(rows: pa.Table) -> bytes:
    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, rows.schema) as writer:
        writer.write_table(rows)
    return bytes(out.getvalue())
