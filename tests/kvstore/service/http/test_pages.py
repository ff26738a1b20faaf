"""The one way to pages for other languages, as docs/service.md shows it."""

import re
import subprocess
import sys
from pathlib import Path

from kvstore.service.protocol.namespaces import layout_to_json, namespace_to_json
from tests.helpers.daemons import Http, attach, local_daemon
from tests.helpers.stores import LAYOUT, load, namespace, prompt, save
from tests.helpers.waiting import WAIT_S

DOCS = Path(__file__).resolve().parents[4] / "docs" / "service.md"


def test_the_example_of_the_documentation_copies_a_prompt_from_daemon_to_daemon(tmp_path: Path) -> None:
    example = re.search(r"^## Pages for other languages\n.*?^```python\n(.*?)^```$", DOCS.read_text(), re.M | re.S)
    assert example is not None
    with (
        local_daemon(tmp_path / "here.sock", service={"http_port": 0}) as here,
        local_daemon(tmp_path / "there.sock", service={"http_port": 0}) as there,
        attach(tmp_path / "here.sock") as store,
    ):
        ports = [daemon.daemon.app.port for daemon in (here, there)]
        Http(ports[1]).post("/v1/namespaces", layout=layout_to_json(LAYOUT), namespace=namespace_to_json(namespace()))
        save(store, store.request(prompt(3)))
        given = f"tokens = {prompt(3).tolist()}\nhere, there = [f'http://127.0.0.1:{{port}}' for port in {ports}]\n"

        done = subprocess.run(
            [sys.executable, "-I", "-c", given + example[1]], capture_output=True, text=True, timeout=WAIT_S
        )

        assert done.stdout == '{"blocks":3}\n', done.stderr
        with attach(tmp_path / "there.sock") as other:
            assert load(other, other.request(prompt(3)))[0] == 3
