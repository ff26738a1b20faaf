from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.waiting import WAIT_S

SERVE = """
import gc, json, os, signal, sys
from kvstore.config.sections import Config
from kvstore.service.daemon.daemon import serve

def announce(line):
    if "is up" in line:
        gc.collect()
        print(json.dumps([len(gc.get_objects()), gc.get_freeze_count()]))
        os.kill(os.getpid(), signal.SIGTERM)

serve(Config(service={"socket": sys.argv[1], "http_port": 0}, host={"capacity_bytes": "16MiB"}), announce)
"""


def test_the_collector_walks_little_of_a_daemon_that_has_started(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVE, str(tmp_path / "socket")]

    told = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=True).stdout

    walked, frozen = json.loads(told)
    assert walked < frozen / 20
