"""Requests of one namespace: prompts turned into chained block hashes, with all that can be wrong about them checked.

The same for a store in this process and for the client of a daemon, so that both name a page alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import count
from math import isfinite
from numbers import Integral, Real
from typing import TypeGuard

from kvstore.base import Tokens
from kvstore.codecs.loss import Loss, marked
from kvstore.errors import RequestError
from kvstore.plan.records import Request, RequestOptions
from radix.hashing import BlockHash, BlockHasher, bind_hashes
from radix.namespace import Namespace

MAX_SESSION_BYTES = 1024  # a block keeps the name of its session
MAX_REASON_BYTES = 64
MAX_STEP_BLOCKS = 1 << 31
MAX_TTL_S = 100 * 365 * 86400.0  # deadlines are written down as numbers of bounded size
MAX_TENANT_KEPT = 1024  # characters; the root of a longer name is made anew each time
PAYER_DIGITS = 12
MAX_ROOTS = 4096  # tenants come from outside: what is remembered of them is bounded


class RequestMaker:
    """Makes and extends the requests of a namespace: what stores do alike, wherever their pages are. Any thread."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._block_size = namespace.block_size
        self._ids = count(1)
        self.loss = Loss.EXACT  # of the pages that a request takes unless it refuses
        self._roots: dict[str, BlockHash] = {}

    def request(self, tokens: Tokens, options: RequestOptions | None = None) -> Request:
        """Hash the full blocks of `tokens` into a new request. Raises RequestError for what is no prompt."""
        options = options or RequestOptions()
        check_options(options)
        hash_name = self._namespace.hash
        hasher = BlockHasher(self.root(options.tenant), self._block_size, hash_name, keep_tokens=hash_name != "sha256")
        _extend(hasher, tokens)
        if hasher.num_tokens == 0:
            raise RequestError("tokens is empty; a prompt has at least one token")
        loss = Loss.EXACT if options.exact else self.loss
        return Request(
            next(self._ids),
            marked(hasher.keys, loss) if loss else hasher.keys,
            hasher.num_tokens,
            options,
            hasher.token_bytes,
            hasher,
            payer=payer_of(options.tenant),
            loss=loss,
        )

    def request_from_hashes(
        self, hashes: Sequence[bytes], num_tokens: int, options: RequestOptions | None = None
    ) -> Request:
        """A request whose blocks an engine has hashed already."""
        options = options or RequestOptions()
        check_options(options)
        loss = Loss.EXACT if options.exact else self.loss
        request = Request(next(self._ids), [], 0, options, payer=payer_of(options.tenant), loss=loss)
        self.extend_hashes(request, hashes, num_tokens)
        return request

    def extend(self, request: Request, tokens: Tokens) -> None:
        """Append tokens and hash the blocks they fill."""
        if request.hasher is None:
            raise RequestError("request was made from an engine's hashes; extend it with extend_hashes")
        _extend(request.hasher, tokens)
        if request.loss:
            request.keys += marked(request.hasher.keys[len(request.keys) :], Loss(request.loss))
        request.num_tokens = request.hasher.num_tokens

    def extend_hashes(self, request: Request, hashes: Sequence[bytes], num_tokens: int) -> None:
        """Append hashes an engine made for further blocks."""
        if request.hasher is not None:
            raise RequestError("request was made from tokens; extend it with extend")
        if self._namespace.hash != "sha256":
            raise RequestError(f"store.hash is {self._namespace.hash!r}; engine hashes need 'sha256'")
        if not isinstance(num_tokens, Integral):
            raise RequestError(f"num_tokens is {num_tokens!r}; it must be an int")
        if not isinstance(hashes, Sequence):
            raise RequestError(f"hashes is {hashes!r:.40}; it must be a sequence of bytes")
        if b"" in hashes:
            raise RequestError(f"hashes[{hashes.index(b'')}] is empty; it would be one name for different blocks")
        blocks = len(request.keys) + len(hashes)
        if num_tokens < max(1, blocks * self._block_size) or num_tokens < request.num_tokens:
            raise RequestError(
                f"num_tokens is {num_tokens}; {blocks} blocks of {self._block_size} tokens need at least "
                f"{max(1, blocks * self._block_size, request.num_tokens)}"
            )
        try:
            keys = bind_hashes(self.root(request.options.tenant), hashes)
            request.keys += marked(keys, Loss(request.loss))
        except (TypeError, ValueError) as error:
            raise RequestError(str(error)) from None
        request.num_tokens = num_tokens

    def root(self, tenant: str) -> BlockHash:
        """The hash before the first block of a tenant's prompts."""
        root = self._roots.get(tenant)
        if root is None:
            if len(self._roots) >= MAX_ROOTS:
                self._roots.clear()
            own = self._namespace.salt
            salt = f"{len(own)}:{own}{tenant}" if own else tenant  # framed: "a" + "bc" is not "ab" + "c"
            root = self._namespace.with_salt(salt).root()
            if len(tenant) <= MAX_TENANT_KEPT:
                self._roots[tenant] = root
        return root


