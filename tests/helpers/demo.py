"""Made-up results of a demo: four seconds cold, a quarter of one warm."""

from __future__ import annotations

from kvstore.demo.report import DemoReport, Stage, StageAnswer, Turn


def answer(ttft_s: float, *, tokens: tuple[int, ...] = (1, 2, 3), **reused: int) -> StageAnswer:
    """An answer to a prompt of 1,000 tokens."""
    return StageAnswer(1000, reused, ttft_s, 2 * ttft_s, tokens, "words")


def turn(ttft_s: float, **reused: int) -> Turn:
    """An answer beside a reference with the same tokens."""
    return Turn(answer(ttft_s, **reused), answer(4.0), 4.0)


def report() -> DemoReport:
    """All stages, all identical."""
    stages = (
        Stage("cold", (turn(4.0),)),
        Stage("host", (turn(0.2, host=960),)),
        Stage("disk", (turn(0.25, disk=960),)),
        Stage("redis", (turn(0.3, redis=960),)),
        Stage("conversation", (turn(0.3, host=960), turn(0.2, host=960))),
        Stage("fork", (turn(2.0, host=480),)),
    )
    return DemoReport("tiny", "float32", 2, stages)
