"""Three clocks that move only when told, as a machine's would."""

from __future__ import annotations

from kvstore.clock import Clock


class Clocks(Clock):
    """A `Clock` for tests: time passes, the machine sleeps, somebody sets the wall clock."""

    def __init__(self, now: float = 1_000.0, unix: float = 1_800_000_000.0) -> None:
        self.now = now
        self.unix = unix
        self.up = now
        super().__init__(wall=lambda: self.unix, steady=lambda: self.now, boot=lambda: self.up)

    def advance(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        self.sleep(seconds)

    def sleep(self, seconds: float) -> None:
        """The machine sleeps."""
        self.unix += seconds
        self.up += seconds

    def set_by(self, seconds: float) -> None:
        """The wall clock is corrected, forward or back."""
        self.unix += seconds
