"""The made-up workloads: a shared prompt, conversations of several rounds, long documents, nothing shared.

Each is a frozen set of parameters with one method, `make(seed)`; equal parameters and seed make equal requests. The
defaults are LMCache's benchmarks' (multi-round QA, long-document QA), with fewer users and shorter texts: a laptop's
CPU prefills a few hundred tokens a second.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Protocol

from kvstore.errors import ConfigError
from kvstore.load.requests import CHAT, COMPLETIONS, Message, PlannedRequest, Workload
from kvstore.load.text import make_text

ORDERS = ("tile", "random", "interleave")


class Recipe(Protocol):
    """A workload's parameters."""

    def make(self, seed: int) -> Workload:
        """All of its requests."""


@dataclass(frozen=True, slots=True)
class SharedPrompt:
    """Different questions below one system prompt: what a product's assistant sends."""

    requests: int = 20
    system_tokens: int = 1000
    question_tokens: int = 50
    answer_tokens: int = 32

    def make(self, seed: int) -> Workload:
        """The first request computes the system prompt, the others find it."""
        _check_positive(self)
        system = Message("system", make_text(seed, "system", self.system_tokens))
        return Workload(
            "shared-prompt",
            tuple(
                PlannedRequest(
                    number,
                    number,
                    (system, Message("user", make_text(seed, f"question {number}", self.question_tokens))),
                    self.answer_tokens,
                    part="later requests" if number else "first request",
                )
                for number in range(self.requests)
            ),
            CHAT,
            seed,
            asdict(self),
        )


@dataclass(frozen=True, slots=True)
class MultiRound:
    """Users who talk in rounds: one system prompt for all, a history of each user's own that grows with every answer.

    Played round by round: all users ask once before any of them asks again.
    """

    users: int = 4
    rounds: int = 5
    system_tokens: int = 1000
    history_tokens: int = 1000
    question_tokens: int = 50
    answer_tokens: int = 32

    def make(self, seed: int) -> Workload:
        """users * rounds requests."""
        _check_positive(self, may_be_zero=("system_tokens", "history_tokens"))
        requests: list[PlannedRequest] = []
        for turn in range(self.rounds):
            for user in range(self.users):
                question = make_text(seed, f"user {user} question {turn}", self.question_tokens)
                if turn:
                    prompt: tuple[Message, ...] = (Message("user", question),)
                else:
                    history = make_text(seed, f"user {user} history", self.history_tokens)
                    prompt = (Message("user", f"{history}\n\n{question}".lstrip()),)
                    if self.system_tokens:
                        prompt = (Message("system", make_text(seed, "system", self.system_tokens)), *prompt)
                number = len(requests)
                requests.append(
                    PlannedRequest(
                        number,
                        user,
                        prompt,
                        self.answer_tokens,
                        after=number - self.users if turn else None,
                        last=turn == self.rounds - 1,
                        part=f"round {turn + 1}",
                    )
                )
        return Workload("multi-round", tuple(requests), CHAT, seed, asdict(self))


@dataclass(frozen=True, slots=True)
class LongDoc:
    """Documents, each asked about several times.

    asks:       questions for each document.
    order:      tile (1 2 3 1 2 3), random, or interleave (1 1 2 2 3 3).
    hit_ratio:  share of the later questions that are about the same document; the others get a document of their own.
    """

    documents: int = 4
    document_tokens: int = 2000
    asks: int = 2
    order: str = "tile"
    hit_ratio: float = 1.0
    question_tokens: int = 30
    answer_tokens: int = 32

    def make(self, seed: int) -> Workload:
        """documents * asks requests."""
        _check_positive(self, may_be_zero=("hit_ratio",))
        if self.order not in ORDERS:
            raise ConfigError(f"order {self.order!r} is unknown; it is one of {', '.join(ORDERS)}")
        if self.hit_ratio > 1:
            raise ConfigError(f"hit_ratio {self.hit_ratio} is no share; it lies between 0 and 1")
        asked = [document for _ in range(self.asks) for document in range(self.documents)]
        if self.order == "interleave":
            asked.sort()
        elif self.order == "random":
            random.Random(f"{seed}/order").shuffle(asked)
        requests = []
        seen: set[int] = set()
        num_repeats = 0
        for number, document in enumerate(asked):
            name, part = f"document {document}", "first question"
            if document in seen:
                # Spread evenly, not drawn: of every n repeats the same share hits, however few there are.
                hits = int((num_repeats + 1) * self.hit_ratio) > int(num_repeats * self.hit_ratio)
                num_repeats += 1
                name, part = (name, "asked again") if hits else (f"document {document}, {number}", "made to miss")
            seen.add(document)
            text = make_text(seed, name, self.document_tokens)
            question = make_text(seed, f"question {number}", self.question_tokens)
            prompt = (Message("user", f"{text}\n\nQuestion: {question}\nAnswer:"),)
            requests.append(PlannedRequest(number, number, prompt, self.answer_tokens, part=part))
        return Workload("long-doc", tuple(requests), COMPLETIONS, seed, asdict(self))


@dataclass(frozen=True, slots=True)
class NoReuse:
    """Prompts that share nothing: what the cache costs where it cannot help."""

    requests: int = 12
    prompt_tokens: int = 1000
    answer_tokens: int = 32

    def make(self, seed: int) -> Workload:
        """As many different prompts."""
        _check_positive(self)
        return Workload(
            "no-reuse",
            tuple(
                PlannedRequest(
                    number,
                    number,
                    (Message("user", make_text(seed, f"prompt {number}", self.prompt_tokens)),),
                    self.answer_tokens,
                )
                for number in range(self.requests)
            ),
            COMPLETIONS,
            seed,
            asdict(self),
        )


RECIPES: dict[str, type[Recipe]] = {
    "shared-prompt": SharedPrompt,
    "multi-round": MultiRound,
    "long-doc": LongDoc,
    "no-reuse": NoReuse,
}


def warm_up(num_requests: int, seed: int) -> Workload:
    """Short prompts that share nothing with any workload's."""
    prompts = [(Message("user", make_text(seed, f"warm-up {number}", 64)),) for number in range(num_requests)]
    requests = tuple(PlannedRequest(number, number, prompt, answer_tokens=4) for number, prompt in enumerate(prompts))
    return Workload("warm-up", requests, COMPLETIONS, seed)


def _check_positive(recipe: object, may_be_zero: tuple[str, ...] = ()) -> None:
    for name in recipe.__slots__:  # type: ignore[attr-defined]
        value = getattr(recipe, name)
        if isinstance(value, str):
            continue
        least = 0 if name in may_be_zero else 1
        if value < least:
            raise ConfigError(f"{name} = {value} is too small; it must be at least {least}")
