"""The notebooks as pages, with the outputs that they are kept with."""

import json
from pathlib import Path
from typing import Any


def page(notebook: Path) -> str:
    """A notebook as Markdown."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(part for cell in cells for part in _cell(cell)) + "\n"


def _cell(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    return [_fenced(source, "python"), *(_fenced(_text(output), "text") for output in cell["outputs"])]


def _text(output: dict[str, Any]) -> str:
    """What an output shows: a stream's text, or a result as text, which is all that the notebooks keep."""
    return "".join(output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"])


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"
