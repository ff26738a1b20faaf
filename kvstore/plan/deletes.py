"""The deletes that a lower tier is owed.

A delete is owed like a write: it is sent when the tier takes deletes, sent again after an outage or a refusal, waited
for by a flush, and told of where it could not be done. Its key is in one of three places until then:

    waiting     to be sent, in order
    leaving     a DELETE of it is under way
    written     a write of it was under way when it was forgotten: the delete waits for that to end, well or badly

Or everything is to go (`clear`): that is one debt, whatever the number of pages, and settles all others. It is carried
out by the tier itself where nobody here has an index of it (`TierPlan.can_clear`).

The hard thing: neither order of a delete and a write of the same key may turn round, and lanes have several workers.
So a key is never in both at once: a delete waits for the write before it, and `holds` keeps the write after it back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from kvstore.page import PageKey
from kvstore.plan.records import Op, Outcome, Priority
from kvstore.plan.transfers import InFlight, TransferBook
from radix.ordered import OrderedMap

log = logging.getLogger(__name__)

DELETE_BATCH = 512  # keys; one Redis round trip or one LMDB transaction of a few milliseconds
MAX_UNDER_WAY = 4  # batches: enough for all workers, and few enough that a write which waits for a delete overtakes
FIRST_BACKOFF_S = 0.5  # after a delete that failed though the tier is not out; doubles
MAX_BACKOFF_S = 30.0
MAX_CLEAR_TRIES = 5  # 15 s of back-off, on a tier that takes writes and refuses this


class Deletes:
    """The deletes that one tier is owed. Under the store's lock.

    tier:        its name. max_owed: keys that may wait.
    num_done:    keys deleted, and clears. num_failed: those that had to be sent again.
    num_dropped: those that will not be done: too many waited, the tier was taken away, or it refuses clears.
    """

    def __init__(self, tier: str, transfers: TransferBook, max_owed: int) -> None:
        self.num_done = 0
        self.num_failed = 0
        self.num_dropped = 0
        self.is_any = False  # anything is owed; the one question that is asked all the time
        self.must_clear = False
        self._tier = tier
        self._transfers = transfers
        self._max_owed = max_owed
        self._waiting: OrderedMap[PageKey, None] = OrderedMap()
        self._leaving: set[PageKey] = set()
        self._written: dict[PageKey, int] = {}  # writes of it under way
        self._num_under_way = 0
        self._is_clearing = False
        self._clear_again = False
        self._clear_tries = 0
        self._retry_at = 0.0
        self._backoff_s = FIRST_BACKOFF_S

    def owe(self, keys: Iterable[PageKey]) -> None:
        """Keys are to be deleted."""
        if self.must_clear and not self._is_clearing:
            return
        for key in keys:
            if key in self._written:
                continue
            if len(self._waiting) >= self._max_owed and key not in self._waiting:
                self.num_dropped += 1
                continue
            self._waiting[key] = None
        self._note()

    def owe_after_write(self, keys: Iterable[PageKey]) -> None:
        """Keys are to be deleted, and a write of each is under way: its end is told to `wrote`."""
        for key in keys:
            self._written[key] = self._written.get(key, 0) + 1
        self._note()

    def wrote(self, key: PageKey) -> None:
        """A write that was under way when its page was forgotten has ended: whatever it left there has to go."""
        if key in self._written:
            self._written[key] -= 1
            if not self._written[key]:
                del self._written[key]
                self.owe((key,))
        self._note()

    def owe_all(self) -> None:
        """Everything there is to be deleted, whoever wrote it."""
        self._waiting.clear()
        self._clear_again = self._is_clearing  # that one may have passed what came to be since
        self.must_clear = True
        self._note()

    def holds(self, key: PageKey) -> bool:
        """True if what the tier has of a key is to go, so that it counts as gone, and is not to be written yet."""
        return self.must_clear or key in self._waiting or key in self._leaving or key in self._written

    def keeps_back(self, key: PageKey) -> bool:
        """The same for a write that is due: where it has to wait, the delete that it waits for goes first."""
        is_held = self.holds(key)
        if is_held:
            self.hurry(key)
        return is_held

    def hurry(self, key: PageKey) -> None:
        """A write waits for this delete."""
        if key in self._waiting:
            self._waiting.move_to_end(key, last=False)

    def pump(self, now: float, *, may_clear: bool) -> None:
        """Send what is owed. may_clear: nothing is being written, which a clear would have to catch as well."""
        if not self.is_any or now < self._retry_at:
            return
        if self.must_clear:
            if may_clear and not self._is_clearing and not self._num_under_way:
                self._is_clearing = True
                self._send(Op.CLEAR, ())
            return
        while self._waiting and self._num_under_way < MAX_UNDER_WAY:
            keys = [key for key, _ in zip(self._waiting, range(DELETE_BATCH), strict=False)]
            self._leaving.update(keys)  # before they leave the other: an interrupt loses none
            for key in keys:
                del self._waiting[key]
            self._send(Op.DELETE, keys)

    def landed(self, flight: InFlight, outcome: Outcome, now: float, *, takes_writes: bool) -> None:
        """Book the outcome of a DELETE or a CLEAR. What failed is owed again.

        takes_writes: the tier does. A clear keeps writes back, so one that such a tier goes on refusing is given up.
        """
        self._num_under_way -= 1
        is_done = outcome.error is None and all(outcome.ok)
        if is_done:
            self._backoff_s = FIRST_BACKOFF_S
        else:
            self._retry_at = now + self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)
        if flight.transfer.op is Op.CLEAR:
            self._cleared(is_done, takes_writes)
        else:
            keys = flight.transfer.keys
            self._leaving.difference_update(keys)
            if is_done:
                self.num_done += len(keys)
            else:
                self.num_failed += len(keys)
                self.owe(keys)
        self._note()

    def retry(self) -> None:
        """Something has changed, or somebody wants to know: the next `pump` tries at once."""
        self._retry_at = 0.0

    def rebuild(self, written: dict[PageKey, int]) -> None:
        """Make the books agree with what is under way: an exception may have come between the two.

        written: the writes under way of pages that are forgotten, by key.
        """
        flights = [flight for flight in self._transfers.under_way() if flight.transfer.tier == self._tier]
        leaving = [flight.transfer for flight in flights if flight.transfer.op is Op.DELETE]
        clearing = sum(flight.transfer.op is Op.CLEAR for flight in flights)
        ended = [key for key in self._written if key not in written]
        unsent = self._leaving
        self._num_under_way = len(leaving) + clearing
        self._is_clearing = clearing > 0
        self.must_clear = self.must_clear or self._is_clearing
        self._leaving = {key for transfer in leaving for key in transfer.keys}
        self._written = written
        self.owe([key for key in [*ended, *unsent] if key not in self._leaving and key not in written])
        self._note()

    def drop(self) -> None:
        """The tier is taken away: it is owed nothing any more."""
        self.num_dropped += len(self._waiting) + len(self._written) + self.must_clear
        self.must_clear = self._clear_again = False
        self._waiting.clear()
        self._written.clear()
        self._note()

    def is_waiting_in_vain(self, now: float) -> bool:
        """True if nothing is under way, and what failed is not to be tried again yet."""
        return not self._num_under_way and now < self._retry_at

    @property
    def num_under_way(self) -> int:
        """Transfers that have not been answered."""
        return self._num_under_way

    def __len__(self) -> int:
        """Keys that are owed, and 1 for a clear."""
        return len(self._waiting) + len(self._leaving) + len(self._written) + self.must_clear

    def _cleared(self, is_done: bool, takes_writes: bool) -> None:
        self._is_clearing = False
        self._clear_tries = 0 if is_done or not takes_writes else self._clear_tries + 1
        self.num_done += is_done
        self.num_failed += not is_done
        if self._clear_tries >= MAX_CLEAR_TRIES:
            self._clear_tries = 0
            self.num_dropped += 1
            self.must_clear = False
            log.warning(
                "tier %s: it could not be cleared in %d tries, and keeps what it has", self._tier, MAX_CLEAR_TRIES
            )
        else:
            self.must_clear = not is_done or self._clear_again
        self._clear_again = False

    def _send(self, op: Op, keys: Sequence[PageKey]) -> None:
        self._num_under_way += 1
        self._transfers.send(op, self._tier, keys, priority=Priority.SAVE, deadline=float("inf"))

    def _note(self) -> None:
        self.is_any = bool(self._waiting or self._leaving or self._written or self.must_clear)
