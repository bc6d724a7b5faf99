"""The site: that each command, method, notebook and page is in it, and that what it is made of is right.

`mkdocs build --strict`, in `.ci/run`, says whether it builds and whether its links lead somewhere.
"""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import markdown  # type: ignore[import-untyped]
import nbformat
import pytest
import yaml

from lit_distill import objectives
from lit_distill.messages import COMMANDS
from lit_distill.modules import StepByStepModule
from tests.runs import CONFIGS, REPOSITORY

HOOKS = REPOSITORY / "docs" / "hooks"
OVERLAYS = sorted((CONFIGS / "method").glob("*.yaml"))
MATHS = "{http://www.w3.org/1998/Math/MathML}"


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a hook by name, as mkdocs does, and forgets it."""
    monkeypatch.syspath_prepend(str(HOOKS))
    yield importlib.import_module
    for path in HOOKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def entries(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for each in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from entries(each)


def test_each_page_is_in_the_navigation_and_each_command_has_one() -> None:
    docs = REPOSITORY / "docs"
    named = list(entries(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]))
    written = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert len(named) == len(set(named))
    assert written | {"index.md", "changelog.md", "benchmarks.md"} == set(named)
    assert {Path(name).stem for name in written if name.startswith("commands/")} == set(COMMANDS)
    for command in COMMANDS:
        text = (docs / "commands" / f"{command}.md").read_text()
        assert text.startswith(f"# {command}: "), command
        assert re.search(rf"(-m lit_distill|lit-distill) {command}\b", text), command


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_a_method_has_its_loss_its_drawing_and_what_it_is_taken_from(path: Path, hooks: Any) -> None:
    methods = hooks("methods")
    method = methods.Method(path, REPOSITORY)
    given = yaml.safe_load(path.read_text())["model"]["init_args"]
    assert f"(../configs/method/{path.name})" in (REPOSITORY / "docs" / "methods.md").read_text()
    tasks = StepByStepModule.all_tasks({"student": "s", "tasks": given.get("tasks")})
    terms = {name: task.weight for name, task in tasks.items()}
    for each in given.get("objectives+", ()):
        found = getattr(objectives, each["class_path"])
        terms[each["init_args"].get("name") or found.term or found.__name__.lower()] = each["init_args"]["weight"]
        assert found.__module__.rpartition(".")[2] in methods.READS
        assert f"## `{each['class_path']}`\n\n{found.__doc__.splitlines()[0]}" in method.page()
    shown = re.findall(r"(?:([\d.]+) \\, )?L_\\text\{([^}]+)\}", method.loss())
    assert [(name.replace(" ", "_"), float(weight or 1)) for weight, name in shown] == list(terms.items())
    # `styles` is of this project, `complementary` names a paper that has no number there
    assert path.stem in ("styles", "complementary") or "](https://arxiv.org/abs/" in method.page()
    drawing = ElementTree.fromstring(method.drawing())  # noqa: S314 - our own
    texts = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert sum(any(str(text).endswith(name) for text in texts) for name in terms) == len(terms)
    assert ("teacher" in texts) == ("teachers" in given)
    # nothing is cut off, or outside
    assert not any("…" in str(text) for text in texts)
    width, height = (float(size) for size in drawing.attrib["viewBox"].split()[2:])
    for box in drawing.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(box.attrib["x"]) + float(box.attrib["width"]) <= width
        assert float(box.attrib["y"]) + float(box.attrib["height"]) <= height


def test_formulas_are_mathml(hooks: Any) -> None:
    text = "Half, :math:`\\frac{a}{b_1}`, of ``:math:``\n\n.. math:: x \\geq\n    y^2\n\nand on."
    html = markdown.markdown(text, extensions=[hooks("mathematics").Mathematics()])
    inline, block = (ElementTree.fromstring(found) for found in re.findall("<math.*?</math>", html, re.DOTALL))  # noqa: S314
    fraction = inline.find(f".//{MATHS}mfrac")
    assert fraction is not None
    assert ["".join(part.itertext()) for part in fraction] == ["a", "b1"]
    assert fraction.find(f".//{MATHS}msub") is not None
    assert "".join(block.itertext()) == "x≥y2"
    assert block.attrib["display"] == "block"
    assert "<p>and on.</p>" in html
    # every formula of the package is understood
    for path in sorted((REPOSITORY / "lit_distill").rglob("*.py")):
        for formula in re.findall(r":math:`([^`]+)`", path.read_text()):
            assert "\\" not in "".join(ElementTree.fromstring(hooks("mathematics").mathml(formula)).itertext())  # noqa: S314


def test_a_notebook_is_shown_with_its_outputs(hooks: Any) -> None:
    paths = hooks("pages").notebooks()
    assert {path.name for path in paths} == {path.name for path in (REPOSITORY / "notebooks").rglob("*.ipynb")}
    for path in paths:
        page = hooks("gallery").page(path)
        for cell in nbformat.read(path, as_version=4).cells:
            assert cell.source in page
            for output in cell.get("outputs", ()):
                assert (output.get("text") or output["data"]["text/plain"]).rstrip() in page


def test_links_of_files_outside_of_docs_lead_to_their_pages(hooks: Any) -> None:
    relinked = hooks("pages").relinked
    assert relinked("[a](docs/data.md#own) [b](notebooks/01_quickstart.ipynb)", "README.md", "index.md") == (
        "[a](data.md#own) [b](notebooks/01_quickstart.md)"
    )
    given = "[a](../../benchmarks/README.md) [b](../../configs/method/kl.yaml) [c](https://x.org/y) [d](#e) ![f](f.svg)"
    assert relinked(given, "docs/commands/fit.md", "commands/fit.md") == (
        "[a](../benchmarks.md) [b](../methods/kl.md) [c](https://x.org/y) [d](#e) ![f](f.svg)"
    )
