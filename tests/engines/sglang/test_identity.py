"""What names the maker of a page, against SGLang's own arguments."""

from __future__ import annotations

import pytest
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.server_args import ServerArgs

from connectors.sglang.identity import ARGUMENTS, DRAFT_ARGUMENTS, FILES, FROM_ELSEWHERE


@pytest.mark.parametrize("name", [*ARGUMENTS, *DRAFT_ARGUMENTS, *FILES, "weight_cache_mode", "download_dir"])
def test_every_argument_that_is_part_of_a_name_is_one_of_sglangs(name: str) -> None:
    assert hasattr(ServerArgs, name)


def test_every_format_of_weights_that_come_from_elsewhere_is_one_of_sglangs() -> None:
    assert set(FROM_ELSEWHERE) < {one.value for one in LoadFormat}
