"""Writes down what vLLM or SGLang publish of their KV cache (the file is event_log.py's), for `kvstore record-events`.

The publisher's socket knows nothing of its listeners: what is sent while there is none, or faster than it is taken, is
gone. So the numbers of the messages are watched, and gaps are counted.
"""

from __future__ import annotations

import json
import os
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.extras import how_to_install
from kvstore.lab.traces.event_log import FORMAT, stripped

WAIT_MS = 500
QUEUE = 100_000  # messages that may wait in the socket


@dataclass(slots=True)
class Recorded:
    """Counts so far. num_missed: by the gaps in their numbers. num_bad: were no messages of this kind."""

    num_messages: int = 0
    num_missed: int = 0
    num_bad: int = 0


def listen(endpoint: str, topic: str, until: Callable[[], bool]) -> Iterator[Sequence[bytes]]:
    """Yield messages, as lists of frames, until `until` says so. Raises ConfigError without pyzmq or an address."""
    try:
        import zmq
    except ImportError as error:
        raise ConfigError(f"listening to {endpoint} needs pyzmq; {how_to_install('events')}") from error
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.RCVHWM, QUEUE)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        try:
            if "*" in endpoint:  # vLLM's own rule: where its address has none, it is the publisher that connects
                socket.bind(endpoint)
            else:
                socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"{endpoint} is no address to listen to: {error}; write tcp://HOST:PORT, or tcp://*:PORT"
            ) from error
        while not until():
            if socket.poll(WAIT_MS):
                yield socket.recv_multipart()


def record(
    messages: Iterable[Sequence[bytes]],
    path: Path,
    endpoint: str,
    on_message: Callable[[Recorded], None] = lambda _: None,
) -> Recorded:
    """Write messages to the end of a file, each at once. Token ids and salts are left out."""
    counted, last = Recorded(), dict[str, int]()
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "w", encoding="utf-8") as out:
        out.write(("\n" if out.tell() else "") + json.dumps({"format": FORMAT, "endpoint": endpoint}) + "\n")
        for frames in messages:
            try:
                topic, number, payload = frames
                seq, name = int.from_bytes(number, "big", signed=True), topic.decode()
                line = {
                    "at": round(time.time(), 3),
                    "topic": name,
                    "seq": seq,
                    "b": b64encode(stripped(payload)).decode(),
                }
            except ValueError:
                counted.num_bad += 1
                continue
            counted.num_messages += 1
            if name in last and seq > last[name]:
                counted.num_missed += seq - last[name] - 1
            last[name] = seq
            out.write(json.dumps(line, separators=(",", ":")) + "\n")
            out.flush()
            on_message(counted)
    return counted
