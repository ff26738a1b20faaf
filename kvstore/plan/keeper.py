"""The keeper: words to keep pages in host memory, each a lease with an end.

A pin of an operator, "retain until" of a request and the Pin of a hint are all words of one kind. A kept block holds
one pin on each of its resident pages, whatever the number of words about it. A word is about pages that are in host
memory, or on their way there (`expect`). What is kept, nothing else can use. So all words together have a budget, a
share of the slots, each payer has one, and each word has an end: what one forgets to undo, or dies before it can,
others get back in time. Of a path that does not fit the head is kept.

Several may give their word on one block. The one with the latest end is the block's *first* word, and pays; the others
wait in case it is taken back.

The hard thing: two clocks. "Retain until" is Unix time and ends when the wall clock says so, wherever that was set to
meanwhile; the longest time of a word is counted by the boot clock. The queue of ends goes by the latter, and is made
anew when the former was set, if a word goes by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from kvstore.clock import LARGE_STEP_S
from kvstore.plan.books import Books
from kvstore.plan.ends import Ends
from kvstore.plan.state import Block, Page, PageState
from kvstore.plan.steps import STEP_PAGES
from radix.untracked import untrack

MAX_WORDS = 8  # about one block; of more, the ones that end first are forgotten


@dataclass(frozen=True, slots=True)
class Kept:
    """The pages kept on one holder's word, and until when at the latest, by the boot clock.

    payer: the tenant within the store, by a digest of its name; "" where it has none.
    """

    holder: str
    num_pages: int
    until: float
    payer: str = ""


@dataclass(slots=True)
class Word:
    """A holder's word to keep something. One object for all blocks of a call.

    until:   when it ends by the boot clock, as things are now. unix: what was asked for. latest: by the boot clock.
    session: by which it can be taken back without taking back those of others.
    """

    until: float
    unix: float
    latest: float
    holder: str = ""
    payer: str = ""
    session: str = ""


@dataclass(slots=True)
class _Promise:
    """The words about one block: the first one, and the others, if any."""

    word: Word
    num_pages: int = 0
    others: list[Word] | None = None


class Keeper:
    """All words to keep pages, and until when. Under the store's lock."""

    def __init__(self, books: Books) -> None:
        self.num_pages = 0
        self.refused_pages = 0  # that found no budget
        # To be kept as soon as they are in host memory; count as kept, by the first word about each.
        self.coming: dict[Page, tuple[Word, ...]] = {}
        self._host = books.host
        self._clock = books.clock
        self._ahead = 0.0  # wall clock before boot clock when the queue was made: it only says when to make it anew
        self._budget = books.settings.max_pinned_fraction
        self._payer_budget = books.settings.max_payer_fraction
        self._longest_s = books.settings.pin_max_s
        self._promises: dict[Block, _Promise] = {}
        self._ends = Ends(self.until_of)
        self._has_unix = False  # a word may end by the wall clock
        self._coming_ends = inf  # no word about what is coming ends before
        self._holders: dict[tuple[str, str], list[float]] = {}  # by holder and payer: pages, latest end
        self._payers: dict[str, int] = {}  # pages kept or coming

    # ---- words ------------------------------------------------------------------------------------------------

    def word(
        self, until: float = inf, *, most_s: float = inf, holder: str = "", payer: str = "", session: str = ""
    ) -> Word:
        """Return a word that ends at `until` (Unix time), or after `most_s`; or after the longest time there is."""
        boot = self._look()
        latest = boot + min(most_s, self._longest_s)
        self._has_unix = self._has_unix or until < inf
        return Word(min(until - self._ahead, latest), until, latest, holder, payer, session)

    def keep(self, blocks: Sequence[Block], word: Word) -> int:
        """Hold the resident pages of blocks, given in path order; returns the number of blocks that hold any."""
        if word.until <= self._look():
            return 0
        pages: list[Page] = []
        room = self.room(word.payer)
        num_kept = 0
        for block in blocks:
            num_before = len(pages)
            num_kept += self._keep(block, word, room, pages)
            room -= len(pages) - num_before
        self._host.pin(pages)
        return num_kept

    def expect(self, pages: Sequence[Page], word: Word) -> int:
        """Keep pages that are on their way to host memory, as soon as they are there; returns how many.

        What others expect already costs no budget.
        """
        known = [page for page in pages if page in self.coming]
        fresh = [page for page in pages if page not in self.coming][: self.room(word.payer)]
        for page in fresh:
            self._expect_by(page, (word,))
        for page in known:
            self._join(page, word)
        self._coming_ends = min(self._coming_ends, word.until)
        return len(known) + len(fresh)

    def arrived(self, pages: Iterable[Page]) -> None:
        """Pages are in host memory, or will not come."""
        found: dict[int, tuple[Word, dict[Block, None]]] = {}
        for page in pages:
            if page.state is PageState.FILLING:
                continue  # it is tried on another tier
            words = self.coming.get(page, ())
            self._expect_by(page, ())
            for word in words if page.state is PageState.READY and not page.block.is_removed else ():
                found.setdefault(id(word), (word, {}))[1][page.block] = None
        for word, blocks in found.values():
            self.keep(sorted(blocks, key=lambda block: block.depth), word)

    def let_go(self, blocks: Sequence[Block], session: str = "") -> int:
        """Take back the words about blocks given in path order; returns how many blocks had one.

        session: take back those of that session only; "" all.
        """
        boot = self._look()
        if self.coming:
            self._stop_expecting(blocks, session)
        taken = [(block, self._take_back(block, session, boot)) for block in blocks]
        ended = [block for block, is_over in taken if is_over]
        pages = [page for block in ended for page in block.pages if page.kept]
        for page in pages:
            page.kept = False
        self.num_pages -= len(pages)
        self._host.unpin(pages, used=False)
        return sum(is_over is not None for _, is_over in taken)

    def expire(self) -> bool:
        """End words whose time is over; True if there may be more of them than a step takes."""
        if self.coming:
            self._forget_coming()
        if not self._promises:
            return False
        over = self._ends.over(self._look(), STEP_PAGES)
        if over:
            over.sort(key=lambda block: block.depth)
            self.let_go(over)
        return len(over) == STEP_PAGES

    # ---- what is asked ----------------------------------------------------------------------------------------

    @property
    def max_pages(self) -> int:
        """How many pages may be kept."""
        return int(self._budget * self._host.pool.num_in_use)

    def room(self, payer: str) -> int:
        """How many more pages may be kept on a payer's account."""
        room = self.max_pages - self.num_pages - len(self.coming)
        if payer:
            room = min(room, int(self._payer_budget * self._host.pool.num_in_use) - self._payers.get(payer, 0))
        return max(0, room)

    @property
    def holders(self) -> list[Kept]:
        """The number of pages that each holder keeps, and until when."""
        return [Kept(holder, int(pages), until, payer) for (holder, payer), (pages, until) in self._holders.items()]

    @property
    def payers(self) -> dict[str, int]:
        """The number of pages that are kept or expected, by payer."""
        return dict(self._payers)

    def until_of(self, block: Block) -> float:
        """Return when the last word about a block ends, by the boot clock; minus infinity where there is none."""
        promise = self._promises.get(block)
        return -inf if promise is None else promise.word.until

    def __len__(self) -> int:
        return len(self._promises)

    @property
    def blocks(self) -> list[Block]:
        """Those that a word is about."""
        return list(self._promises)

    def rebuild(self, pages: Sequence[Page]) -> None:
        """Count anew what the words there are about: an exception may have come between them and the sums.

        pages: all there are.
        """
        self._holders, self._payers, self.num_pages = {}, {}, 0
        for page in pages:
            page.kept = page.kept and page.state == PageState.READY and page.block in self._promises
        for block, promise in list(self._promises.items()):
            promise.num_pages = sum(page.kept for page in block.pages)
            if block.is_removed or not promise.num_pages:
                for page in block.pages:
                    page.kept = False
                del self._promises[block]
                continue
            self._book(promise, promise.num_pages)
            self.num_pages += promise.num_pages
        self.coming = {page: words for page, words in self.coming.items() if page.state is PageState.FILLING}
        for words in self.coming.values():
            self._pay(words[0].payer, 1)
        self._ends.rebuild(self._promises)

    def check(self) -> None:
        """Assert that the sums are right. For tests."""
        kept = [page for block in self._promises for page in block.pages if page.kept]
        assert self.num_pages == len(kept), f"{len(kept)} pages are kept, {self.num_pages} booked"
        assert self.num_pages == sum(kept.num_pages for kept in self.holders), f"{self.num_pages}: {self.holders}"
        assert self.num_pages + len(self.coming) == sum(self._payers.values()), f"{self.num_pages}: {self._payers}"
        assert all(page.state is PageState.FILLING for page in self.coming), "a page that is expected is not coming"
        latest = self._clock.boot() + self._longest_s
        assert all(promise.word.until <= latest for promise in self._promises.values()), "a word has no end"

    # ---- private ----------------------------------------------------------------------------------------------

    def _look(self) -> float:
        """The boot clock; where the wall clock was set against it, all ends are found anew."""
        boot = self._clock.boot()
        ahead = self._clock.wall() - boot
        if abs(ahead - self._ahead) >= LARGE_STEP_S:
            self._ahead = ahead
            if not self._has_unix:
                return boot
            self._holders, self._payers = {}, {}
            for promise in self._promises.values():
                words = [promise.word, *(promise.others or ())]
                for word in words:
                    word.until = min(word.unix - ahead, word.latest)
                words.sort(key=lambda word: word.until, reverse=True)
                promise.word, promise.others = words[0], words[1:] or None
                self._book(promise, promise.num_pages)
            for expecting in self.coming.values():
                for word in expecting:
                    word.until = min(word.unix - ahead, word.latest)
                self._pay(expecting[0].payer, 1)
            self._coming_ends = -inf
            self._ends.rebuild(self._promises)
        return boot

    def _keep(self, block: Block, word: Word, room: int, pages: list[Page]) -> bool:
        """Keep a block; adds to `pages` what is to be pinned. room: pages that may be kept on this account."""
        promise = self._promises.get(block)
        wanted = [page for page in block.pages if page.state == PageState.READY and not page.kept]
        moved = promise.num_pages if promise is not None and promise.word.payer != word.payer else 0
        if wanted and len(wanted) > room:
            self.refused_pages += len(wanted)  # half a block is of no use
            wanted = []
        if promise is None:
            if not wanted:
                return False
            promise = self._promises[block] = _Promise(word)
            untrack([promise])  # names words, which name nothing
            self._note_end(block, word.until)
        for page in wanted:
            page.kept = True
        pages += wanted
        self.num_pages += len(wanted)
        promise.num_pages += len(wanted)
        self._book(promise, len(wanted))
        if word is not promise.word and len(wanted) + moved <= room:
            self._add(block, promise, word)
        return True

    def _add(self, block: Block, promise: _Promise, word: Word) -> None:
        """One more word about a block that is kept. One of the same session is made longer, never shorter."""
        words = [promise.word, *(promise.others or ())]
        same = next((one for one in words if (one.session, one.holder) == (word.session, word.holder)), None)
        if same is not None:
            if same.until >= word.until:
                return
            words.remove(same)
        words.append(word)
        words.sort(key=lambda one: one.until, reverse=True)
        self._set_words(block, promise, words[:MAX_WORDS])

    def _take_back(self, block: Block, session: str, boot: float) -> bool | None:
        """Take words about a block back; True if none is left, None if there was none to take back."""
        promise = self._promises.get(block)
        if promise is None:
            return None
        words = [promise.word, *(promise.others or ())]
        left = [word for word in words if session and word.session != session and word.until > boot]
        if len(left) == len(words):
            return None
        if left:
            self._set_words(block, promise, left)
            return False
        del self._promises[block]
        self._book(promise, -promise.num_pages)
        return True

    def _set_words(self, block: Block, promise: _Promise, words: list[Word]) -> None:
        """Give a kept block other words, the one with the latest end first."""
        if words[0] is not promise.word:
            self._book(promise, -promise.num_pages)
            promise.word = words[0]
            self._book(promise, promise.num_pages)
            self._note_end(block, promise.word.until)
        promise.others = words[1:] or None

    def _book(self, promise: _Promise, num_pages: int) -> None:
        word = promise.word
        booked = self._holders.setdefault((word.holder, word.payer), [0, word.until])
        booked[0] += num_pages
        booked[1] = max(booked[1], word.until)
        if not booked[0]:
            del self._holders[word.holder, word.payer]
        self._pay(word.payer, num_pages)

    def _pay(self, payer: str, num_pages: int) -> None:
        paid = self._payers.get(payer, 0) + num_pages
        self._payers[payer] = paid
        if not paid:
            del self._payers[payer]

    def _join(self, page: Page, word: Word) -> None:
        """One more word about a page that is expected; of two of a session the one that ends later counts."""
        words = self.coming[page]
        same = [one for one in words if (one.session, one.holder) == (word.session, word.holder)]
        if all(one.until < word.until for one in same):
            words = (*(one for one in words if one not in same), word)
            self._expect_by(page, tuple(sorted(words, key=lambda one: one.until, reverse=True)[:MAX_WORDS]))

    def _forget_coming(self) -> None:
        """Words that end before their pages have come. Walks only where one has ended."""
        boot = self._look()
        if boot < self._coming_ends:
            return
        for page, words in list(self.coming.items()):
            self._expect_by(page, tuple(word for word in words if word.until > boot))
        self._coming_ends = min((word.until for words in self.coming.values() for word in words), default=inf)

    def _stop_expecting(self, blocks: Sequence[Block], session: str) -> None:
        for page in [page for block in blocks for page in block.pages if page in self.coming]:
            self._expect_by(page, tuple(word for word in self.coming[page] if session not in ("", word.session)))

    def _expect_by(self, page: Page, words: tuple[Word, ...]) -> None:
        """Expect a page on these words from now on; none: no longer."""
        before = self.coming.pop(page, ())
        if before:
            self._pay(before[0].payer, -1)
        if words:
            self.coming[page] = words
            self._pay(words[0].payer, 1)

    def _note_end(self, block: Block, until: float) -> None:
        if self._ends.is_bloated(len(self._promises)):  # the same block, kept again and again
            self._ends.rebuild(self._promises)
        else:
            self._ends.note(block, until)