def payer_of(tenant: str) -> str:
    """The name of a tenant in books that operators see: a digest, as the name may be a secret (a cache salt)."""
    return _digest(tenant) if tenant else ""


@lru_cache(MAX_ROOTS)
def _digest(tenant: str) -> str:
    return sha256(tenant.encode()).hexdigest()[:PAYER_DIGITS]


def check_options(options: RequestOptions) -> None:
    """Raise RequestError for options no request can have."""
    if not isinstance(options, RequestOptions):
        raise RequestError(f"options is a {type(options).__name__}; it must be RequestOptions")
    if _num_bytes(options.tenant) is None:
        raise RequestError(f"options.tenant is {_show(options.tenant)}; it must be text")
    num_bytes = _num_bytes(options.session)
    if num_bytes is None or num_bytes > MAX_SESSION_BYTES:
        told = _show(options.session)
        raise RequestError(f"options.session is {told}; it must be text of at most {MAX_SESSION_BYTES} bytes")
    if not (_is_int(options.priority) and -(1 << 31) <= options.priority < 1 << 31):
        raise RequestError(f"options.priority is {_show(options.priority)}; it must be an int of 32 bits")
    if options.ttl_s is not None:
        check_ttl("options.ttl_s", options.ttl_s)
    if not (_is_int(options.step_blocks) and 1 <= options.step_blocks <= MAX_STEP_BLOCKS):
        told = _show(options.step_blocks)
        raise RequestError(f"options.step_blocks is {told}; it must be an int in [1, {MAX_STEP_BLOCKS}]")
    if not (_is_finite(options.retain_until) and options.retain_until >= 0):
        told = _show(options.retain_until)
        raise RequestError(f"options.retain_until is {told}; it must be a Unix time, or 0 for no promise")
    for name in ("pin", "single_flight", "whole", "last_turn", "exact"):
        if not isinstance(getattr(options, name), bool):
            raise RequestError(f"options.{name} is {_show(getattr(options, name))}; it must be a bool")


def check_ttl(name: str, ttl_s: object) -> None:
    """Raise RequestError unless it is a time to live that every medium can write down."""
    if not (_is_real(ttl_s) and 0 < ttl_s <= MAX_TTL_S):
        raise RequestError(f"{name} is {_show(ttl_s)}; it must be positive, at most {MAX_TTL_S:.0f} seconds")


def check_reason(reason: object) -> str:
    """Return why a reply ended, in a caller's word. Raises RequestError for what is no word."""
    num_bytes = _num_bytes(reason)
    if not isinstance(reason, str) or num_bytes is None or num_bytes > MAX_REASON_BYTES:
        raise RequestError(f"finish_reason is {_show(reason)}; it must be text of at most {MAX_REASON_BYTES} bytes")
    return reason


def check_range(name: str, value: int, most: int, least: int = 0) -> None:
    """Raise RequestError unless `value` is a number of blocks that the request has."""
    if not isinstance(value, Integral):
        raise RequestError(f"{name} is {value!r}; it must be an int")
    if not least <= value <= most:
        raise RequestError(f"{name} is {value}; the request has blocks {least} to {most}")


def check_blocks(request: Request, first: int, num_blocks: int) -> None:
    """Raise RequestError unless the request has the blocks [first, first + num_blocks)."""
    check_range("first", first, len(request.keys))
    check_range("num_blocks", num_blocks, len(request.keys))
    check_range("first + num_blocks", first + num_blocks, len(request.keys))


def _num_bytes(value: object) -> int | None:
    """The length of a text; None for what is none."""
    try:
        return len(value.encode()) if isinstance(value, str) else None
    except UnicodeEncodeError:  # half of a surrogate pair: it has no bytes to hash
        return None


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_finite(value: object) -> TypeGuard[float]:
    """A whole number of any length is a number; one of 400 digits is no float, and stops what computes with it."""
    try:
        return _is_real(value) and isfinite(value)
    except OverflowError:
        return False


def _show(value: object) -> str:
    """A value as an error may tell it: not at the length at which it came."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return "a number of very many digits"
    return text if len(text) <= 80 else text[:77] + "..."


def _extend(hasher: BlockHasher, tokens: Tokens) -> None:
    try:
        hasher.extend(tokens)
    except (TypeError, ValueError) as error:
        raise RequestError(str(error)) from None
