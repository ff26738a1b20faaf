from __future__ import annotations

import json
from typing import Any

import pytest

from kvstore.cluster.openai import DONE, ApiError, Ask, ChatAsk, CompletionAsk, Reply, check_model, parse


def completion(**fields: Any) -> CompletionAsk:
    return parse(json.dumps({"prompt": "once", **fields}).encode(), CompletionAsk)


def chat(**fields: Any) -> ChatAsk:
    return parse(json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode(), ChatAsk)


def refusal(raw: bytes, kind: type[Ask] = CompletionAsk) -> ApiError:
    with pytest.raises(ApiError) as refused:
        parse(raw, kind)
    assert refused.value.status == 400
    return refused.value


def breakpoint_of(**control: Any) -> dict[str, Any]:
    return {"type": "text", "text": "a", "cache_control": {"type": "ephemeral", **control}}


def test_what_a_request_leaves_out_has_openais_defaults() -> None:
    ask = completion()

    assert (ask.temperature, ask.top_p, ask.stop, ask.stream, ask.new_tokens) == (1.0, 1.0, [], False, None)
    assert (ask.kvstore.cache, ask.kvstore.tenant, ask.kvstore.last_turn) == (True, "", False)


def test_null_means_left_out() -> None:
    ask = chat(temperature=None, stop=None, tools=None, kvstore={"tenant": None}, stream_options=None)

    assert (ask.temperature, ask.stop, ask.kvstore.tenant) == (1.0, [], "")


@pytest.mark.parametrize("prompt", ["once", [1, 2], ["once"], [[1, 2]]])
def test_a_prompt_is_text_or_token_ids_or_a_list_of_one_of_them(prompt: Any) -> None:
    assert completion(prompt=prompt).prompt in ("once", [1, 2])


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("", "it is empty"),
        ([], "it is empty"),
        (["a", "b"], "it holds 2 prompts; send one per request"),
        ([[1], [2]], "it holds 2 prompts"),
        ([1, "a"], "it must be text or a list of token ids"),
        ([1, True], "it must be text or a list of token ids"),
        (7, "it must be text or a list of token ids"),
    ],
)
def test_any_other_prompt_is_refused(prompt: Any, told: str) -> None:
    error = refusal(json.dumps({"prompt": prompt}).encode())

    assert error.param == "prompt"
    assert told in str(error)


def test_the_content_of_a_message_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]

    ask = chat(
        messages=[{"role": "developer", "content": parts}, {"role": "assistant", "content": "", "refusal": None}]
    )

    assert [message.plain for message in ask.messages] == [
        {"role": "system", "content": "one two"},
        {"role": "assistant", "content": ""},
    ]


def test_parts_may_have_breakpoints() -> None:
    control = {"type": "ephemeral", "ttl": "1h"}
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "cache_control": control}]

    (message,) = chat(messages=[{"role": "user", "content": [*parts, {"type": "text", "text": "!"}]}]).messages

    assert [(number, end, one.ttl) for number, end, one in message.breakpoints] == [(1, 7, "1h")]


def test_hints_come_under_either_name() -> None:
    ask = completion(kvstore={"hints": {"actions": []}}, kv_transfer_params={"kv_hint": "whatever"})

    assert ask.hints == [{"actions": []}, "whatever"]
    assert completion().hints == []


def test_what_is_said_about_a_request_is_taken() -> None:
    said = {"session": "s", "finish_reason": "tool_use", "priority": -3, "ttl_s": 60, "retain_until": 1.5e9}

    options = completion(kvstore=said).kvstore

    assert (options.finish_reason, options.priority, options.ttl_s, options.retain_until) == ("tool_use", -3, 60, 1.5e9)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [breakpoint_of(type="persistent")]}, "messages[0].content.cache_control.type"),
        ({"role": "user", "content": [breakpoint_of(ttl="2h")]}, "messages[0].content.cache_control.ttl"),
        ({"role": "user", "content": [breakpoint_of()] * 5}, "messages"),
        ({"role": "tool", "content": "4"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 4}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content.text"),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, "messages[0].tool_calls"),
        ("hi", "messages[0]"),
    ],
)
def test_a_message_that_cannot_be_had_is_named(message: Any, param: str) -> None:
    assert refusal(json.dumps({"messages": [message]}).encode(), ChatAsk).param == param


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("best_of", 3),
        ("logprobs", 5),
        ("logprobs", True),
        ("echo", True),
        ("suffix", "end"),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("logit_bias", {"50256": -100}),
        ("audio", {"voice": "x"}),
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_by_name(name: str, value: Any) -> None:
    error = refusal(json.dumps({"prompt": "once", name: value}).encode())

    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert error.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", ["n", "best_of"])
