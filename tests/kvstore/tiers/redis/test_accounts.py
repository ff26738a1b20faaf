"""Every account that an ACL may make: it works, or the error names what is missing and the rule that is right."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from kvstore.direction import Direction
from kvstore.errors import TierRefused, TierUnavailable
from kvstore.testing.pages import TIMEOUT_S, fetch, keys_of, payload, store
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.redis import refusal as redis_refusal
from kvstore.tiers.redis.bound import BoundedRedis
from kvstore.tiers.redis.refusal import COMMANDS, OF_A_BOUND
from kvstore.tiers.redis.tier import RedisTier
from tests.helpers.redis_products import ON_EACH_PRODUCT, Product
from tests.helpers.redis_server import command

pytestmark = ON_EACH_PRODUCT

SLOT_BYTES = 8192  # with its header: two values, and so a transaction
KEYS = keys_of("page", 4)
CALLS: dict[str, Callable[[RedisTier | BoundedRedis], object]] = {
    "write": lambda tier: store(tier, KEYS, SLOT_BYTES),
    "contains": lambda tier: tier.contains(KEYS, timeout_s=TIMEOUT_S),
    "read": lambda tier: fetch(tier, KEYS, SLOT_BYTES),
    "touch": lambda tier: tier.touch(KEYS, expires_at=0.0, timeout_s=TIMEOUT_S),
    "refresh": lambda tier: tier.touch(KEYS, expires_at=9e9, timeout_s=TIMEOUT_S),
    "claim": lambda tier: tier.claim(KEYS, token=b"us", lease_s=9.0, timeout_s=TIMEOUT_S),
    "delete": lambda tier: tier.delete(KEYS, timeout_s=TIMEOUT_S),
    "sweep": lambda tier: tier.sweep(timeout_s=TIMEOUT_S),
    "ping": lambda tier: tier.ping(timeout_s=TIMEOUT_S),
}


@pytest.fixture(scope="module")
def one_server(product: Product) -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


@pytest.fixture
def server(one_server: LocalRedis) -> LocalRedis:
    command(one_server, "FLUSHALL")
    command(one_server, "ACL", "SETUSER", "app", "reset")
    return one_server


def tier_of(server: LocalRedis, *rules: str, userinfo: str = "app:secret", path: str = "0") -> RedisTier:
    command(server, "ACL", "SETUSER", "app", "on", ">secret", *rules)
    url = f"redis://{userinfo}@127.0.0.1:{server.port}/{path}"
    return RedisTier(url, prefix="kv:ns:", acl_pattern="kv:*", slot_bytes=SLOT_BYTES, ttl_s=600)


def refused(tier: RedisTier) -> set[str]:
    """The calls that are refused."""
    found = {name: refusal_of(call, tier) for name, call in CALLS.items()}
    texts = {name: str(refusal) for name, refusal in found.items() if refusal is not None}
    assert [text for text in texts.values() if "ACL SETUSER app ~kv:* " not in text] == []
    return set(texts)


def refusal_of(call: Callable[[RedisTier], object], tier: RedisTier) -> TierRefused | None:
    try:
        call(tier)
    except TierRefused as refusal:
        return refusal
    return None


def works(tier: RedisTier | BoundedRedis) -> None:
    for name, call in CALLS.items():
        assert call(tier) is not False, name
    assert store(tier, KEYS, SLOT_BYTES) == [True] * len(KEYS)
    assert fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS]
    for way in Direction:
        tier.probe(way, timeout_s=TIMEOUT_S)


def test_the_rule_in_the_message_is_enough(server: LocalRedis) -> None:
    with closing(tier_of(server)) as tier:
        with pytest.raises(TierRefused) as told:
            tier.contains(KEYS, timeout_s=TIMEOUT_S)
        rule = str(told.value).rpartition("ACL SETUSER ")[2]
        command(server, "ACL", "SETUSER", *rule.split())

        works(tier)
        works(BoundedRedis(tier, 100, ttl_s=600))


@pytest.mark.parametrize(
    ("denied", "affected"),
    [
        ("-@admin", set()),
        ("-@dangerous", set()),
        ("-info -config -client -cluster -command -hello -debug", set()),
        ("-ping", set()),
        ("-scan", {"sweep"}),
        ("-eval", {"claim"}),
        ("-@scripting", {"claim"}),
        ("-unlink", {"delete", "sweep"}),
        ("-touch", {"touch"}),
        ("-pexpire", {"refresh"}),
        ("-exists", {"contains"}),  # a write goes on without asking
        ("-mget", {"read"}),
        ("-set", {"write", "claim"}),
        ("-multi", {"write"}),
        ("-@read", {"contains", "read", "claim", "touch", "sweep"}),
        ("-@write", {"write", "refresh", "delete", "claim"}),
    ],
)
def test_what_an_account_may_not_do_is_refused_and_the_rest_is_done(
    server: LocalRedis, denied: str, affected: set[str]
) -> None:
    with closing(tier_of(server, "~*", "+@all", *denied.split())) as tier:
        assert refused(tier) == affected


@pytest.mark.parametrize(
    ("keys", "affected"),
    [
        ("~kv:*", set()),
        ("%RW~kv:*", set()),
        ("%R~kv:* %W~kv:*", set()),
        ("%R~kv:*", {"write", "refresh", "claim", "delete"}),
        ("%W~kv:*", {"read", "claim"}),
        ("~other:*", {"write", "contains", "read", "touch", "refresh", "claim", "delete"}),
        ("", {"write", "contains", "read", "touch", "refresh", "claim", "delete"}),
    ],
)
def test_keys_that_an_account_may_use(server: LocalRedis, keys: str, affected: set[str]) -> None:
    with closing(tier_of(server, "+@all", *keys.split())) as tier:
        assert refused(tier) - {"sweep"} == affected


@pytest.mark.parametrize(
    ("denied", "name", "verb"),
    [
        ("-exists", "EXISTS", "contains"),
        ("-mget", "MGET", "read"),
        ("-set", "SET", "write"),
        ("-multi", "MULTI", "write"),
        ("-unlink", "UNLINK", "delete"),
        ("-eval", "EVAL", "claim"),
        ("-scan", "SCAN", "sweep"),
    ],
)
def test_the_message_names_the_command(server: LocalRedis, denied: str, name: str, verb: str) -> None:
    with closing(tier_of(server, "~*", "+@all", denied)) as tier:
        with pytest.raises(TierRefused, match=rf"the account 'app' may not run {name} .*\+{name.lower()}\b") as told:
            CALLS[verb](tier)
        assert told.value.reason == "NOPERM"


def test_the_message_names_the_keys(server: LocalRedis) -> None:
    with (
        closing(tier_of(server, "~other:*", "+@all")) as tier,
        pytest.raises(TierRefused, match=re.escape("may not use the keys kv:*")),
    ):
        store(tier, KEYS, SLOT_BYTES)


def test_an_account_that_may_not_select_says_so(server: LocalRedis) -> None:
    with (
        closing(tier_of(server, "~*", "+@all", "-select", path="3")) as tier,
        pytest.raises(TierUnavailable, match=r"may not run SELECT .*\+select"),
    ):
        tier.ping(timeout_s=TIMEOUT_S)


def test_a_database_that_is_not_there_is_told(server: LocalRedis) -> None:
    with (
        closing(tier_of(server, "~*", "+@all", path="999")) as tier,
        pytest.raises(TierUnavailable, match="DB index is out of range"),
    ):
        tier.ping(timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("userinfo", ["app:", "app:anything"])
def test_an_account_without_password(server: LocalRedis, userinfo: str) -> None:
    with closing(tier_of(server, "~*", "+@all", "nopass", userinfo=userinfo)) as tier:
        works(tier)


@pytest.mark.parametrize("user", ["kv:user", "a@b/c?d#e", "ünïcode", "%41", "a+b&c=d"])
def test_names_and_passwords_of_any_characters(server: LocalRedis, user: str) -> None:
    secret = "p@ss:w/o#r?d%41 +&=é[]"
    command(server, "ACL", "SETUSER", user, "on", f">{secret}", "~*", "+@all")
    userinfo = f"{quote(user, safe='')}:{quote(secret, safe='')}"
    for url in (
        f"redis://{userinfo}@127.0.0.1:{server.port}/0",
        f"redis://{userinfo}@127.0.0.1:{server.port}?db=0",
        server.unix_url.replace("unix://", f"unix://{userinfo}@"),
    ):
        with closing(RedisTier(url, slot_bytes=SLOT_BYTES, ttl_s=600)) as tier:
            assert store(tier, KEYS, SLOT_BYTES) == [True] * len(KEYS)


@pytest.mark.parametrize(
    ("userinfo", "told"),
    [("", "it asks for a password"), (":x@", "it refuses the user or password"), ("nobody:x@", "it refuses the user")],
)
def test_a_server_whose_default_user_is_off(userinfo: str, told: str) -> None:
    with LocalRedis() as server:
        command(server, "ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all")
        command(server, "ACL", "SETUSER", "default", "off")
        with (
            closing(RedisTier(f"redis://{userinfo}127.0.0.1:{server.port}", slot_bytes=64, ttl_s=60)) as tier,
            pytest.raises(TierUnavailable, match=told),
        ):
            tier.contains(KEYS, timeout_s=TIMEOUT_S)
        with closing(RedisTier(f"redis://app:secret@127.0.0.1:{server.port}", slot_bytes=64, ttl_s=60)) as tier:
            tier.ping(timeout_s=TIMEOUT_S)


@contextmanager
def renaming(name: str) -> Iterator[RedisTier]:
    with (
        LocalRedis(arguments=("--rename-command", name, "")) as server,
        closing(RedisTier(server.url, slot_bytes=SLOT_BYTES, ttl_s=60)) as tier,
    ):
        yield tier


def test_the_rule_has_every_command_that_the_sources_send() -> None:
    sources = [path.read_text() for path in Path(redis_refusal.__file__).parent.glob("*.py")]
    found = {verb.lower() for text in sources for verb in re.findall(r'b"([A-Z]{3,})"', text)}
    scripts = {verb.lower() for text in sources for verb in re.findall(r"redis\.call\('([A-Z]+)'", text)}

    handshake = {"sentinel", "get-master-addr-by-name", "cluster", "slots", "shards"}
    options = {"match", "count", "limit"}
    looked_at = {"info", "config"}  # what the server is; it is said to be unknown otherwise
    assert found | scripts <= {*COMMANDS, *OF_A_BOUND} | handshake | options | looked_at


class TestCommandsThatWereRenamed:
    @pytest.mark.parametrize(
        ("renamed", "verb"),
        [("UNLINK", "delete"), ("SCAN", "sweep"), ("EVAL", "claim"), ("MULTI", "write"), ("MGET", "read")],
    )
    def test_the_message_names_the_command_and_the_rest_is_done(self, renamed: str, verb: str) -> None:
        with renaming(renamed) as tier:
            with pytest.raises(TierRefused, match=f"does not know {renamed} .*rename-command") as told:
                CALLS[verb](tier)
            assert told.value.reason == "UNKNOWN_COMMAND"
            assert tier.contains(KEYS, timeout_s=TIMEOUT_S)

    @pytest.mark.parametrize("renamed", ["CONFIG", "FLUSHALL", "KEYS", "DEBUG", "EXISTS", "PING"])
    def test_without_these_pages_are_stored_all_the_same(self, renamed: str) -> None:

        with renaming(renamed) as tier:
            tier.ping(timeout_s=TIMEOUT_S)
            assert store(tier, KEYS, SLOT_BYTES) == [True] * len(KEYS)
            assert fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS]
