"""Formulas as the docstrings write them, ``:math:`...` `` and ``.. math::``, shown as MathML: no script, no network."""

import re

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig

_BLOCK = re.compile(r"^\.\. math::(?P<first>.*)\n?(?P<rest>(?:[ \t]+\S.*\n?|\n(?=[ \t]+\S))*)", re.MULTILINE)


def mathml(latex: str, display: str = "inline") -> str:
    """A formula as a ``<math>`` element."""
    # the converter leaves no space after a function's name
    return convert(re.sub(r"\\(log|exp) ", r"\\\1 \\, ", " ".join(latex.split())), display=display)


class _Inline(InlineProcessor):
    # as in the base class, whose own names the types do not fix
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:
        return self.md.htmlStash.store(mathml(m[1])), m.start(0), m.end(0)


class _Block(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        def shown(match: re.Match[str]) -> str:
            formula = mathml(match["first"] + " " + match["rest"], "block")
            return "\n" + self.md.htmlStash.store(f'<div class="formula">{formula}</div>') + "\n\n"

        return _BLOCK.sub(shown, "\n".join(lines)).split("\n")


class Mathematics(Extension):
    """The Markdown extension."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Read blocks before the parser sees their indentation, and inline formulas before code."""
        md.preprocessors.register(_Block(md), "math_block", 27)
        md.inlinePatterns.register(_Inline(r":math:`([^`]+)`", md), "math_inline", 195)


def on_config(config: MkDocsConfig) -> None:
    """Add the extension, for pages and docstrings alike."""
    config.markdown_extensions.append(Mathematics())
