"""The dashboard in a real browser, over a daemon that real clients use."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.plan.records import RequestOptions
from kvstore.ports import free_port
from tests.helpers.browser import Browser, open_browser
from tests.helpers.daemons import DaemonProcess, LocalDaemon, attach, local_daemon
from tests.helpers.hints import envelope
from tests.helpers.http_pages import HttpPages
from tests.helpers.stores import BLOCK, prompt, save, use
from tests.helpers.waiting import WAIT_S

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def shared() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def browser(shared: Browser) -> Iterator[Browser]:
    shared.complaints()
    yield shared
    shared.driver.get("about:blank")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LocalDaemon]:
    sections = {"service": {"http_port": 0, "max_namespaces": 2}, "store": {"load_or_recompute": False}}
    with local_daemon(tmp_path / "kv.sock", tmp_path / "disk", **sections) as daemon:
        yield daemon


def url(daemon: LocalDaemon) -> str:
    return f"http://127.0.0.1:{daemon.daemon.app.port}/"


def socket(daemon: LocalDaemon) -> Path:
    assert daemon.config.service.socket is not None
    return daemon.config.service.socket


def fork(seed: int) -> list[int]:
    """A conversation over the system prompt that all share."""
    return [*prompt(6, 1, tail=0).tolist(), *prompt(3, 100 + seed).tolist()]


def number(text: str) -> float:
    found = re.search(r"[0-9][0-9.,]*", text)
    return float(found[0].replace(",", "")) if found else 0.0


def test_an_unused_daemon_teaches_what_to_run(browser: Browser, daemon: LocalDaemon) -> None:
    browser.look(url(daemon))

    browser.wait(lambda: "Nothing has been asked yet" in browser.text("#empty"))
    assert f"KVSTORE_SERVICE__URL={url(daemon).rstrip('/')} python engine.py" in browser.text("#attach")
    assert "no engine is attached" in browser.text("#empty-text")
    assert browser.text("#status") == "live"
    assert browser.complaints() == []


def test_the_page_follows_a_client_that_stores_and_loads(browser: Browser, daemon: LocalDaemon) -> None:
    browser.look(url(daemon))
    browser.wait(lambda: browser.text("#status") == "live")

    with attach(socket(daemon), client="replica-7") as store:
        for seed in range(4):
            use(store, fork(seed))
        browser.wait(lambda: number(browser.text("#hit-rate")) > 30)
        browser.wait(lambda: browser.texts("#clients tbody td:first-child") == ["replica-7"])
        assert browser.texts("#tiers .place b") == ["Engines", "Host memory", "Disk"]
        assert not browser.run("return document.getElementById('empty').checkVisibility()")
        before = number(browser.text("#hit-rate"))

        for _ in range(6):
            use(store, fork(0))

        browser.wait(lambda: number(browser.text("#hit-rate")) > before + 5)
    browser.wait(lambda: browser.text("#tiers .engines .state") == "0 attached")
    assert browser.run("return document.querySelectorAll('.chart canvas').length") == 2
    assert browser.complaints() == []


def test_the_tree_shows_what_is_shared_and_opens_by_mouse_and_keyboard(browser: Browser, daemon: LocalDaemon) -> None:
    from selenium.webdriver.common.keys import Keys

    with attach(socket(daemon)) as store:
        for seed in range(3):
            use(store, fork(seed), RequestOptions(session=f"chat {seed}"))
        use(store, fork(0), RequestOptions(session="chat 0"))
        use(store, prompt(2, 50))
        browser.look(url(daemon))

        # The prompt that most share is open at once.
        browser.wait(lambda: len(browser.texts("#prefixes tbody tr")) == 5)
    first, *branches = browser.texts("#prefixes tbody tr")
    assert "shared by 3" in first
    assert f"{6 * BLOCK}" in first
    assert (
        browser.text("#prefixes tbody tr .hits") == "3"
    )  # loads of the two that followed, and of the one that came back
    assert sorted(row.split()[1:3] for row in branches[:3]) == [["chat", str(seed)] for seed in range(3)]

    browser.click("#prefixes tbody tr")
    browser.wait(lambda: len(browser.texts("#prefixes tbody tr")) == 2)
    browser.press(Keys.ARROW_RIGHT)
    browser.wait(lambda: len(browser.texts("#prefixes tbody tr")) == 5)
    browser.press(Keys.ARROW_DOWN)
    assert browser.run("return document.activeElement.getAttribute('aria-level')") == "2"
    browser.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    browser.wait(lambda: browser.run("return document.activeElement.getAttribute('aria-expanded')") == "false")
    assert browser.complaints() == []


def test_misses_say_why_and_can_be_filtered(browser: Browser, daemon: LocalDaemon) -> None:
    with attach(socket(daemon)) as store:
        use(store, fork(0), RequestOptions(session="chat 0"))
        assert store.flush(WAIT_S)
        store.keep.forget(store.request(fork(0)))
        use(store, fork(0))
        browser.look(url(daemon))
        browser.wait(lambda: len(browser.texts("#misses tbody tr")) == 2)

    newest, oldest = browser.texts("#misses tbody tr")
    assert "deleted" in newest
    assert "was deleted from" in newest
    assert "never stored" in oldest
    assert "chat 0" in oldest
    browser.click("#reasons .deleted")
    browser.wait(lambda: len(browser.texts("#misses tbody tr")) == 1)
    assert browser.complaints() == []


@pytest.mark.parametrize("size", ["wide", "phone"])
def test_what_a_policy_believes_is_drawn(browser: Browser, tmp_path: Path, size: str) -> None:
    sections = {
        "service": {"http_port": 0, "max_namespaces": 2},
        "store": {"load_or_recompute": False},
        "host": {"policy": "outlook"},
    }
    with local_daemon(tmp_path / "kv.sock", tmp_path / "disk", **sections) as daemon:
        with attach(socket(daemon)) as store:
            for seed in range(12):
                for turn, reason in enumerate(("tool_calls", "stop")):
                    request = store.request(fork(seed), RequestOptions(session=f"chat {seed}"))
                    store.wait_lookup(request)
                    save(store, request)
                    store.keep.finished(request, finish_reason=reason, reply_tokens=100 * turn)
        browser.look(url(daemon), size)

        browser.wait(lambda: "all blocks" in browser.text("#beliefs"))
        assert browser.text("#beliefs h3").startswith("outlook of host")
        assert browser.text("#beliefs-note") == "disk: lru learns nothing"
        assert {"used twice", "after tool_use", "after end_turn"} <= set(browser.texts("#beliefs td.class"))
        seen, drawn = browser.run(
            """const rows = [...document.querySelectorAll("#beliefs tbody tr")];
            const row = rows.find((one) => one.innerText.includes("used twice"));
            const bar = row.querySelector(".stack").getBoundingClientRect().width;
            const parts = [...row.querySelectorAll(".part")].map((one) => one.getBoundingClientRect().width / bar);
            return [parseFloat(row.children[4].textContent), 100 * parts.reduce((sum, part) => sum + part)];"""
        )
        assert abs(seen - drawn) < 2, "the bar is as long as the number says"
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        assert browser.complaints() == []


def test_where_no_policy_learns_there_is_no_such_card(browser: Browser, daemon: LocalDaemon) -> None:
    with attach(socket(daemon)) as store:
        use(store, fork(0))
    browser.look(url(daemon))
    browser.wait(lambda: browser.text("#status") == "live")
    browser.wait(
        lambda: browser.run(
            "return performance.getEntriesByType('resource').some((one) => one.name.includes('/dashboard/policies'))"
        )
    )
    assert not browser.run("return document.getElementById('beliefs-card').checkVisibility()")


@pytest.mark.parametrize("size", ["wide", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window_and_can_be_read(browser: Browser, daemon: LocalDaemon, size: str, scheme: str) -> None:
    with attach(socket(daemon), client="a client with quite a long name, pid 123456") as store:
        for seed in range(4):
            use(store, fork(seed), RequestOptions(session=f"a conversation with a rather long name {seed}"))
        browser.look(url(daemon), size, scheme)
        browser.wait(lambda: len(browser.texts("#prefixes tbody tr")) > 3)

        width, window = browser.run("return [document.documentElement.scrollWidth, innerWidth]")

    assert width <= window
    assert browser.run(CONTRAST) == []
    lightness = browser.run("return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (sum(lightness) < 200) == (scheme == "dark")
    assert browser.run(UNLABELLED) == []
    assert browser.complaints() == []


def test_a_daemon_that_is_killed_is_told_and_its_return_noticed(browser: Browser, tmp_path: Path) -> None:
    port = free_port()
    daemon = DaemonProcess(tmp_path / "kv.sock", tmp_path / "disk", f"service.http_port={port}")
    try:
        with attach(tmp_path / "kv.sock") as store:
            save(store, store.request(fork(0)))
            assert store.flush(WAIT_S)
        browser.look(f"http://127.0.0.1:{port}/")
        browser.wait(lambda: len(browser.texts("#prefixes tbody tr")) == 1)

        daemon.kill()

        browser.wait(lambda: "The daemon is away" in browser.text("#away"))
        assert browser.text("#status") == "away"
        assert len(browser.texts("#prefixes tbody tr")) == 1  # what was last known stays to be read

        daemon.start()
        browser.wait(lambda: browser.text("#status") == "live")
        assert browser.text("#away") == ""
        with attach(tmp_path / "kv.sock") as store:
            use(store, fork(0))
            browser.wait(lambda: "KiB" in browser.text("#tiers .host .facts"))
        # Only what every browser says of a server that does not answer.
        assert [line for line in browser.complaints() if "ERR_CONNECTION_REFUSED" not in line] == []
    finally:
        daemon.kill()


def test_a_tier_that_goes_down_is_seen(browser: Browser, daemon: LocalDaemon) -> None:
    with attach(socket(daemon)) as store:
        use(store, fork(0))
        browser.look(url(daemon))
        browser.wait(lambda: browser.text("#health") == "All up")

        (opened,) = daemon.look(lambda d: d.stores.all())
        lane = opened.store._dispatcher.lanes["disk"]
        lane.breaker._probe_after_s = lane.breaker._backoff_s = 30.0
        lane.breaker.trip()

        browser.wait(lambda: browser.text("#health") == "1 down")
        assert "disk was taken out" in browser.text("#incidents")
        assert "down for" in browser.text("#tiers .disk .state")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_clients_that_render_chats_in_different_ways_are_warned_of(
    browser: Browser, daemon: LocalDaemon, scheme: str
) -> None:
    first, second = "5f0c3ab1d2e49867", "91ab00cd5f0c3ab1"
    with attach(socket(daemon), client="replica-0", rendering=first) as store, attach(socket(daemon), client="engine"):
        use(store, fork(0))
        with attach(socket(daemon), client="replica-1", rendering=first):
            browser.look(url(daemon), scheme=scheme)
            browser.wait(lambda: len(browser.texts("#clients tbody tr")) == 3)
            assert browser.text("#renderings") == ""

        with attach(socket(daemon), client="replica-2", rendering=second):
            browser.wait(lambda: "render chats in 2 ways" in browser.text("#renderings"))
            told = browser.text("#renderings")
            assert "replica-0 (5f0c3ab1); replica-2 (91ab00cd)" in told
            assert "They share no pages of chats until" in told
            assert browser.run(CONTRAST) == []

        browser.wait(lambda: browser.text("#renderings") == "")
    assert browser.complaints() == []


def test_pins_are_shown_until_they_end(browser: Browser, daemon: LocalDaemon) -> None:
    shown = "return document.getElementById('kept-card').checkVisibility()"
    bad = "<img src=x onerror=alert(1)>"
    with attach(socket(daemon), client="agent") as store:
        use(store, prompt(4))
        browser.look(url(daemon))
        browser.wait(lambda: browser.texts("#clients tbody td:first-child") == ["agent"])
        assert not browser.run(shown)

        store.hint(envelope(("pin", {"ttl_s": 600, "session": bad})), store.request(prompt(4)))

        browser.wait(lambda: browser.texts("#kept tbody tr") != [])
        assert browser.run(shown)
        holder, size, until = browser.texts("#kept tbody td")
        assert re.fullmatch(rf"agent \(client \d+\), session {re.escape(bad)}", holder)
        assert number(size) > 0
        assert re.search(r"\d\d:\d\d", until)
        assert browser.run("return document.querySelectorAll('main img').length") == 0
        assert browser.run(CONTRAST) == []

        store.hint(envelope(("release", {"session": bad})), store.request(prompt(4)))
        browser.wait(lambda: not browser.run(shown))
    assert browser.complaints() == []


def test_nothing_is_asked_while_nobody_looks(browser: Browser, daemon: LocalDaemon) -> None:
    browser.look(url(daemon))
    browser.wait(lambda: browser.text("#status") == "live")

    # A second tab in front hides the first.
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    try:
        browser.wait(lambda: quiet(browser, daemon), "the page goes on asking")
    finally:
        browser.driver.close()
        browser.driver.switch_to.window(first)

    before = daemon.daemon.app.num_requests
    browser.wait(lambda: daemon.daemon.app.num_requests > before + 3)


def quiet(browser: Browser, daemon: LocalDaemon) -> bool:
    """Whether no request came in the time in which a page that is looked at makes four."""
    before = daemon.daemon.app.num_requests
    browser.run("return new Promise((done) => setTimeout(done, 2500))")
    return daemon.daemon.app.num_requests == before


def test_a_tenant_gives_a_token_and_sees_its_own(browser: Browser, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(
        '[[tenant]]\nname = "blue"\ntoken = "blue-token-0123456789"\n'
        '[[tenant]]\nname = "green"\ntoken = "green-token-0123456789"\n'
    )
    tokens.chmod(0o600)
    sections = {"service": {"http_port": 0, "tokens_file": tokens}}
    with local_daemon(tmp_path / "kv.sock", **sections) as daemon:
        for name in ("blue", "green"):
            HttpPages(daemon.daemon.app.port, f"{name}-token-0123456789").save(fork(0))
        browser.look(url(daemon))
        browser.wait(lambda: browser.run("return document.getElementById('login').open"))

        browser.press("a wrong token that is long enough\n")
        browser.wait(lambda: "does not know this token" in browser.text("#login-error"))
        browser.press("blue-token-0123456789\n")

        browser.wait(lambda: browser.texts("#tenants tbody td:first-child") == ["blue"])
        assert "tenant blue" in browser.text("#version")
        assert "blue-token" not in browser.run("return document.documentElement.outerHTML + document.cookie")
        browser.driver.refresh()  # kept for this tab
        browser.wait(lambda: browser.texts("#tenants tbody td:first-child") == ["blue"])
        assert all("401" in line for line in browser.complaints())


def test_names_from_clients_are_text(browser: Browser, daemon: LocalDaemon) -> None:
    bad = "<img src=x onerror=alert(1)>"
    with attach(socket(daemon), client=bad) as store:
        use(store, fork(0), RequestOptions(session=bad))
        browser.look(url(daemon))
        browser.wait(lambda: browser.texts("#clients tbody td:first-child") == [bad])

        assert bad in browser.text("#misses tbody tr")
        assert browser.run("return document.querySelectorAll('main img').length") == 0
        assert browser.complaints() == []


# Text whose contrast with what lies behind it is below 4.5 (WCAG AA); 3 where it is large.
CONTRAST = """
const luminance = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const rgba = (text) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
const behind = (element) => {
  for (let one = element; one; one = one.parentElement) {
    const colour = rgba(getComputedStyle(one).backgroundColor);
    if (colour[3] > 0.85) return colour;
  }
  return [255, 255, 255, 1];
};
const bad = [];
for (const element of document.querySelectorAll('body *')) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.checkVisibility() || element.closest('noscript')) continue;
  const style = getComputedStyle(element);
  const [one, other] = [luminance(rgba(style.color)), luminance(behind(element))].sort((a, b) => b - a);
  const ratio = (one + 0.05) / (other + 0.05);
  const least = parseFloat(style.fontSize) >= 24 ? 3 : 4.5;
  if (ratio < least) bad.push(`${element.tagName}.${element.className} ${ratio.toFixed(2)}`);
}
return bad;
"""

# What can be used but has no name for those who do not see it.
UNLABELLED = """
return [...document.querySelectorAll('input, select, button, a, [role=img], [role=treegrid], [role=region]')]
  .filter((one) => one.checkVisibility() && !(one.getAttribute('aria-label') || one.getAttribute('aria-labelledby')
    || one.labels?.length || one.textContent.trim()))
  .map((one) => one.outerHTML.slice(0, 80));
"""
