"""Speculation: pages of idle sessions are brought to host memory before the session's next request is likely.

The planner tells it of every request (`came`) and of every end (`ended`), and calls `tick`. It remembers the path of
each idle session, and looks at the session when its age comes to a bucket of the table of returns (returns.py). Pages
are brought if

    the chance that the session returns after they are there, and before they would be evicted again, is high enough
        that no more than `max_waste` bytes are wasted for each that is used,
    there is room: free slots, or pages whose sessions are less than half as likely to return,
    the budgets of slots and of bytes a second allow it, and no load is under way.

It watches what becomes of what it brought. In mode "auto" it stops itself where more is wasted than `max_waste` allows,
and tries again after a pause that doubles each time.

The hard thing: it must never cost what it does not earn. Every step looks at a few sessions only, all that is
remembered is bounded, and without settings for it the planner has no Speculation at all. What it knows of a session are
block hashes, which are salted with the tenant: it cannot name another tenant's pages. It looks each of them up when it
brings them, so what was deleted meanwhile is not brought. Of a long prompt it follows and brings the head.

Under the store's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import exp, inf

from eviction.policy import Ending
from kvstore.plan.books import Books
from kvstore.plan.fetches import Fetches
from kvstore.plan.lookup import PrefixLookup
from kvstore.plan.match import IN_HOST
from kvstore.plan.records import Op, Priority, Request, RequestOptions, SpeculationSettings
from kvstore.plan.returns import EDGES_S, NUM_BUCKETS, Leaving, ReturnTable, bucket_of
from kvstore.plan.state import Block, Page, PageState
from kvstore.plan.worth import Worth
from radix.hashing import BlockHash

MAX_SESSIONS = 8192
MAX_HASHES = 1 << 19  # of all sessions together: about 50 MiB where nothing else keeps them
MAX_PATH = 4096  # blocks of a prompt that are remembered and brought: its head. A look at them takes 1 to 2 ms
MAX_BACK = 4096  # blocks of a prompt that are looked at for the end of an earlier one
NUM_TAILS = 3  # blocks at the end of a path by which a session without a name is found again
STEP_SESSIONS = 16  # looked at in one tick: about 1 ms
STEP_PAGES_AHEAD = 64  # sent in one tick
STEP_BLOCKS_SEEN = 4096  # after which a tick looks at no further session
MARGIN = 0.5  # a page makes room only if its session is less than so likely to return
TURNOVER_S = 60.0  # time over which the rate of evictions is averaged
ASK_TICKS = 40  # a shared tier that has not answered by then is not waited for

SessionKey = tuple[BlockHash, str]  # first block, which is the tenant's own; name, or "" and the first block's number


@dataclass(slots=True, eq=False)
class Idle:
    """A session between two requests.

    bucket:  of the table of returns, to which it has come.
    brought: pages that were brought for it and not used yet; some may still be under way.
    """

    key: SessionKey
    request: Request
    leaving: Leaving
    ended_at: float
    bucket: int = 0
    brought: list[Page] = field(default_factory=list)
    tails: Sequence[BlockHash] = ()
    asked: int = 0


class Speculation:
    """Brings pages ahead of need. Under the store's lock.

    counters: pages brought, used, wasted; sessions brought for; times it stopped itself.
    table:    what it has learned.
    """

    def __init__(self, books: Books, lookups: PrefixLookup, fetches: Fetches, settings: SpeculationSettings) -> None:
        self.counters = {"brought": 0, "used": 0, "wasted": 0}
        self.table = ReturnTable()
        self.verdict = Worth(settings.max_waste, may_stop=settings.mode == "auto")
        self._settings = settings
        self._books = books
        self._host = books.host
        self._lookups = lookups
        self._fetches = fetches
        self._page_bytes = max(books.page_bytes)
        self._idle: dict[SessionKey, Idle] = {}  # by the end of their replies, the oldest first
        self._by_name: dict[str, Idle] = {}
        self._tails: dict[BlockHash, Idle] = {}
        self._running: dict[int, tuple[SessionKey, float | None]] = {}  # requests: session, last gap
        self._due: list[tuple[float, int, Idle]] = []
        self._wanted: deque[Idle] = deque()
        self._held: dict[Page, Idle] = {}
        self._order = count()
        self._num_hashes = 0
        self._bytes_left = 0.0
        self._ticked_at: float | None = None
        self._evicted_before = books.host.evicted_pages
        self._evictions_per_s = 0.0

    # ---- what the planner tells -------------------------------------------------------------------------------

    def came(self, request: Request, now: float) -> None:
        """A request is looked up. Of effect the first time only."""
        if request.id in self._running or not request.keys:
            return
        idle = self._find(request)
        gap: float | None = None
        if idle is not None:
            gap = max(0.0, now - idle.ended_at)
            bucket = bucket_of(gap)
            self.table.stayed(idle.leaving, idle.bucket + 1, bucket + 1)
            self.table.returned(idle.leaving, max(bucket, idle.bucket))
            self._judge(idle, now)
            self._drop(idle, now)
        while len(self._running) >= MAX_SESSIONS:
            del self._running[next(iter(self._running))]
        self._running[request.id] = (_key(request) if idle is None else idle.key), gap

    def ended(self, request: Request, now: float, ending: Ending) -> None:
        """A request is over; its session is idle from now on."""
        key, gap = self._running.pop(request.id, (None, None))
        if not request.keys:
            return
        key = key or _key(request)
        before = self._idle.get(key)
        if before is not None:  # two requests of the session at the same time
            self._judge(before, now)
            self._drop(before, now)
        if ending.last_turn:
            return
        keys = list(request.keys[:MAX_PATH])
        # One token more than the blocks hold, as the next turn will have; a number that no caller's request has.
        num_tokens = len(keys) * self._books.layout.block_size + 1
        options = RequestOptions(session=request.options.session)
        own = Request(-next(self._order) - 1, keys, num_tokens, options, request.tokens)
        idle = Idle(key, own, self.table.leaving(ending.finish_reason, gap), now)
        self.table.stayed(idle.leaving, 0, 1)
        self._idle[key] = idle
        self._num_hashes += len(keys)
        if request.options.session:
            self._by_name[request.options.session] = idle
        else:
            idle.tails = request.keys[-NUM_TAILS:]
            self._tails.update(dict.fromkeys(idle.tails, idle))
        heappush(self._due, (now + EDGES_S[1], next(self._order), idle))
        while self._num_hashes > MAX_HASHES or len(self._idle) > MAX_SESSIONS:
            oldest = next(iter(self._idle.values()))
            self._judge(oldest, now)
            self._drop(oldest, now)

    def arrived(self, pages: Sequence[Page], now: float) -> None:
        """Pages that were prefetched are there, or not. What is above them must not leave before them."""
        for idle in {self._held[page]: None for page in pages if page in self._held}:
            if not any(page.flight for page in idle.brought):
                self._host.touch(self._lookups.known_path(idle.request))
        self._pump(now)

    def tick(self, now: float) -> None:
        """Look at the sessions that are due, and bring what is wanted: a few of each."""
        self._measure(now)
        for _ in range(STEP_SESSIONS):
            if not self._due or self._due[0][0] > now:
                break
            idle = heappop(self._due)[2]
            if self._idle.get(idle.key) is idle:
                self._look(idle, now)
        self._pump(now)

    def clear(self) -> None:
        """Forget all sessions: an exception may have come into the middle of anything. What was learned stays."""
        for held in (self._idle, self._by_name, self._tails, self._running, self._held):
            held.clear()
        self._due.clear()
        self._wanted.clear()
        self._num_hashes = 0

    def due_at(self, now: float) -> float:
        """The time at which `tick` has something to do: now, later, or never (infinity)."""
        return now if self._wanted else self._due[0][0] if self._due else inf

    @property
    def num_sessions(self) -> int:
        """Idle sessions that are remembered."""
        return len(self._idle)

    @property
    def num_held(self) -> int:
        """Pages that were brought and that nothing has used yet."""
        return len(self._held)

    def check(self) -> None:
        """Assert that the budgets hold and the books agree. For tests."""
        assert self._num_hashes == sum(len(idle.request.keys) for idle in self._idle.values())
        assert len(self._held) == sum(len(idle.brought) for idle in self._idle.values())
        assert len(self._held) <= self._settings.max_slots, f"{len(self._held)} of {self._settings.max_slots} slots"
        assert all(self._idle.get(idle.key) is idle for idle in self._held.values())
        assert all(self._idle.get(idle.key) is idle for idle in self._tails.values())

    # ---- sessions ---------------------------------------------------------------------------------------------

    def _find(self, request: Request) -> Idle | None:
        """The session that a request continues: by its name, else by the end of an earlier prompt in its own."""
        if request.options.session:
            return self._idle.get(_key(request))
        if self._tails:
            for key in reversed(request.keys[-MAX_BACK:]):
                idle = self._tails.get(key)
                if idle is not None:
                    return idle
        return None

    def _drop(self, idle: Idle, now: float) -> None:
        del self._idle[idle.key]
        self._num_hashes -= len(idle.request.keys)
        for key in idle.tails:
            if self._tails.get(key) is idle:
                del self._tails[key]
        name = idle.request.options.session
        if self._by_name.get(name) is idle:
            del self._by_name[name]
        if idle.asked:
            self._lookups.end(idle.request, now, "")

    def _look(self, idle: Idle, now: float) -> None:
        """A session has come to the next bucket: see what became of what was brought, and whether to bring more."""
        bucket = max(idle.bucket + 1, min(bucket_of(now - idle.ended_at), NUM_BUCKETS - 1))
        self.table.stayed(idle.leaving, idle.bucket + 1, bucket + 1)
        idle.bucket = bucket
        self._book_wasted(idle, [page for page in idle.brought if page.state is PageState.ABSENT], now)
        if bucket + 1 >= NUM_BUCKETS:
            self._book_wasted(idle, list(idle.brought), now)
            self._drop(idle, now)
            return
        heappush(self._due, (idle.ended_at + EDGES_S[bucket + 1], next(self._order), idle))
        if self.verdict.may_bring(now) and self._chance(idle, now) >= self._least and idle not in self._wanted:
            self._wanted.append(idle)

    # ---- what became of it ------------------------------------------------------------------------------------

    def _judge(self, idle: Idle, now: float) -> None:
        """The session is back: what is in host memory, or will be at once, is used."""
        used = [page for page in idle.brought if page.state is PageState.READY or page.flight]
        for page in used:
            self._held.pop(page, None)
        self.counters["used"] += len(used)
        self.verdict.book(len(used), 0, now)
        self._book_wasted(idle, [page for page in idle.brought if page in self._held], now)

    def _book_wasted(self, idle: Idle, pages: Sequence[Page], now: float) -> None:
        if pages:
            gone = set(pages)
            idle.brought = [page for page in idle.brought if page not in gone]
            for page in pages:
                self._held.pop(page, None)
            self.counters["wasted"] += len(pages)
            self.verdict.book(0, len(pages), now)

    # ---- bringing ---------------------------------------------------------------------------------------------

    @property
    def _least(self) -> float:
        """The chance at which as much is wasted for what is used as may be."""
        return 1.0 / (1.0 + self._settings.max_waste)

    def _chance(self, idle: Idle, now: float) -> float:
        """That a session returns after its pages are there, and before they are evicted again."""
        age = now - idle.ended_at
        return self.table.chance(idle.leaving, age, age + self._lead_s(idle), age + self._stay_s)

    def _lead_s(self, idle: Idle) -> float:
        """About the time until its pages are there, by the slowest tier."""
        slowest = max([cost.seconds_per_byte or 0.0 for cost in self._books.costs.tiers.values()], default=0.0)
        num_bytes = len(idle.request.keys) * self._page_bytes
        return max(slowest * num_bytes, num_bytes / self._settings.bytes_per_s)

    @property
    def _stay_s(self) -> float:
        """The time that an unused page stays in host memory, by the evictions of late."""
        return self._host.pool.num_in_use / self._evictions_per_s if self._evictions_per_s > 0 else inf

    def _measure(self, now: float) -> None:
        since = now - (now if self._ticked_at is None else self._ticked_at)
        if self._ticked_at is None or since > 0:
            self._ticked_at = now
        if since <= 0:
            return
        evicted = self._host.evicted_pages
        share = exp(-since / TURNOVER_S)
        rate = (evicted - self._evicted_before) / since
        self._evictions_per_s = share * self._evictions_per_s + (1.0 - share) * rate
        if self._evictions_per_s < 1e-9:
            self._evictions_per_s = 0.0
        self._evicted_before = evicted
        per_s = self._settings.bytes_per_s
        self._bytes_left = min(self._bytes_left + per_s * since, max(per_s, float(self._page_bytes)))

    def _pump(self, now: float) -> None:
        """Bring what is wanted, as far as the budgets go. Loads go first: while one is under way, nothing is sent."""
        left, seen = STEP_PAGES_AHEAD, 0
        for _ in range(min(STEP_SESSIONS, len(self._wanted))):
            if left <= 0 or seen >= STEP_BLOCKS_SEEN or self._bytes_left < self._page_bytes or self._is_loading():
                return
            idle = self._wanted.popleft()
            if self._idle.get(idle.key) is not idle or not self.verdict.may_bring(now):
                continue
            room = min(
                left,
                int(self._bytes_left // self._page_bytes),
                self._settings.max_slots - len(self._held),
                self._books.settings.max_prefetch_slots - self._fetches.prefetching,
            )
            if room <= 0:
                continue
            seen += len(idle.request.keys)
            num_sent = self._bring(idle, room, now)
            left -= num_sent
            self._bytes_left -= num_sent * self._page_bytes

    def _is_loading(self) -> bool:
        return any(
            flight.transfer.op is Op.FETCH and flight.transfer.priority is Priority.LOAD
            for flight in self._books.transfers.under_way()
        )

    def _bring(self, idle: Idle, room: int, now: float) -> int:
        """Fetch pages of a session; returns how many. A session with more of them is wanted again."""
        request = idle.request
        if any(tier.plan.is_shared and tier.is_up for tier in self._books.tiers) and idle.asked < ASK_TICKS:
            idle.asked += 1
            if self._lookups.ask(request, now):
                self._wanted.append(idle)
                return 0
        chance = self._chance(idle, now)
        if chance < self._least:
            return 0
        survey = self._lookups.survey(request)
        num_below = sum(code > IN_HOST for codes in survey.sources for code in codes[: survey.worth])
        room = min(room, num_below)
        room = min(room, self._host.pool.num_free + self._worse(room - self._host.pool.num_free, chance, now))
        if room <= 0:
            return 0
        pages = self._fetches.bring_ahead(request, survey, room, now)
        for page in pages:  # brought before, for this session or another, and evicted since the last look at that
            if page in self._held:
                self._book_wasted(self._held[page], [page], now)
        if pages and not idle.brought:
            self.verdict.began()
        idle.brought += pages
        self._held.update(dict.fromkeys(pages, idle))
        self.counters["brought"] += len(pages)
        if pages and num_below > len(pages):
            self._wanted.append(idle)
        return len(pages)

    def _worse(self, n: int, chance: float, now: float) -> int:
        """How many of the next `n` pages to leave are worth less than those of a session with this chance."""
        if n <= 0:
            return 0
        chances: dict[object, float] = {}
        for num, page in enumerate(self._host.policy.victims(n)):
            block = page.block
            idle = self._held.get(page) or self._by_name.get(block.session)
            which: object = idle if idle is not None else block.touched_at
            if which not in chances:
                chances[which] = self._chance_of(block, now) if idle is None else self._chance(idle, now)
            if chances[which] >= MARGIN * chance:
                return num
        return n

    def _chance_of(self, block: Block, now: float) -> float:
        """The same of a block whose session is not known: by the time of its last use, as a session of any class."""
        age = now - block.touched_at
        return 0.0 if age > EDGES_S[-1] else self.table.chance(Leaving(), age, age, age + self._stay_s)


def _key(request: Request) -> SessionKey:
    return request.keys[0], request.options.session or f"\0request {request.id}"
