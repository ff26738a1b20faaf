"""A process that saves, deletes, says what is acknowledged, and waits to be killed. Run by tests/fault/test_deletes.py.

    python -m tests.fault.delete_writer forget|clear DIR [REDIS_URL]

It saves and flushes prompts 0 to 3, deletes 0 and 1 (or all), saves prompt 1 once more, and prints the flush that
follows as a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.helpers.stores import open_small, prompt, save

FLUSH_S = 30.0


def main() -> None:
    verb, directory, *url = sys.argv[1:]
    store = open_small(Path(directory), url[0] if url else None)
    for seed in range(4):
        save(store, store.request(prompt(4, seed)))
    assert store.flush(FLUSH_S)
    if verb == "clear":
        store.admin.clear()
    else:
        for seed in (0, 1):
            assert store.keep.forget(store.request(prompt(4, seed))) == 4
    save(store, store.request(prompt(4, 1)))
    result = store.flush(FLUSH_S)
    print(json.dumps({"ok": result.ok, "undeleted": result.undeleted, "missing": result.missing}), flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
