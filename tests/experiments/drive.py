"""A small ``experiment``, to be started, stopped and killed: runs the cells that are in a folder already.

Arguments: the folder, jobs at a time, and ``retry`` to retry what failed.
"""

import sys
from pathlib import Path

from lit_distill.experiments.cells import Cell, State
from lit_distill.experiments.launchers import Local
from lit_distill.experiments.schedule import Board, Watcher, look, run_cells
from tests.experiments.cells import cells_in


class Teller(Watcher):
    """A line for each event on stdout."""

    def changed(self, board: Board, cell: Cell) -> None:
        """Tell it."""
        print(board.states[cell.name], cell.name, flush=True)


if __name__ == "__main__":
    folder, jobs, *retry = sys.argv[1:]
    board = look(cells_in(Path(folder)), retry_failed=bool(retry))
    ended = run_cells(board, Local(int(jobs)), Teller(), pause=0.05, elsewhere_pause=0.1, grace=10)
    sys.exit(130 if not ended else int(board.count(State.DONE) < len(board.cells)))
