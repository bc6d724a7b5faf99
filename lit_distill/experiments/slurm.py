"""Cells as jobs of a Slurm cluster."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_distill.checks import check_int
from lit_distill.errors import UserError
from lit_distill.experiments.cells import LOG, Cell, last_lines, write_failure
from lit_distill.experiments.launchers import Job, Launcher
from lit_distill.experiments.worker import INTERRUPTED, STOPPED, run_cell


class Slurm(Launcher):
    """Jobs of a Slurm cluster, through submitit.

    Args:
        folder: where submitit keeps its files.
        jobs: how many are queued or running at a time; all, if not given.
        parameters: of submitit's ``executor.update_parameters``, such as ``slurm_partition``, ``timeout_min``,
            ``gpus_per_node``; and ``cluster``, by which submitit can be told to run on this machine (``local``).
    """

    # a job that was preempted has saved, and is no fault of the cell's
    again = True

    def __init__(self, folder: Path, jobs: int | None = None, parameters: Mapping[str, Any] | None = None) -> None:
        try:
            import submitit  # type: ignore[import-not-found, unused-ignore] # an extra
        except ModuleNotFoundError as error:
            raise UserError(
                'launcher: slurm needs submitit, which is not installed: pip install "lit_distill[slurm]"'
            ) from error
        self.slots = None if jobs is None else check_int("jobs", jobs, 1)
        given = {"name": "lit_distill", "timeout_min": 24 * 60, **(parameters or {})}
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=given.pop("cluster", "slurm"))
            self._executor.update_parameters(**given)
        except (RuntimeError, TypeError, ValueError, NameError, AssertionError) as error:
            raise UserError(f"slurm: {error}") from error

    def start(self, cell: Cell) -> Job:
        """Submit a job."""
        # to submitit the cell is a function and texts, which the job imports and reads
        return _Submitted(self._executor.submit(Requeued(), str(cell.folder), list(cell.arguments)), cell.folder)


class Requeued:
    """Runs a cell in a job; one that Slurm ends before the cell is queued again, and goes on from the checkpoint."""

    def __call__(self, folder: str, arguments: list[str]) -> int:
        """Run it; the exit code of the worker."""
        return run_cell(folder, arguments)

    def checkpoint(self, folder: str, arguments: list[str]) -> Any:  # noqa: ANN401 - submitit's
        """What submitit queues again when the job is preempted or out of time."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, folder, arguments)


class _Submitted(Job):
    def __init__(self, job: Any, folder: Path) -> None:  # noqa: ANN401 - submitit's
        self._job, self._folder, self._stopped = job, folder, False

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        if self._stopped:
            return INTERRUPTED
        try:
            code: int = self._job.result()
        except Exception as error:  # noqa: BLE001 - whatever became of the job is written down
            if any(line.startswith(STOPPED) for line in last_lines(self._folder / LOG, 1)):
                # its run has saved, and the cluster did not queue it again
                return INTERRUPTED
            write_failure(
                self._folder, 1, f"the job {self._job.job_id} failed: {str(error).strip().rpartition(chr(10))[2]}"
            )
            return 1
        return code

    def interrupt(self) -> None:
        self._stopped = True
        self._job.cancel(check=False)

    kill = interrupt
