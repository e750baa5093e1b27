"""Checks which API key a request carries, and whether that key may ask now.

A key is found by a keyed hash of it, under a secret of this process: how long that takes says nothing about any key,
and does not grow with their number.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Collection, Iterable, Sequence

from toka_engine.server.errors import ApiError
from toka_engine.server.exchange import Exchange
from toka_engine.server.keys.file import ApiKey
from toka_engine.server.keys.use import KeyUse


class KeyCheck:
    """The keys that are in force. Where there is none, every request is accepted."""

    def __init__(self, keys: Sequence[ApiKey] = (), limited_paths: Collection[str] = ()) -> None:
        """`limited_paths`: the POSTs to which the keys' limits apply."""
        self.uses: dict[str, KeyUse] = {}
        """The keys by name."""
        self.is_asking = bool(keys)
        """Whether requests need a key. That is decided at the start: no reload opens the server to everybody."""
        self._limited_paths = frozenset(limited_paths)
        self._secret = secrets.token_bytes(32)
        self._by_hash: dict[bytes, KeyUse] = {}
        self.replace(keys)

    def replace(self, keys: Sequence[ApiKey]) -> None:
        """Put other keys in force. A name that stays keeps what it has used and what it runs."""
        uses: dict[str, KeyUse] = {}
        for entry in keys:
            use = self.uses.get(entry.name)
            if use is None:
                use = KeyUse(entry)
            else:
                use.change(entry)
            uses[entry.name] = use
        self.uses = uses
        self._by_hash = {self._hash(use.entry.key.encode()): use for use in uses.values()}

    def check(self, exchange: Exchange) -> None:
        """Note whose request it is. Raises a 401 unless it carries a key as `Authorization: Bearer <the key>`, or as
        `x-api-key`, which Anthropic's clients send; and a 429 where a limit of the key is reached.
        """
        if not self.is_asking or exchange.key is not None:
            return
        given = given_key(exchange.headers)
        if given is None:
            raise _denied("No API key was given: send it as `Authorization: Bearer <key>`.")
        use = self._by_hash.get(self._hash(given))
        if use is None or not hmac.compare_digest(given, use.entry.key.encode()):
            raise _denied("The API key is wrong.")
        exchange.key = use
        use.num_requests += 1
        if exchange.method == "POST" and exchange.path in self._limited_paths:
            use.enter()
            exchange.holds_place = True

    def _hash(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._secret, digest_size=32).digest()


def given_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the key that `headers` carry, empty where the scheme is another; None where they carry none."""
    given = {name: value for name, value in headers if name in (b"authorization", b"x-api-key")}
    if not given:
        return None
    scheme, _, key = given.get(b"authorization", b"Bearer " + given.get(b"x-api-key", b"")).partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def owner_of(exchange: Exchange) -> str:
    """Return whose files, batches and responses a request sees: those of its key's owner, by name."""
    if exchange.owner is not None:
        return exchange.owner
    return exchange.key.owner if exchange.key is not None else owner_by_digest(exchange.headers)


def owner_by_digest(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the owner where no key is asked for: a digest of the key that a request carries nonetheless, "" for
    none.
    """
    key = given_key(headers)
    return hashlib.sha256(key).hexdigest()[:16] if key else ""


def _denied(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers=((b"www-authenticate", b"Bearer"),))
