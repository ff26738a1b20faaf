"""A fingerprint tells engines apart, and days not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from kvstore.prefix.fingerprint import fingerprint
from kvstore.prefix.rendering import NOON, RenderProcess, Template
from tests.kvstore.prefix import templates

NOW = datetime.fromtimestamp(NOON, timezone.utc)


def test_equal_engines_have_equal_ones_and_another_engine_another(process: RenderProcess) -> None:
    template = Template(templates.KEY_ORDER)

    def of(**options: Any) -> str:
        return fingerprint(lambda messages, tools: process.render(template, messages, tools=tools, **options), NOW)

    assert of() == of()
    assert len(of()) == 16
    assert of(engine="bare") != of()


def test_a_number_that_is_written_differently_shows() -> None:
    def render(messages: Sequence[Any], tools: Sequence[Any]) -> str:
        return json.dumps([messages, tools])

    def without_fractions(messages: Sequence[Any], tools: Sequence[Any]) -> str:
        return render(messages, tools).replace("1.0", "1")

    assert fingerprint(render, NOW) != fingerprint(without_fractions, NOW)


def test_the_date_of_today_is_left_out(process: RenderProcess) -> None:
    template = Template(templates.DATE)

    def on(day: float) -> str:
        clock = NOON + 86_400 * day
        return fingerprint(
            lambda messages, tools: process.render(template, messages, tools=tools, clock=clock),
            datetime.fromtimestamp(clock, timezone.utc),
        )

    assert on(0) == on(45)


def test_an_engine_that_raises_has_one_too() -> None:
    def refuse(messages: Sequence[Any], tools: Sequence[Any]) -> str:
        raise ValueError("no")

    assert len(fingerprint(refuse, NOW)) == 16
