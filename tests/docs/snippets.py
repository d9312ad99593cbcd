"""The code blocks of a Markdown file."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^ *```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Snippet:
    """A fenced block: its language, its text and the number of its first line."""

    language: str
    text: str
    line: int

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, without their comments."""
        return [line.split("  #")[0].strip() for line in self.text.splitlines() if line.strip()]


def of(path: Path, heading: str | None = None) -> list[Snippet]:
    """Return the blocks of a file, or of its section with a heading, from the top."""
    text = path.read_text()
    if heading is not None:
        text = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [
        Snippet(found["language"], textwrap.dedent(found["text"]), text[: found.start("text")].count("\n") + 1)
        for found in _BLOCK.finditer(text)
    ]
