"""What the README shows is what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.demo.models import find_smollm2

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippet(language: str, after: str) -> str:
    """The first code block in `language` behind the heading `after`."""
    match = re.search(rf"^```{language}\n(.*?)^```$", README.partition(after)[2], re.MULTILINE | re.DOTALL)
    assert match is not None
    return match[1]


@pytest.mark.real_model
@pytest.mark.timeout(900)
def test_the_python_example_prints_the_hit_that_is_shown(tmp_path: Path) -> None:
    model = find_smollm2()
    if model is None:
        pytest.skip("the demo's model is not converted; `make test` does it")
    code = snippet("python", "## From Python").replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model))
    shown = re.search(r"^```\n(\{'host'.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert shown is not None
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    printed = [
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
        for _ in range(2)
    ]

    assert printed[0].stdout == shown[1], printed[0].stderr
    assert (
        printed[1].stdout == "{'host': 0, 'disk': 512, 'redis': 0, 'computed': 94}\n" + shown[1].splitlines()[1] + "\n"
    )
