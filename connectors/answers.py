"""Which decoded pages a connector saves: the setting `save`, decided once when it opens.

"all" saves them, "prompt" none, "auto" those that the next turn can begin with, by what the model's chat template keeps
(kvstore.prefix.answers). Where that cannot be known, "auto" does what the connector does by default.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from kvstore.errors import KVStoreError
from kvstore.prefix.answers import AnswerJudge, AnswerRules, AnswerVerdict
from kvstore.prefix.template import ModelTemplate
from radix.tokens import TokenArray

AUTO, ALL, PROMPT = "auto", "all", "prompt"
RENDER_S = 2.0  # for one rendering; a real template takes milliseconds
NOT_KNOWN = AnswerRules((), (), "no tokenizer with a chat template is at hand")


@dataclass(frozen=True, slots=True)
class SavedAnswers:
    """The setting as it works for one model.

    save:    AUTO, ALL or PROMPT. rules: of the template, for AUTO.
    default: what is done where no rule is known, ALL or PROMPT.
    """

    save: str
    rules: AnswerRules
    default: str

    @property
    def saves_any(self) -> bool:
        """Whether any answer may be saved."""
        if self.save == AUTO:
            return not self.rules.keeps_none if self.rules.turns else self.default == ALL
        return self.save == ALL

    @property
    def told(self) -> str:
        """The setting, what it saves and why, for a log."""
        if self.save != AUTO:
            return self.save
        if not self.rules.turns:
            return f"auto, as {self.default!r}: {self.rules.why}"
        return f"auto, {self.rules.why}"

    def judge(self, prompt: Sequence[int] | TokenArray) -> AnswerJudge | None:
        """Return the judge of one answer; None: it is not saved, as configured."""
        save = self.save
        if save == AUTO:
            judge = self.rules.judge(prompt)
            if judge.verdict is not AnswerVerdict.UNKNOWN:
                return judge
            save = self.default
        return AnswerJudge.decided(AnswerVerdict.SAVE) if save == ALL else None


def decide(save: str, default: str, find: Callable[[], ModelTemplate], log: logging.Logger) -> SavedAnswers:
    """Settle what is saved, and log it in one line. Takes about a second for "auto", 20 s at the most; never raises.

    find: the template and the tokenizer of the model; raises KVStoreError where there is none.
    """
    saved = SavedAnswers(save, _rules(find) if save == AUTO else NOT_KNOWN, default)
    log.info("kvstore: decoded pages that are saved: %s", saved.told)
    return saved


def _rules(find: Callable[[], ModelTemplate]) -> AnswerRules:
    if find_spec("jinja2") is None:
        return AnswerRules((), (), "Jinja is not installed")
    from kvstore.prefix.answer_trials import learn
    from kvstore.prefix.rendering import Limits, RenderProcess

    try:
        model = find()
        with RenderProcess(Limits(seconds=RENDER_S)) as process:
            return learn(model, process)
    except (KVStoreError, OSError) as error:
        return AnswerRules((), (), str(error)[:200])
    except Exception as error:  # a template is a program of somebody else's, a tokenizer a library: opening goes on
        return AnswerRules((), (), f"{type(error).__name__}: {str(error)[:200]}")
