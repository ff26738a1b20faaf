"""The pages that a lower tier is owed: saved or loaded into host memory, and not written behind yet.

    waiting   to be sent, in order
    held      to be sent when a delete of the same key, which came first, is done
    failed    tried and not taken; tried again when its path is used, or by a flush

A page owes its place here to its host copy: once that has left, it is *lost* to the tier. Losses of pages that a save
brought are counted apart: a flush must not pass them over, whereas a page that was only on its way from one tier to
another is still where it came from.

The hard thing: pages leave host memory without a word to this book, so what is lost is found by looking. That is done
when a page's turn has come, when the book is full, and when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvstore.page import PageKey
from kvstore.plan.state import Page, PageState


@dataclass(slots=True)
class SpillCounters:
    """The outcome of the pages owed to a tier."""

    spilled_pages: int = 0
    failed_pages: int = 0
    evicted_pages: int = 0
    expired_pages: int = 0


class Debts:
    """Pages owed to one tier; each with whether a save brought it. Under the store's lock.

    max_pages: looked through for lost ones when there are more.
    num_lost:  evicted from host memory before they were written; num_lost_saves: of those, the ones of saves.
    """

    def __init__(self, max_pages: int) -> None:
        self.waiting: dict[Page, bool] = {}
        self.held: dict[Page, bool] = {}
        self.failed: dict[Page, bool] = {}
        self.num_lost = 0
        self.num_lost_saves = 0
        self._max_pages = max_pages

    def owe(self, pages: Iterable[Page], *, is_saved: bool) -> None:
        """Pages are owed from now on."""
        if is_saved:
            self.waiting.update(dict.fromkeys(pages, True))
        else:
            for page in pages:
                self.waiting.setdefault(page, self.failed.get(page, False))
        if self.failed:
            for page in [page for page in self.failed if page in self.waiting]:
                del self.failed[page]
        if len(self) > self._max_pages:
            self.find_lost()

    def take(self, n: int, holds: Callable[[PageKey], bool] | None) -> dict[Page, bool]:
        """Take up to `n` pages whose turn it is. holds: which keys must not be written yet; None if all may be."""
        batch: dict[Page, bool] = {}
        for page, _ in list(zip(self.waiting, range(n), strict=False)):
            is_saved = self.waiting.pop(page)
            if page.state != PageState.READY:
                self._lose(is_saved)
            elif page.block.is_removed:
                continue  # forgotten, and still in use
            elif holds is not None and holds(page.key):
                self.held[page] = is_saved
            else:
                batch[page] = is_saved
        return batch

    def give_back(self, pages: dict[Page, bool]) -> None:
        """Pages that were taken found no room: they go on waiting."""
        self.waiting.update(pages)

    def let_go(self) -> None:
        """A delete is done: pages that were held have their turn."""
        self.waiting.update(self.held)
        self.held.clear()

    def fail(self, page: Page, *, is_saved: bool) -> None:
        """The tier did not take a page."""
        if page.state == PageState.READY:
            self.failed[page] = is_saved
            if len(self) > self._max_pages:
                self.find_lost()
        else:
            self._lose(is_saved)

    def settle(self, pages: Iterable[Page]) -> None:
        """Pages are there after all, or not wanted any more: what is forgotten is not missed."""
        books = [book for book in (self.waiting, self.held, self.failed) if book]
        if books:
            for page in pages:
                for book in books:
                    book.pop(page, None)

    def retry(self) -> None:
        """Try again what failed."""
        self.find_lost()
        self.waiting.update(self.failed)
        self.failed.clear()

    def find_lost(self) -> None:
        """Count, and forget, pages that left host memory."""
        for book in (self.waiting, self.held, self.failed):
            for page in [page for page in book if page.state != PageState.READY]:
                self._lose(book.pop(page))

    def clear(self) -> None:
        """The tier is taken away."""
        for book in (self.waiting, self.held, self.failed):
            book.clear()

    @property
    def num_owed_saves(self) -> int:
        """Pages of saves that wait or are held."""
        return sum(self.waiting.values()) + sum(self.held.values())

    @property
    def num_failed_saves(self) -> int:
        """Pages of saves that were tried in vain."""
        return sum(self.failed.values())

    def __len__(self) -> int:
        return len(self.waiting) + len(self.held) + len(self.failed)

    def _lose(self, is_saved: bool) -> None:
        self.num_lost += 1
        self.num_lost_saves += is_saved
