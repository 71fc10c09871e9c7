"""Code and links of the documents: README, guides, notebooks."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\{code-cell\} ipython3|[a-z]+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a document in one language: "python", "bash", or "{code-cell} ipython3"."""
    return [code for name, code in BLOCK.findall(path.read_text()) if name == language]


def run(path: Path, codes: list[str]) -> dict[str, Any]:
    """The names that the blocks leave behind, run one after another."""
    names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    for code in codes:
        exec(compile(code, str(path), "exec"), names)
    return names
