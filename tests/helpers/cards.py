"""Runs the examples of a model card as a reader does."""

import re
from pathlib import Path

import pytest

_BLOCKS = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def run_card(folder: Path) -> list[dict[str, object]]:
    """Run each Python block of the folder's card in the folder, alone; return the names that each defines."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in _BLOCKS.findall(Path("README.md").read_text(encoding="utf-8")):
            names: dict[str, object] = {}
            exec(compile(block, str(folder / "README.md"), "exec"), names)
            found.append(names)
    return found
