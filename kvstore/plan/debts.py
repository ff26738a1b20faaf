"""The pages that a lower tier is owed: saved or loaded into host memory, and not written behind yet.

    waiting   to be sent, in order
    held      to be sent when a delete of the same key, which came first, is done
    failed    tried and not taken; tried again when its path is used, or by a flush
    aside     of an exclusive tier: to be written when they are about to leave host memory, or by a flush

A page owes its place here to its host copy: once that has left, it is *lost* to the tier, which host memory tells at
once (`lose`). Losses of pages that a save brought are counted apart: a flush must not pass them over, whereas a page
that was only on its way from one tier to another is still where it came from.

So there are never more pages here than host memory has, and no question walks over them: a million may be owed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from kvstore.page import PageKey
from kvstore.plan.state import Page, PageState
from radix.ordered import OrderedMap


@dataclass(slots=True)
class SpillCounters:
    """The outcome of the pages owed to a tier."""

    spilled_pages: int = 0
    failed_pages: int = 0
    evicted_pages: int = 0
    expired_pages: int = 0
    refused_pages: int = 0  # worth less, by the policy's forecast, than what would have left for them


class Queue:
    """Pages in order, each with whether a save brought it. num_saves: those that one did."""

    __slots__ = ("num_saves", "pages")

    def __init__(self) -> None:
        self.pages: OrderedMap[Page, bool] = OrderedMap()
        self.num_saves = 0

    def put(self, pages: Iterable[Page], *, is_saved: bool) -> None:
        """Append pages; those that are here keep their place, and stay a save's if they were one's."""
        for page in pages:
            was_saved = self.pages.get(page)
            if was_saved is None or is_saved > was_saved:
                self.pages[page] = is_saved
                self.num_saves += is_saved

    def pop(self, page: Page) -> bool | None:
        """Take a page out; whether a save brought it, None if it is not here."""
        is_saved = self.pages.pop(page, None)
        if is_saved:
            self.num_saves -= 1
        return is_saved

    def pour(self, other: Queue) -> None:
        """Append all that `other` has, which is empty then; of two, the shorter is moved."""
        if len(other) > len(self):
            self.pages, other.pages = other.pages, self.pages
            self.num_saves, other.num_saves = other.num_saves, self.num_saves
        for page, is_saved in other.pages.items():
            self.put((page,), is_saved=is_saved)
        other.clear()

    def clear(self) -> None:
        """Let all go."""
        self.pages.clear()
        self.num_saves = 0

    def rebuild(self) -> None:
        """Count again, after an exception in the middle of another call."""
        self.num_saves = sum(self.pages.values())

    def __len__(self) -> int:
        return len(self.pages)

    def __contains__(self, page: object) -> bool:
        return page in self.pages


class Debts:
    """Pages owed to one tier. Under the store's lock.

    num_lost:  evicted from host memory before they were written; num_lost_saves: of those, the ones of saves.
    """

    def __init__(self) -> None:
        self.waiting, self.held, self.failed, self.aside = Queue(), Queue(), Queue(), Queue()
        self.num_lost = 0
        self.num_lost_saves = 0

    def owe(self, pages: Iterable[Page], *, is_saved: bool) -> None:
        """Pages are owed from now on."""
        if not self.failed and not self.held and not self.aside:
            self.waiting.put(pages, is_saved=is_saved)
            return
        for page in pages:
            was_saved = bool(self.failed.pop(page)) | bool(self.aside.pop(page))
            queue = self.held if page in self.held else self.waiting
            queue.put((page,), is_saved=is_saved or was_saved)

    def set_aside(self, pages: Iterable[Page], *, is_saved: bool) -> None:
        """Pages are owed as soon as they are about to leave host memory; those that are owed already stay so."""
        queues = [queue for queue in (self.waiting, self.held, self.failed) if queue]
        self.aside.put([page for page in pages if not any(page in queue for queue in queues)], is_saved=is_saved)

    def hurry(self, pages: Iterable[Page] | None = None) -> None:
        """Those of `pages` that were set aside have their turn; all that were for None."""
        if pages is None:
            self.waiting.pour(self.aside)
            return
        for page in pages:
            is_saved = self.aside.pop(page)
            if is_saved is not None:
                self.waiting.put((page,), is_saved=is_saved)

    def take(self, n: int, holds: Callable[[PageKey], bool] | None) -> dict[Page, bool]:
        """Take up to `n` pages whose turn it is. holds: which keys must not be written yet; None if all may be."""
        batch: dict[Page, bool] = {}
        for page in list(islice(self.waiting.pages, n)):
            is_saved = bool(self.waiting.pop(page))
            if holds is not None and holds(page.key):
                self.held.put((page,), is_saved=is_saved)
            else:
                batch[page] = is_saved
        return batch

    def give_back(self, pages: dict[Page, bool]) -> None:
        """Pages that were taken found no room: they go on waiting."""
        for page, is_saved in pages.items():
            self.waiting.put((page,), is_saved=is_saved)

    def let_go(self) -> None:
        """A delete is done: pages that were held have their turn."""
        self.waiting.pour(self.held)

    def fail(self, page: Page, *, is_saved: bool) -> None:
        """The tier did not take a page."""
        if page.state == PageState.READY:
            self.failed.put((page,), is_saved=is_saved)
        else:
            self._count_lost(is_saved)

    def settle(self, pages: Iterable[Page]) -> None:
        """Pages are there after all, or not wanted any more: what is forgotten is not missed."""
        queues = self._in_use()
        if queues:
            for page in pages:
                for queue in queues:
                    queue.pop(page)

    def lose(self, pages: Iterable[Page]) -> None:
        """Pages leave host memory: those that were owed are lost."""
        for queue in self._in_use():
            for page in pages:
                is_saved = queue.pop(page)
                if is_saved is not None:
                    self._count_lost(is_saved)

    def retry(self) -> None:
        """Try again what failed."""
        self.waiting.pour(self.failed)

    def clear(self) -> None:
        """The tier is taken away."""
        for queue in self._all():
            queue.clear()

    def rebuild(self) -> None:
        """Put right what an exception in the middle of another call has left. Walks over all.

        All have their turn again: a page may be in two queues, or be held for a delete that is done.
        """
        for queue in self._all():
            queue.rebuild()
        self.let_go()
        self.retry()
        for page in self.waiting.pages:
            self.aside.pop(page)
        self.lose([page for page in self.pages() if page.state != PageState.READY])
        self.settle([page for page in self.pages() if page.block.is_removed])

    def pages(self) -> list[Page]:
        """Every page that is owed."""
        return [*self.waiting.pages, *self.held.pages, *self.failed.pages, *self.aside.pages]

    def check(self) -> None:
        """Assert that what is owed can be paid. For tests."""
        pages = self.pages()
        assert len(set(pages)) == len(pages), "a page is owed twice"
        for page in pages:
            assert page.state == PageState.READY, f"a page that is {page.state.name} is owed"
            assert not page.block.is_removed, "a page of a forgotten block is owed"
        for queue in self._all():
            assert queue.num_saves == sum(queue.pages.values()), "pages of saves are miscounted"

    @property
    def num_owed_saves(self) -> int:
        """Pages of saves that wait or are held."""
        return self.waiting.num_saves + self.held.num_saves

    @property
    def num_failed_saves(self) -> int:
        """Pages of saves that were tried in vain."""
        return self.failed.num_saves

    def __len__(self) -> int:
        return len(self.waiting) + len(self.held) + len(self.failed) + len(self.aside)

    def _in_use(self) -> list[Queue]:
        return [queue for queue in self._all() if queue]

    def _all(self) -> tuple[Queue, ...]:
        return self.waiting, self.held, self.failed, self.aside

    def _count_lost(self, is_saved: bool) -> None:
        self.num_lost += 1
        self.num_lost_saves += is_saved
