"""Judges restores by what the server computed afterwards, never by what it says of the restore itself.

llama-server answers a restore with the number of tokens that it read, also where it then computes all of them again:
with a sliding window, for recurrent and hybrid models, and in builds in which restoring was broken. Its answer to the
request tells the truth: `timings.cache_n` tokens were taken, `timings.prompt_n` were computed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from enum import Enum

log = logging.getLogger(__name__)

PATIENCE = 2  # restores without effect in a row: one may be another client's doing, which took the slot in between
WHY = (
    "llama-server restored slots and computed their tokens again all the same; that is so with a sliding window (some "
    "builds take them with --swa-full), for recurrent and hybrid models, and where other clients use its slots; "
    "prompts are neither stored nor restored until it is started again"
)


class Effect(str, Enum):
    """What became of a restore."""

    FULL = "full"  # every restored token was taken
    SHORT = "short"  # some were computed again
    NONE = "none"  # all were
    UNKNOWN = "unknown"  # the server's prompt is not the one that we looked up


@dataclass(slots=True)
class Trust:
    """Whether a server's slots are restored. One thread.

    effects:    restores by what became of them.
    is_given:   False after PATIENCE restores in a row without effect.
    """

    effects: dict[str, int] = field(default_factory=lambda: {effect.value: 0 for effect in Effect})
    is_given: bool = True
    _failures: int = 0

    def judge(self, restored: int, prompt_tokens: int, cache_n: int, prompt_n: int) -> Effect:
        """Compare a restore of `restored` of `prompt_tokens` tokens with the counts of the answer."""
        if cache_n + prompt_n != prompt_tokens:
            effect = Effect.UNKNOWN
        elif cache_n >= restored:
            effect = Effect.FULL
        else:
            effect = Effect.SHORT if cache_n > 0 else Effect.NONE
        self.effects[effect.value] += 1
        if effect is Effect.FULL:
            self._failures = 0
        elif effect is Effect.NONE:
            self._failures += 1
            if self._failures >= PATIENCE and self.is_given:
                self.is_given = False
                log.warning(WHY)
        return effect
