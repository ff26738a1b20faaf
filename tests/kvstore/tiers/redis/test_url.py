from __future__ import annotations

import pytest

from kvstore.errors import ConfigError
from kvstore.tiers.redis.url import RedisTarget, ServerKind, mask_url, parse_redis_url


def test_a_plain_url_names_host_port_database_and_credentials() -> None:
    target = parse_redis_url("redis://me:p%40ss@cache:6380/3")

    assert (target.kind, target.nodes, target.db) == (ServerKind.SINGLE, (("cache", 6380),), 3)
    assert (target.username, target.password, target.tls) == ("me", "p@ss", None)


@pytest.mark.parametrize(
    ("url", "nodes"),
    [
        ("redis://cache", (("cache", 6379),)),
        ("redis://[::1]:7000", (("::1", 7000),)),
        ("redis://[fe80::1]", (("fe80::1", 6379),)),
        ("redis+cluster://a,b:7001", (("a", 6379), ("b", 7001))),
        ("redis+sentinel://a,b:7001/main", (("a", 26379), ("b", 7001))),
    ],
)
def test_ports_have_defaults_and_ipv6_stands_in_brackets(url: str, nodes: object) -> None:
    assert parse_redis_url(url).nodes == nodes


def test_a_unix_url_names_a_path() -> None:
    target = parse_redis_url("unix://:secret@/run/my%20redis.sock?db=2")

    assert (target.kind, target.path, target.db) == (ServerKind.SINGLE, "/run/my redis.sock", 2)
    assert (target.username, target.password) == (None, "secret")


def test_tls_options_belong_to_rediss() -> None:
    target = parse_redis_url("rediss://h?ssl_ca_certs=/ca.pem&ssl_cert_reqs=optional&ssl_check_hostname=false")

    assert target.tls == {"ssl_ca_certs": "/ca.pem", "ssl_cert_reqs": "optional", "ssl_check_hostname": False}
    assert parse_redis_url("rediss+cluster://h").tls == {}


def test_sentinel_has_a_service_a_database_and_credentials_of_its_own() -> None:
    target = parse_redis_url("redis+sentinel://:a@h/main/2?sentinel_username=u&sentinel_password=b")

    assert (target.kind, target.service, target.db) == (ServerKind.SENTINEL, "main", 2)
    assert (target.password, target.sentinel_username, target.sentinel_password) == ("a", "u", "b")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("localhost:6379", "no scheme"),
        ("", "no scheme"),
        ("redsi://h", "did you mean redis://"),
        ("http://h", "unknown scheme 'http'; use one of redis://"),
        ("redis://", "names no host"),
        ("redis:///0", "names no host"),
        ("redis://h:port", "the port 'port'"),
        ("redis://h:0", "from 1 to 65535"),
        ("redis://h:70000", "from 1 to 65535"),
        ("redis://h:6379:1", "the port '6379:1'"),
        ("redis://::1", "IPv6 address in brackets"),
        ("redis://[::1", "cannot be read"),
        ("redis://h/zero", "the database 'zero'"),
        ("redis://h/-1", "the database '-1'"),
        ("redis://h/0/1", "more than a database"),
        ("redis://h/0?db=1", "more than a database"),
        ("redis://h?databse=1", "unknown option 'databse'"),
        ("redis://h?socket_timeout=3", "known here: db"),
        ("redis://h?ssl_ca_certs=/x", "write rediss"),
        ("rediss://h?ssl_ca_cert=/x", "did you mean ssl_ca_certs"),
        ("rediss://h?ssl_cert_reqs=maybe", "none, optional or required"),
        ("rediss://h?ssl_check_hostname=1", "true or false"),
        ("redis://***@h", "no password"),
        ("redis://a,b", "names 2 hosts; use redis+cluster://"),
        ("redis+sentinel://h", "does not name the service"),
        ("redis+cluster://h/1", "only database 0"),
        ("unix://tmp/redis.sock", "three slashes"),
        ("unix:///", "three slashes"),
        ("redis://h /0", "white space"),
        ("redis://h/0#x", "%23"),
    ],
)
def test_a_mistake_names_the_field_the_value_and_what_would_be_right(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=r"^redis\.url is ") as caught:
        parse_redis_url(url)

    assert problem in str(caught.value)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redsi://me:hunter2@h",
        "redis://me:hunter2@h:port",
        "redis://me:hun/ter2@h",
        "redis://me:hun@ter2@h:x",
        "redis:/me:hunter2@h",
        "me:hunter2@h",
        "redis://me:hunter2#@h",
        "redis+sentinel://h?sentinel_password=hunter2",
        "redis://:hunter2@[::1",
        "redis://hunter2@h",
    ],
)
def test_no_password_is_ever_shown(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_redis_url(url)

    assert "ter2" not in str(caught.value)
    assert "***" in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_target_shows_no_password() -> None:
    shown = repr(parse_redis_url("redis+sentinel://me:hunter2@h/main?sentinel_password=hunter2"))

    assert "hunter2" not in shown
    assert "me:***@h" in shown


def test_a_url_without_password_is_shown_as_it_is() -> None:
    assert mask_url("redis://h:1/0") == "redis://h:1/0"
    assert parse_redis_url("redis://h:1/0") == RedisTarget(ServerKind.SINGLE, "redis://h:1/0", nodes=(("h", 1),))


def test_anything_but_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"redis\.url is 5; it must be text"):
        parse_redis_url(5)  # type: ignore[arg-type]
