"""A real replica process on a tiny random model, over HTTP."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.helpers.replicas import POSITIONS, Server, Stream, call
from tests.helpers.waiting import wait_until

LONG = POSITIONS - 300  # answer tokens; seconds of computing
CHAT = [{"role": "system", "content": "You are brief. " * 20}, {"role": "user", "content": "why?"}]


def words(num_tokens: int, name: str) -> str:
    """A text of so many tokens, which is one byte each, like no other name's."""
    return (f"{name}: " + "the store keeps what was computed once and gives it back to whoever asks. " * 60)[
        :num_tokens
    ]


def greedy(server: Server, path: str = "/v1/completions", **fields: Any) -> Any:
    answer = server.post(path, **{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **fields})
    assert answer.status == 200, answer.raw
    return answer


def saved(server: Server, prompt: str) -> Callable[[], bool]:
    """Saving goes on after the answer: wait for it before the next request."""
    return lambda: bool(server.post("/v1/lookup", prompt=prompt).body["hit_tokens"])


def is_idle(server: Server) -> bool:
    stats = server.get("/v1/stats").body
    return not (stats["running"] or stats["queued"] or stats["held_tokens"] or stats["store"]["leases"])


def metric(server: Server, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", server.get("/metrics").raw.decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_the_text_is_the_same_without_the_cache_with_it_and_from_it(replica: Server) -> None:
    prompt = words(300, "same")
    without = greedy(replica, prompt=prompt, kvstore={"cache": False})
    first = greedy(replica, prompt=prompt)
    wait_until(saved(replica, prompt))

    again = greedy(replica, prompt=prompt)
    without_again = greedy(replica, prompt=prompt, kvstore={"cache": False})

    assert without.text == first.text == again.text == without_again.text
    assert [answer.hit_tokens for answer in (without, first, again, without_again)] == [0, 0, 256, 0]
    assert again.body["usage"]["prompt_tokens_details"] == {"cached_tokens": 256}
    assert again.body["usage"]["total_tokens"] == 312


def test_lookup_says_what_a_request_would_find_and_changes_nothing(replica: Server) -> None:
    prompt = words(200, "lookup")
    before = replica.post("/v1/lookup", prompt=prompt).body
    greedy(replica, prompt=prompt)
    wait_until(saved(replica, prompt))

    after = replica.post("/v1/lookup", prompt=prompt).body

    assert (before["prompt_tokens"], before["hit_tokens"]) == (200, 0)
    assert after == {
        "prompt_tokens": 200,
        "hit_tokens": 192,
        "by_tier": {"host": 192, "disk": 0, "redis": 0},
        "shared_tokens": 0,
        "queued_requests": 0,
        "queued_tokens": 0,
    }
    assert replica.post("/v1/lookup", prompt=prompt, kvstore={"cache": False}).body["hit_tokens"] == 0
    assert replica.post("/v1/lookup", messages=CHAT).body["prompt_tokens"] > 300


def test_hints_change_no_text_and_are_answered_one_by_one(replica: Server) -> None:
    prompt = words(300, "hints")
    message = {
        "protocol_version": "1.0",
        "message_id": "m",
        "actions": [
            {"action_id": "a", "action_type": "retain", "action_version": "1.0", "payload": {"ttl_s": -1}},
            {"action_id": "b", "action_type": "evaporate", "action_version": "1.0", "payload": {}},
        ],
    }
    plain = greedy(replica, prompt=prompt, kvstore={"cache": False})

    told = greedy(replica, prompt=prompt, kvstore={"hints": message}, kv_transfer_params={"kv_hint": [7]})

    assert told.text == plain.text
    outcomes = [(one["action_id"], one["action"], one["status"]) for one in told.body["kvstore"]["hints"]]
    assert outcomes == [("a", "retain", "rejected"), ("b", "unknown", "ignored"), ("", "envelope", "rejected")]
    assert "hints" not in plain.body["kvstore"]
    unused = greedy(replica, prompt=prompt, kvstore={"hints": message, "cache": False})
    assert [one["reason"] for one in unused.body["kvstore"]["hints"]] == ["the store is not used for this request"]


def test_breakpoints_of_a_chat_are_hints(replica: Server) -> None:
    path, control = "/v1/chat/completions", {"type": "ephemeral", "ttl": "1h"}
    system = [{"type": "text", "text": CHAT[0]["content"], "cache_control": control}]
    plain = greedy(replica, path, messages=CHAT)

    told = greedy(replica, path, messages=[{"role": "system", "content": system}, CHAT[1]])

    assert told.text == plain.text
    (outcome,) = told.body["kvstore"]["hints"]
    assert (outcome["action_id"], outcome["action"]) == ("messages[0].content[0].cache_control", "retain")

    def is_retained() -> bool:
        again = greedy(replica, path, messages=[{"role": "system", "content": system}, CHAT[1]])
        (outcome,) = again.body["kvstore"]["hints"]
        return bool(outcome.get("tokens", 0) >= 256 and outcome["until"] > time.time() + 3000)

    wait_until(is_retained)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_is_the_answer_in_pieces(replica: Server, path: str) -> None:
    asked: dict[str, Any] = {"messages": CHAT} if "chat" in path else {"prompt": words(100, "pieces")}
    whole = greedy(replica, path, **asked)

    stream = Stream(
        replica.url, path, {**asked, "max_tokens": 12, "temperature": 0, "stream_options": {"include_usage": True}}
    )
    streamed = stream.finish()

    assert streamed.text == whole.text
    assert len(streamed.events) == 13  # one for each token, and the usage
    assert streamed.events[-2]["choices"][0]["finish_reason"] == whole.body["choices"][0]["finish_reason"] == "length"
    assert streamed.last["usage"]["completion_tokens"] == whole.body["usage"]["completion_tokens"] == 12
    assert stream.is_done
    assert streamed.replica == whole.replica == "the-replica"


def test_a_stream_without_usage_ends_with_its_last_piece(replica: Server) -> None:
    streamed = Stream(replica.url, "/v1/completions", {"prompt": "once", "max_tokens": 2}).finish()

    assert [bool(event["choices"]) for event in streamed.events] == [True, True]
    assert "usage" not in streamed.last


def test_times_in_the_answer_are_those_a_client_sees(replica: Server) -> None:
    stream = Stream(
        replica.url,
        "/v1/completions",
        {"prompt": [7] * (POSITIONS - 100), "max_tokens": 40, "stream_options": {"include_usage": True}},
    )

    answer = stream.finish()

    told, seen = answer.last["kvstore"], answer.seconds
    parts_s = told["queue_s"] + told["load_s"] + told["prefill_s"]
    assert 0 < parts_s <= told["ttft_s"] <= seen[0]
    assert told["ttft_s"] > seen[0] / 2
    assert 0 < told["decode_s"] <= seen[-1] - parts_s


def test_a_stop_string_ends_the_answer_wherever_pieces_are_cut(replica: Server) -> None:
    prompt = words(64, "stop")
    text = greedy(replica, prompt=prompt, max_tokens=40).text
    stop = text[10:14]
    expected = text[: text.index(stop)]

    whole = greedy(replica, prompt=prompt, max_tokens=40, stop=["never in there", stop])
    streamed = Stream(
        replica.url, "/v1/completions", {"prompt": prompt, "max_tokens": 40, "temperature": 0, "stop": stop}
    ).finish()

    assert whole.text == streamed.text == expected
    assert whole.body["choices"][0]["finish_reason"] == "stop"
    assert streamed.last["choices"][0]["finish_reason"] == "stop"


def test_requests_at_once_get_the_answers_they_get_alone(replica: Server) -> None:
    prompts = [words(150 + 40 * i, f"at once {i}") for i in range(4)]
    alone = [greedy(replica, prompt=prompt, kvstore={"cache": False}).text for prompt in prompts]

    streams = [
        Stream(
            replica.url, "/v1/completions", {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        )
        for prompt in prompts
    ]

    assert [stream.finish().text for stream in streams] == alone


def test_a_seed_repeats_a_draw(replica: Server) -> None:
    draws = [greedy(replica, prompt="once", temperature=1.5, seed=seed).text for seed in (1, 1, 2)]

    assert draws[0] == draws[1] != draws[2]


def test_tenants_do_not_find_each_others_pages(replica: Server) -> None:
    prompt = words(200, "tenant")
    greedy(replica, prompt=prompt, kvstore={"tenant": "one"})
    wait_until(lambda: replica.post("/v1/lookup", prompt=prompt, kvstore={"tenant": "one"}).body["hit_tokens"] == 192)

    assert greedy(replica, prompt=prompt, kvstore={"tenant": "two"}).hit_tokens == 0


@pytest.mark.parametrize("read", [0, 3])
def test_a_client_that_leaves_frees_everything(replica: Server, read: int) -> None:
    cancelled = metric(replica, "kvstore_replica_cancelled_total")
    stream = Stream(
        replica.url, "/v1/completions", {"prompt": words(200, f"leaves {read}"), "max_tokens": LONG, "ignore_eos": True}
    )
    stream.read(read)
    wait_until(lambda: not is_idle(replica))

    stream.close()

    wait_until(lambda: is_idle(replica))
    assert metric(replica, "kvstore_replica_cancelled_total") == cancelled + 1


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", b"{", None),
        ("/v1/completions", {"max_tokens": 3}, "prompt"),
        ("/v1/completions", {"prompt": "a", "n": 2}, "n"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": [1, 999999]}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "kvstore": {"tenant": 1}}, "kvstore.tenant"),
        ("/v1/chat/completions", {"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
        ("/v1/chat/completions", {"messages": CHAT, "tools": [{}]}, "tools"),
        ("/v1/lookup", {"prompt": 5}, "prompt"),
    ],
)
def test_a_wrong_request_gets_a_400_that_names_the_field(replica: Server, path: str, body: Any, param: Any) -> None:
    answer = call(replica.url, "POST", path, body)

    assert (answer.status, answer.error["param"], answer.error["type"]) == (400, param, "invalid_request_error")
    assert answer.replica == "the-replica"


@pytest.mark.parametrize("fields", [{"max_tokens": POSITIONS}, {"prompt": [1] * POSITIONS}])
def test_what_can_never_fit_is_told_so(replica: Server, fields: dict[str, Any]) -> None:
    answer = replica.post("/v1/completions", **{"prompt": "a", **fields})

    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "context_length_exceeded", "prompt")


def test_other_paths_methods_and_models_are_refused_in_the_same_form(replica: Server) -> None:
    assert replica.get("/v1/nothing").error["message"] == "not found"
    assert replica.get("/v1/completions").status == 405
    answer = replica.post("/v1/completions", prompt="a", model="gpt")
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")


def test_it_tells_about_itself(replica: Server) -> None:
    model = replica.get("/v1/models").body["data"][0]["id"]
    stats = replica.get("/v1/stats").body

    assert greedy(replica, prompt="a", model=model).body["model"] == model == stats["model"]
    assert replica.get("/healthz").status == replica.get("/readyz").status == 200
    assert stats["prefill_tokens_per_s"] > 0 < stats["store"]["prefill_rate"]
    told = replica.get("/metrics").raw.decode()
    assert "kvstore_replica_ttft_seconds_bucket" in told
    assert "kvstore_lookups_total" in told


def test_openais_own_client_works(replica: Server) -> None:
    with openai.OpenAI(base_url=f"{replica.url}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        whole = client.chat.completions.create(model=model, messages=CHAT, max_tokens=8, temperature=0)  # type: ignore[arg-type]
        stream = client.chat.completions.create(
            model=model,
            messages=CHAT,  # type: ignore[arg-type]
            max_completion_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"kvstore": {"session": "s"}},
        )
        chunks = list(stream)
        text = client.completions.create(model=model, prompt="once", max_tokens=3)
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model=model, prompt="once", n=2)

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert chunks[-1].model_extra["kvstore"]["replica"] == "the-replica"  # type: ignore[index]
    assert text.usage is not None
    assert text.usage.total_tokens == 7
    assert refused.value.param == "n"


def test_half_a_request_harms_nobody(replica: Server) -> None:
    host, port = replica.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")

    assert greedy(replica, prompt="a").status == 200
    assert is_idle(replica)
