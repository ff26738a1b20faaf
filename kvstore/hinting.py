"""Hints on their way to a store: which prompt each action means, the same for all stores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from kvstore.errors import RequestError
from kvstore.hints.actions import HintAction, HintKind
from kvstore.hints.envelope import parse
from kvstore.hints.limits import HintLimits
from kvstore.hints.outcome import HintOutcome, HintStatus
from kvstore.plan.records import Request, RequestOptions
from kvstore.plan.wishes import ALL, Wish
from kvstore.requests import RequestMaker

NamedBy = Callable[[HintAction], Request]


class Hinting(RequestMaker):
    """The part of a KVStore's face that takes hints (see base.py). Any thread."""

    _hint_limits = HintLimits()

    def hint(
        self, envelope: object, request: Request | None = None, *, options: RequestOptions | None = None
    ) -> tuple[HintOutcome, ...]:
        """Do what a caller says of the future of prompts, as far as the bounds allow; one outcome for each action."""
        if request is not None:
            given = request.options
            options = RequestOptions(tenant=given.tenant, session=given.session, exact=given.exact)

        def named(action: HintAction) -> Request:
            if action.tokens is not None:
                return self.request(action.tokens, options)
            hashes = action.hashes or ()
            return self.request_from_hashes(hashes, len(hashes) * self._block_size + 1, options)

        items = parse(envelope, self._hint_limits).items
        aimed = [
            aim(item, self._block_size, named, request, self._hint_limits) if isinstance(item, HintAction) else item
            for item in items
        ]
        return tuple(self._carry_out(aimed))

    @abstractmethod
    def _carry_out(self, aimed: Sequence[Aimed | HintOutcome]) -> list[HintOutcome]:
        """Do what was aimed, and count all outcomes; returns those of all, in this order. Raises StoreClosed."""


class Aimed:
    """A wish, and the request that it is about."""

    __slots__ = ("request", "wish")

    def __init__(self, request: Request, wish: Wish) -> None:
        self.request = request
        self.wish = wish


def aim(
    action: HintAction, block_size: int, named: NamedBy, own: Request | None, limits: HintLimits
) -> Aimed | HintOutcome:
    """Return an action as a wish about a request; an outcome where it means none.

    named: makes the request of an action that names a prompt itself. own: the request that the hint came with.
    """
    if action.kind is HintKind.SHARE:
        return action.outcome(HintStatus.ACCEPTED, "what is stored is shared already")
    first = action.start // block_size
    end = ALL if action.end is None else -(-action.end // block_size)
    is_own = action.tokens is None and action.hashes is None
    if is_own:
        if own is None:
            return action.outcome(
                HintStatus.REJECTED, "it names no tokens and no block_hashes, and came with no request"
            )
        request = own
    elif action.tokens is not None and own is not None and own.hasher is None:
        return action.outcome(
            HintStatus.REJECTED, "the engine names blocks by hashes of its own: give block_hashes, or neither"
        )
    else:
        num_tokens = (len(action.hashes) if action.hashes is not None else 0) * block_size
        if num_tokens > limits.max_tokens:
            return action.outcome(HintStatus.REJECTED, f"{num_tokens} tokens; one action may name {limits.max_tokens}")
        try:
            request = named(action)
        except RequestError as error:
            return action.outcome(HintStatus.REJECTED, str(error)[:200])
        if not request.keys:
            return action.outcome(HintStatus.REJECTED, f"it is shorter than a block of {block_size} tokens")
        if first >= len(request.keys):
            return action.outcome(HintStatus.REJECTED, f"start is {action.start}; it names {request.num_tokens} tokens")
        if action.kind is not HintKind.FORGET:  # which takes all that continues it
            del request.keys[end:]
        request.num_tokens = len(request.keys) * block_size + 1  # all of it is meant, its last token too
    wish = Wish(
        action.action_id,
        action.kind,
        first,
        end,
        action.ttl_s,
        action.is_clipped,
        action.priority,
        action.session,
        is_own,
    )
    return Aimed(request, wish)
