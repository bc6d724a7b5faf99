"""The notebooks run, and are kept as they ran."""

import asyncio
import gc
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from lit_distill.annotation.record import COLUMNS

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.rglob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTEBOOK_STEPS", "4")
    # read by Lightning
    for name in ("VAL", "TEST"):
        monkeypatch.setenv(f"PL_TRAINER_LIMIT_{name}_BATCHES", "1")
    monkeypatch.setenv("LIT_DISTILL_CACHE", str(tmp_path))
    monkeypatch.chdir(path.parent)
    names = {"__name__": "notebook"}

    async def run_cells() -> None:
        # as in a kernel, an event loop runs; unlike in one, all is imported already
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                exec(cell.source, names)  # noqa: S102 - our own

    asyncio.run(run_cells())
    # the command line looks through the subclasses of modules and data modules
    names.clear()
    gc.collect()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_as_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # from top to bottom, once
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert {output.name for output in outputs if output.output_type == "stream"} <= {"stdout"}
    shown = json.dumps(outputs)
    assert len(shown) < 20_000
    # neither places of a machine nor how long it took
    assert not re.search(r"/(root|home|tmp|work|Users|var)/|\b\d+(\.\d+)? ?(s|ms|seconds|it/s)\b", shown)


def test_the_columns_that_are_shown_are_the_ones_written() -> None:
    shown = (FOLDER / "03_annotate.ipynb").read_text(encoding="utf-8")
    found = re.search(r"with the columns ([\w, ]+)", shown)
    assert found is not None
    assert found[1].split(", ") == list(COLUMNS)


def plain(output: Any) -> Any:
    """An output as text alone, without colours: small, and read by every viewer."""
    if "data" in output:
        output["data"] = {"text/plain": re.sub(r"\x1b\[[\d;]*m", "", output["data"]["text/plain"])}
    return output


def keep_outputs() -> None:
    """Run all notebooks and keep what they print, but for what libraries say to stderr."""
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(path.parent)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if cell.cell_type == "code":
                cell.outputs = [plain(output) for output in cell.outputs if output.get("name") != "stderr"]
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)


if __name__ == "__main__":
    # python -m tests.test_notebooks
    keep_outputs()
