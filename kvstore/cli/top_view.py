"""How `kvstore top` looks: answers of the dashboard's operations in, something rich can print out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from kvstore.console import add_row, table
from kvstore.palette import TERMINAL as COLOURS
from kvstore.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from kvstore.service.dashboard.client import DashboardClient

BARS = "▁▂▃▄▅▆▇█"
BAR_WIDTH = 24
SPARK_WIDTH = 40
HIT_WINDOW = 10  # samples a point of the sparkline is taken over
MAX_PREFIXES = 8
MAX_MISSES = 6
MAX_KEPT = 6


@dataclass
class TopView:
    """One moment. away: a line in front of it that says that it is over."""

    url: str
    now: dict[str, Any]
    series: dict[str, Any]
    prefixes: dict[str, Any]
    away: Text | None = None

    @classmethod
    def ask(cls, client: DashboardClient, span_s: float) -> TopView:
        """Ask a daemon. Raises as its client does."""
        return cls(client.url, client.get("now"), client.get("series", span_s=span_s), client.get("prefixes"))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.away is not None:
            yield self.away
        yield self._head()
        if not self.now["total"]["lookups"]:
            yield Text(
                f"\nNothing has been asked yet. Attach an engine on {self.now['node']} with\n"
                f"  KVSTORE_SERVICE__URL={self.now.get('engines_url') or self.url} python engine.py\n"
                "or see it all at once:  kvstore cluster up, then kvstore load\n",
                style="dim",
            )
        yield Group(self._hits(), self._sums(), self._tiers(), self._prefixes(), *self._kept(), self._misses())

    def _head(self) -> Text:
        now = self.now
        head = Text(f" kvstore {now['node']}", style="bold")
        head.append(f"  {now['status']}", style="green" if now["status"] == "ready" else "bold red")
        clients = "1 client" if now["num_clients"] == 1 else f"{now['num_clients']} clients"
        head.append(f"  up {format_seconds(round(now['at'] - now['started_at']))}  {clients}", style="dim")
        if not now["is_operator"]:
            head.append(f"  tenant {now['tenant']}", style="dim")
        return head

    def _hits(self) -> Table:
        recent, total = self.now["recent"], self.now["total"]
        rows = table("hit rate", "minute", "start", "of late", right=("minute", "start"))
        configured = {tier["tier"] for tier in self.now["tiers"]}  # none is known before an engine has attached
        spark = {tier: self._spark([tier]) for tier in recent["hit_tokens"] if tier in configured}
        add_row(
            rows,
            Text("all tiers", style="bold"),
            Text(_share(recent), style="bold"),
            _share(total),
            self._spark(list(recent["hit_tokens"])),
        )
        for tier, line in spark.items():
            add_row(
                rows,
                Text(f"  {tier}", style=COLOURS.get(tier, "cyan")),
                _share(recent, tier),
                _share(total, tier),
                line,
            )
        return rows

    def _sums(self) -> Text:
        recent, saved = self.now["recent"], self.now["total"]["ttft_saved_s"]
        rate = recent["prompt_tokens"] / recent["span_s"] if recent["span_s"] else 0.0
        told = (
            f"TTFT saved {format_seconds(round(saved, 1))} since the start" if saved else "TTFT saved is not known yet"
        )
        return Text(f" {rate:,.0f} prompt tokens/s, {recent['lookups']:,} lookups in the last minute; {told}")

    def _spark(self, tiers: Sequence[str]) -> Text:
        """Hit rate over time, the newest at the right; a space where nothing was asked."""
        prompts = self.series["prompt_tokens"]
        hits = [sum(at) for at in zip(*(self.series["hit_tokens"][tier] for tier in tiers), strict=True)]
        line = ""
        for end in range(max(1, len(prompts) - SPARK_WIDTH + 1), len(prompts) + 1):
            first = max(0, end - HIT_WINDOW)
            asked = sum(prompts[first:end])
            share = min(1.0, sum(hits[first:end]) / asked) if asked > 0 else None
            line += " " if share is None else BARS[round(share * (len(BARS) - 1))]
        return Text(line, style=COLOURS.get(tiers[0], "cyan") if len(tiers) == 1 else "bold")

    def _tiers(self) -> Table:
        rows = table("tier", "used", "", "of", "in", "out", "state", right=("used", "of", "in", "out"))
        speeds = {(flow["source"], flow["target"]): flow["bytes_per_s"] for flow in self.now["flows"]}
        for tier in self.now["tiers"]:
            name = tier["tier"]
            # Seen from host memory: engines save into it and load from it; a lower tier is written and fetched from.
            other = "engines" if name == "host" else "host"
            capacity = tier["capacity_bytes"]
            state = Text("up", style="green")
            if not tier["is_up"]:
                state = Text(f"DOWN for {format_seconds(round(self.now['at'] - tier['since']))}", style="bold red")
            elif tier["left_out"]:
                ways = ", ".join(sorted(tier["left_out"]))
                state = Text(f"up, but no {ways}: {next(filter(None, tier['left_out'].values()), 'refused')}", "yellow")
            elif tier["num_opened"]:
                state.append(f", was down {tier['num_opened']} times", style="dim")
            if tier["waiting_bytes"]:
                state.append(f", {format_bytes(tier['waiting_bytes'])} {'dirty' if name == 'host' else 'owed'}")
            if tier["lost_pages"]:
                state.append(f", {tier['lost_pages']:,} pages lost to it", style="yellow")
            if tier["budget"]:
                state.append(f", {_budget(tier['budget'])}", style="yellow" if tier["budget"]["is_spent"] else "dim")
            add_row(
                rows,
                Text(name, style=COLOURS.get(name, "cyan")),
                format_bytes(tier["used_bytes"]),
                _bar(tier["used_bytes"] / capacity, COLOURS.get(name, "cyan")) if capacity else Text(),
                format_bytes(capacity) if capacity else "-",
                f"{format_bytes(round(speeds.get((other, name), 0)))}/s",
                f"{format_bytes(round(speeds.get((name, other), 0)))}/s",
                state,
            )
        return rows

    def _prefixes(self) -> Table:
        rows = table("hottest prefixes", "tokens", "stored", "hits", "used", right=("tokens", "stored", "hits", "used"))
        nodes = self.prefixes["levels"][""]["nodes"][:MAX_PREFIXES]
        for node in nodes:
            who = f"shared by {node['branches']}" if node["branches"] > 1 else node["session"]
            used = "never" if node["used_s"] is None else f"{format_seconds(round(node['used_s']))} ago"
            add_row(
                rows,
                Text.assemble((node["id"][:10], "cyan"), f"  {_plain(who)}"),
                f"{node['tokens']:,}",
                format_bytes(sum(node["bytes"].values())),
                f"{node['hits']:,}",
                used,
            )
        if not nodes:
            add_row(rows, Text("nothing is stored", style="dim"), "", "", "", "")
        return rows

    def _kept(self) -> list[Table]:
        """Who has what kept in host memory, where anybody has."""
        kept = self.now.get("kept") or []
        rows = table("kept in host memory for", "bytes", "until", right=("bytes", "until"))
        for one in kept[:MAX_KEPT]:
            holder = _plain(one["holder"] or "this process")
            salt = f"  tenant {one['salt']}" if one["salt"] else ""
            until = datetime.fromtimestamp(one["until"]).strftime("%H:%M:%S")
            add_row(rows, Text.assemble(holder, (salt, "dim")), format_bytes(one["num_bytes"]), until)
        return [rows] if kept else []

    def _misses(self) -> Table:
        rows = table("last misses", "reason", "hit", "prompt", "why", right=("hit", "prompt"))
        misses = self.now["misses"][:MAX_MISSES]
        for miss in misses:
            add_row(
                rows,
                datetime.fromtimestamp(miss["at"]).strftime("%H:%M:%S"),
                miss["reason"].replace("_", " "),
                f"{miss['hit_tokens']:,}",
                f"{miss['prompt_tokens']:,}",
                Text(miss["text"], style="dim"),
            )
        if not misses:
            add_row(rows, Text("none", style="dim"), "", "", "", "")
        return rows


def _share(use: dict[str, Any], tier: str | None = None) -> str:
    if not use["prompt_tokens"]:
        return "-"
    hits = sum(use["hit_tokens"].values()) if tier is None else use["hit_tokens"][tier]
    return f"{min(1.0, hits / use['prompt_tokens']):.1%}"


def _budget(budget: dict[str, Any]) -> str:
    """The bytes that may be written now, and a day."""
    a_day = f"{format_bytes(budget['bytes_per_day'])} a day"
    spent = f", spent {budget['num_spent']} times" if budget["num_spent"] else ""
    if budget["is_spent"]:
        return f"write budget of {a_day} is spent{spent}"
    return f"may write {format_bytes(budget['left_bytes'])} now, {a_day}{spent}"


def _bar(share: float, colour: str) -> Text:
    full = round(max(0.0, min(1.0, share)) * BAR_WIDTH)
    return Text.assemble(("█" * full, colour), ("░" * (BAR_WIDTH - full), "dim"))


def _plain(text: str) -> str:
    """Without what could move the cursor: names come from clients."""
    return "".join(char if char.isprintable() else "?" for char in text)
