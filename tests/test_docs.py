"""Documents name files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("findings/*.md")])
PREFIXES = ("", "kvstore/", "kvstore/service/", "docs/", "findings/")
NAMED = re.compile(
    r"\b((?:radix|eviction|kvstore|connectors|plan|move|service|lab|tiers|tests|examples|docs)/[\w/.-]+\.(?:py|c|h|md|sh|png))\b"
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    named = {match[1] for match in NAMED.finditer(document.read_text())}

    assert [name for name in sorted(named) if not any((ROOT / prefix / name).exists() for prefix in PREFIXES)] == []