def test_several_answers_are_refused_with_what_to_use(name: str) -> None:
    error = refusal(json.dumps({"prompt": "once", name: 3}).encode())

    assert "send a request for each answer" in str(error)
    assert "--engine vllm" in str(error)


def test_the_same_fields_with_values_that_change_nothing_are_taken() -> None:
    completion(n=1, echo=False, suffix="", presence_penalty=0, frequency_penalty=0.0, logit_bias={}, user="me")
    chat(tools=[], tool_choice="none", response_format={"type": "text"}, metadata={"a": "b"}, store=False)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperatur": 0}, "temperatur", "unknown_parameter"),
        ({"kvstore": {"cash": True}}, "kvstore.cash", "unknown_parameter"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "0"}, "temperature", "invalid_value"),
        ({"temperature": float("nan")}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"stream": 1}, "stream", "invalid_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"seed": 1 << 64}, "seed", "invalid_value"),
        ({"kvstore": {"cache": "no"}}, "kvstore.cache", "invalid_value"),
        ({"kvstore": {"priority": 1 << 40}}, "kvstore.priority", "invalid_value"),
        ({"kvstore": {"ttl_s": 0}}, "kvstore.ttl_s", "invalid_value"),
        ({"kvstore": {"retain_until": float("inf")}}, "kvstore.retain_until", "invalid_value"),
        ({"kvstore": {"finish_reason": "f" * 65}}, "kvstore.finish_reason", "invalid_value"),
        (
            {"kv_transfer_params": {"do_remote_prefill": True}},
            "kv_transfer_params.do_remote_prefill",
            "unknown_parameter",
        ),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str, code: str) -> None:
    error = refusal(json.dumps({"prompt": "once", **fields}).encode())

    assert (error.param, error.code) == (param, code)


DEEP_HINT = b'{"prompt": "x", "kvstore": {"hints": ' + b'{"a":' * 700 + b"1" + b"}" * 702


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000, DEEP_HINT])
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    assert "not JSON" in str(refusal(raw))


def test_what_is_no_object_is_refused_and_a_missing_prompt_is_named() -> None:
    assert "JSON object" in str(refusal(b"[1]"))
    assert refusal(b"{}").code == "missing_required_parameter"
    assert refusal(b'{"messages": []}', ChatAsk).param == "messages"


def test_a_prompt_is_not_repeated_in_an_error() -> None:
    assert "secret" not in str(refusal(b'{"prompt": {"text": "secret"}}'))


def test_newer_clients_say_max_completion_tokens() -> None:
    assert chat(max_completion_tokens=5).new_tokens == 5
    assert chat(max_tokens=4).new_tokens == 4


def test_another_model_is_not_found() -> None:
    check_model(None, "here")
    check_model("here", "here")

    with pytest.raises(ApiError, match="'there' is not served here; this is 'here'") as refused:
        check_model("there", "here")

    assert (refused.value.status, refused.value.param) == (404, "model")


def events(*raw: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in b"".join(raw).split(b"\n\n") if line and line != DONE.strip()]


def test_a_streamed_chat_begins_with_the_role_and_ends_with_the_reason() -> None:
    reply = Reply(chat(stream=True), "m", 7)

    first, last = events(reply.chunk("a"), reply.chunk("", "stop"))

    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "a"}
    assert last["choices"][0]["delta"] == {"content": ""}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert first["id"] == last["id"]
    assert reply.end(2, 0, {}) == DONE


def test_usage_comes_in_a_chunk_of_its_own_where_it_was_asked_for() -> None:
    reply = Reply(completion(stream=True, stream_options={"include_usage": True}), "m", 7)

    piece, usage = events(reply.chunk("a"), reply.end(2, 4, {"replica": "r"}))

    assert piece["usage"] is None
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert usage["kvstore"] == {"replica": "r"}


def test_whole_answers_have_text_or_a_message() -> None:
    text = Reply(completion(), "m", 1).whole("a", "length", 1, 0, {})
    message = Reply(chat(), "m", 1).whole("a", "stop", 1, 0, {})

    assert (text["object"], text["choices"][0]["text"]) == ("text_completion", "a")
    assert (message["object"], message["choices"][0]["message"]["content"]) == ("chat.completion", "a")


def test_retry_after_is_a_header() -> None:
    assert ApiError(429, "later", retry_after_s=3).headers == {"Retry-After": "3"}
    assert ApiError(400, "no").headers == {}
