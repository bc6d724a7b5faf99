"""A small ``experiment``, to be started, stopped and killed: runs the cells that are in a folder already.

Arguments: the folder, and jobs at a time.
"""

import sys
from pathlib import Path

from lit_distill.experiments.cells import Cell, State
from lit_distill.experiments.launch import Board, Local, run_cells
from tests.experiments.cells import cells_in, look


def show(board: Board, cell: Cell) -> None:
    """A line for each event on stdout."""
    print(cell.name, board[cell], flush=True)


if __name__ == "__main__":
    folder, jobs = sys.argv[1:]
    board = look(cells_in(Path(folder)))
    ended = run_cells(board, Local(int(jobs)), show, pause=0.02, grace=10)
    sys.exit(130 if not ended else int(set(board.values()) != {State.DONE}))
