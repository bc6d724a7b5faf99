"""What a worker process of LitServe does: it loads the student and answers rows in batches."""

import signal
import sys
import time
from queue import Empty, Queue
from typing import Any

import torch
from litserve import LitAPI  # type: ignore[import-untyped]
from litserve.loops.simple_loops import BatchedLoop  # type: ignore[import-untyped]
from litserve.specs.base import LitSpec  # type: ignore[import-untyped]
from litserve.utils import LitAPIStatus, LoopResponseType  # type: ignore[import-untyped]
from transformers.utils.logging import disable_progress_bar

from lit_distill.errors import UserError
from lit_distill.exporting.engine import EngineName
from lit_distill.exporting.predictor import load_predictor
from lit_distill.serving.answers import Question, answer

PATH = "/predict"


class RowLoop(BatchedLoop):  # type: ignore[misc]  # a class of Any
    """Waits for a row, then takes what else has come, or comes within ``batch_timeout``.

    LitServe's own asks the queue, which is in another process, without a pause.
    """

    def get_batch_requests(self, lit_api: LitAPI, request_queue: "Queue[Any]", transport: Any) -> tuple[Any, Any]:
        """The rows of a batch, and those that waited for longer than a request may take."""
        rows: list[Any] = []
        late: list[Any] = []
        until = 0.0
        while len(rows) < lit_api.max_batch_size:
            try:
                first = not rows and not late
                queue_id, uid, asked, row = request_queue.get(
                    timeout=None if first else max(until - time.monotonic(), 0)
                )
            except Empty:
                break
            if first:
                until = time.monotonic() + lit_api.batch_timeout
            # who has it, in case this worker dies
            self.put_response(transport, queue_id, uid, (), LitAPIStatus.START, LoopResponseType.REGULAR)
            if time.monotonic() - asked > lit_api.request_timeout:
                late.append((queue_id, uid))
            else:
                rows.append((queue_id, uid, row))
        return rows, late


class _NoEndpoint(LitSpec):  # type: ignore[misc]  # a class of Any
    """Keeps LitServe from adding an endpoint of a row a request; `lit_distill.serving.server` adds ours."""

    def __init__(self) -> None:
        super().__init__()
        self.api_path = PATH

    def setup(self, server: Any) -> None:
        """Needs nothing of the server."""


class StudentAPI(LitAPI):  # type: ignore[misc]  # a class of Any
    """A student in a worker.

    Args:
        student: what `load_predictor` takes.
        engine: its engine.
        threads: of each of its operations.
        batch_size: rows that are answered together.
        batch_timeout: seconds to wait for more rows.
    """

    def __init__(
        self, student: str, engine: EngineName | None, threads: int, *, batch_size: int, batch_timeout: float
    ) -> None:
        super().__init__(batch_size, batch_timeout, loop=RowLoop(), spec=_NoEndpoint())
        self.student, self.engine, self.threads = student, engine, threads

    def setup(self, device: str) -> None:
        """Load the student, once a process. A ``UserError`` ends the process after its line."""
        # Ctrl-C is sent to all processes of a terminal: rows in flight are answered before the server ends this one
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        disable_progress_bar()
        torch.set_num_threads(self.threads)
        try:
            self._predictor = load_predictor(self.student, self.engine)
        except UserError as error:
            print(f"lit_distill: error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error

    def decode_request(self, request: Question) -> Question:
        """Rows are sent as they are."""
        return request

    def predict(self, rows: list[Question]) -> list[dict[str, Any]]:
        """Answer a batch of rows."""
        return [one.model_dump() for one in answer(self._predictor, rows)]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Answers are sent as they are."""
        return output
