"""What comes after a restore is what a fresh server says."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.llamacpp.front import BLOCK, Front, model_file
from tests.engines.llamacpp.models import make_hybrid_model, make_recurrent_model, make_sliding_model

STORY = (
    "The harbour of the old town lies in the shade of the hill until ten, and the boats that come early find it cold. "
    "A man with a ladder paints the door of the customs house green, as it was before the war. "
)
HEAD = STORY
TAILS = ("The man says:", "In the evening, the boats", "A list of what the customs house keeps:")


def texts(front: Front, prompts: list[str]) -> list[str]:
    return [front.ask(prompt).text for prompt in prompts]


class TestRestart:
    @pytest.mark.parametrize("options", [(), ("--cache-type", "q8_0")], ids=["f16", "q8_0"])
    def test_after_a_restart_a_prompt_resumes_from_disk_with_the_same_text(
        self, start: Callable[..., Front], tmp_path: Path, options: tuple[str, ...]
    ) -> None:
        disk = ("--set", f"disk.path={tmp_path}/disk", "--set", "disk.capacity_bytes=64MiB", *options)
        before = start(*disk)
        cold = before.ask(HEAD + TAILS[0])
        before.stop()

        after = start(*disk)
        warm = after.ask(HEAD + TAILS[0])

        assert cold.cached == 0
        assert warm.by_tier == {"disk": warm.restored}
        assert warm.effect == "full"
        assert warm.cached == warm.restored >= (cold.computed - 1) // BLOCK * BLOCK
        assert warm.text == cold.text

    def test_a_server_that_is_killed_leaves_nothing_wrong(self, start: Callable[..., Front], tmp_path: Path) -> None:
        disk = ("--set", f"disk.path={tmp_path}/disk", "--set", "disk.capacity_bytes=64MiB")
        before = start(*disk)
        cold = before.ask(HEAD + TAILS[0])
        before.stop(signal.SIGKILL)

        warm = start(*disk).ask(HEAD + TAILS[0])

        assert warm.text == cold.text
        assert warm.effect in ("", "full")


class TestSharing:
    def test_prompts_share_a_head_and_answer_as_a_fresh_server_does(self, start: Callable[..., Front]) -> None:
        front = start("--parallel", "1")
        first = front.ask(HEAD + TAILS[0])
        pages = front.stats()["saved_pages"]
        chats = [{"role": "user", "content": "Name one colour."}]
        front.chat(chats)  # takes the one slot
        warm = [front.ask(HEAD + tail) for tail in TAILS]
        fresh = [front.ask(HEAD + tail, cache_prompt=False).text for tail in TAILS]

        assert warm[0].effect == "full"
        assert [answer.text for answer in warm] == fresh
        assert warm[0].text == first.text
        assert front.stats()["saved_pages"] - pages < len(TAILS) * 4  # tails and the chat, not heads

    def test_slots_answer_at_once_each_its_own_prompt(self, start: Callable[..., Front]) -> None:
        front = start("--parallel", "3")
        expected = texts(front, [HEAD + tail for tail in TAILS])
        got: dict[str, str] = {}

        def ask(tail: str) -> None:
            got[tail] = front.ask(HEAD + tail).text

        threads = [threading.Thread(target=ask, args=(tail,)) for tail in TAILS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert [got[tail] for tail in TAILS] == expected

    def test_a_conversation_goes_on_where_it_was_and_streams(self, start: Callable[..., Front], tmp_path: Path) -> None:
        disk = ("--set", f"disk.path={tmp_path}/disk", "--set", "disk.capacity_bytes=64MiB")
        turns = [{"role": "user", "content": STORY + " What colour is the door?"}]
        before = start(*disk)
        answer = before.chat(turns)
        turns += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And the ladder?"}]
        live = before.chat(turns)
        before.stop()

        streamed = start(*disk).chat(turns, stream=True)

        assert streamed.effect == "full"
        assert streamed.text == live.text


class TestIdentity:
    def test_another_type_of_cache_is_refused_the_directory(self, start: Callable[..., Front], tmp_path: Path) -> None:
        disk = ("--set", f"disk.path={tmp_path}/disk", "--set", "disk.capacity_bytes=64MiB")
        start(*disk).stop()

        with pytest.raises(AssertionError, match="give each layout a directory of its own"):
            start(*disk, "--cache-type", "q8_0")

    def test_another_context_shares_no_page_and_the_same_one_does(
        self, start: Callable[..., Front], tmp_path: Path
    ) -> None:
        disk = ("--set", f"disk.path={tmp_path}/disk", "--set", "disk.capacity_bytes=64MiB")
        before = start(*disk, "--context", "1024")
        before.ask(HEAD)
        before.stop()
        other = start(*disk, "--context", "2048")
        assert other.ask(HEAD).restored == 0
        other.stop()

        same = start(*disk, "--context", "1024", "--parallel", "4")

        assert same.ask(HEAD).restored > 0


@pytest.mark.parametrize("make", [make_sliding_model, make_recurrent_model, make_hybrid_model])
def test_a_model_whose_state_has_no_row_for_each_token_is_served_without_the_store_and_says_so(
    start: Callable[..., Front], tmp_path: Path, make: Callable[[Path, Path], Path]
) -> None:
    front = start("--parallel", "1", "--context", "1024", model=make(model_file(), tmp_path / "model.gguf"))
    cold = front.ask(STORY * 3)
    front.ask("Something else, which takes the one slot.")

    again = front.ask(STORY * 3)

    assert again.text == cold.text
    assert again.restored == 0
    stats = front.stats()
    assert stats["saved_pages"] == 0
    assert "sliding window, recurrent, hybrid" in stats["off"]


def test_the_server_and_its_files_end_with_the_front(start: Callable[..., Front]) -> None:
    front = start()
    command = Path(f"/proc/{front.child}/cmdline").read_text()
    folder = Path(json.loads(command.split("\0")[-2])["slot_save_path"])
    assert folder.is_dir()

    front.stop()

    assert not Path(f"/proc/{front.child}").exists()
    assert not folder.exists()
    assert "Traceback" not in front.log
