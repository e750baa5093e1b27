"""The other replicas of a deployment: who has the files and batches of an ordinal, and how they are asked.

Owns: finding peers by name, the headers between them, and what happens when one does not answer. The ids of a replica's
files and batches carry its ordinal (`records`), so that any replica knows whom to ask. Only paths that the routes of
files and batches have made of such an id are asked for, and only of addresses that the name in TOKA_PEERS has: nothing
that a client writes chooses an address.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING

from toka_engine.errors import ConfigError
from toka_engine.server.batches.records import ordinal_of
from toka_engine.server.errors import ApiError, unavailable
from toka_engine.server.exchange import Exchange

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger("toka.server.peers")

ORDINAL_VARIABLE, PEERS_VARIABLE = "TOKA_ORDINAL", "TOKA_PEERS"
ORDINAL, STATE, CURSOR = b"x-toka-ordinal", b"x-toka-data", b"x-toka-cursor"
"""The headers between peers: the ordinal that is asked for (and, in a refusal, the one that was reached), whether that
one has its folder, and where a page of a list begins."""
_NOBODY = "-"
"""An ordinal that no replica has: whoever is asked for it says who it is."""
_OPEN = "open"
_PASSED_ON = (b"authorization", b"x-api-key", b"content-type", b"accept")
_PASSED_BACK = ("content-type", "content-length", "content-disposition", "x-content-type-options", "retry-after")
_CONNECT_S, _READ_S, _FIND_S = 5.0, 30.0, 10.0
"""A peer that is gone takes no connection; one that has taken it may be busy."""
_MAX_ANSWER_BYTES = 64 << 20
"""More than a page of a list has: 10,000 files, with the longest names."""
FIND_AGAIN_S = 1.0
"""Peers are looked for no more often, however many requests ask for one that is gone."""
_NAME = re.compile(r"[A-Za-z0-9]([-.A-Za-z0-9]*[A-Za-z0-9])?(:[0-9]{1,5})?")

Address = tuple[str, int]


class Peers:
    """The replicas that the names resolve to, this one among them."""

    def __init__(self, ordinal: int, names: list[Address]) -> None:
        self.ordinal = ordinal
        self._names = names
        self._owners: dict[int, Address] = {}
        self._known: set[int] | None = None
        """The ordinals that there were when every address last answered; None before that."""
        self._is_whole = False
        """Whether each ordinal that there is has its folder open somewhere."""
        self._found_at = -FIND_AGAIN_S
        self._finding = asyncio.Lock()
        self._client: httpx.AsyncClient | None = None

    @classmethod
    def read(cls, environ: Mapping[str, str], port: int) -> Peers | None:
        """Return the peers that the environment names; None if it names none. Raises ConfigError.

        TOKA_PEERS is one name, or several with commas between them; a name without a port has the engine's own.
        """
        ordinal, names = environ.get(ORDINAL_VARIABLE, ""), environ.get(PEERS_VARIABLE, "")
        if not names:
            return None
        if not (ordinal.isascii() and ordinal.isdigit() and len(ordinal) <= 4):
            raise ConfigError(f"{ORDINAL_VARIABLE}={ordinal!r}: {PEERS_VARIABLE} needs an ordinal from 0 to 9999")
        addresses = []
        for name in names.split(","):
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{PEERS_VARIABLE}={names!r}: must be host names, each with or without a port")
            host, _, own_port = name.partition(":")
            addresses.append((host, int(own_port or port)))
        return cls(int(ordinal), addresses)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    # ------------------------------------------------------------ being asked

    def check_addressed(self, exchange: Exchange, *, is_open: bool) -> bool:
        """Tell whether a peer asks. Raises a 421 that says who this is if it asks for somebody else, or for a folder
        that this replica does not have (yet, or any more).
        """
        wanted = exchange.header(ORDINAL)
        if wanted is None:
            return False
        if wanted == b"%d" % self.ordinal and is_open:
            return True
        state = _OPEN if is_open else "waiting"
        headers = ((ORDINAL, b"%d" % self.ordinal), (STATE, state.encode()))
        message = f"This replica has ordinal {self.ordinal}, and its folder is {state}."
        raise ApiError(421, message, code="misdirected", headers=headers)

    # ------------------------------------------------------------ asking

    async def ask(self, exchange: Exchange, path: str, stored_id: str, body: bytes | None = None) -> httpx.Response:
        """Return the answer, unread, of the replica that has `stored_id`. Raises a 503 where none does."""
        ordinal = ordinal_of(stored_id)
        if ordinal is None:
            raise AssertionError("an id without an ordinal is nobody else's")
        method = "GET" if exchange.method == "HEAD" else exchange.method
        for _ in range(2):
            address = self._owners.get(ordinal) or (await self._find(exchange)).get(ordinal)
            if address is None:
                break
            answer = await self._send(exchange, address, method, path, {ORDINAL: b"%d" % ordinal}, body)
            if answer is not None and answer.status_code != 421:
                return answer
            if answer is not None:
                await answer.aclose()
            self._owners.pop(ordinal, None)
        raise no_owner(ordinal, stored_id)

    async def ask_all(self, exchange: Exchange, path: str, cursor: bytes, *, is_open: bool) -> dict[int, bytes]:
        """Return the other replicas' answers to the GET of a list, by ordinal. Raises a 503 if one does not answer,
        because a list without its part would be wrong. `is_open`: this replica's own part is known.
        """
        owners = dict(await self._find(exchange))
        if is_open:
            owners.pop(self.ordinal, None)
        if not self._is_whole:
            raise unavailable("A replica of this deployment does not answer, so the list is not whole. Try again.")
        answers = await asyncio.gather(*(self._ask_list(exchange, path, cursor, *owner) for owner in owners.items()))
        return dict(zip(owners, answers, strict=True))

    async def _ask_list(self, exchange: Exchange, path: str, cursor: bytes, ordinal: int, address: Address) -> bytes:
        headers = {ORDINAL: b"%d" % ordinal, CURSOR: cursor}
        answer = await self._send(exchange, address, "GET", path, headers)
        if answer is None or answer.status_code != 200:
            self._owners.pop(ordinal, None)
            if answer is not None:
                await answer.aclose()
            raise unavailable(f"The replica with ordinal {ordinal} does not answer, so the list is not whole.")
        return await read_whole(answer)

    async def _send(
        self,
        exchange: Exchange,
        address: Address,
        method: str,
        path: str,
        headers: dict[bytes, bytes],
        body: bytes | None = None,
    ) -> httpx.Response | None:
        """Return a peer's answer; None if it cannot be reached. Raises a 503 if it may have done what it was asked."""
        import httpx

        passed = [(name, value) for name, value in exchange.headers if name in _PASSED_ON]
        wanted = [*passed, (b"x-request-id", exchange.request_id), *headers.items()]
        client = self._open_client()
        try:
            return await client.send(
                client.build_request(method, _url(address, path), headers=wanted, content=body), stream=True
            )
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            return None
        except httpx.TransportError as error:
            if method == "GET":
                return None
            message = "The replica that was asked has not answered; what was asked of it may have happened."
            raise unavailable(message) from error

    def _open_client(self) -> httpx.AsyncClient:
        if self._client is None:
            import httpx  # some megabytes that a server without peers does not need

            timeout = httpx.Timeout(_READ_S, connect=_CONNECT_S)
            self._client = httpx.AsyncClient(timeout=timeout, trust_env=False, follow_redirects=False)
        return self._client

    # ------------------------------------------------------------ finding

    async def _find(self, exchange: Exchange) -> dict[int, Address]:
        """Ask every address who it is, with the client's key. Of several replicas of an ordinal, the one that has the
        folder counts.
        """
        async with self._finding:
            if time.monotonic() >= self._found_at + FIND_AGAIN_S:
                addresses = await self._resolve()
                answers = await asyncio.gather(*(self._ask_who(exchange, address) for address in addresses))
                pairs = zip(addresses, answers, strict=True)
                self._owners = {answer[0]: address for address, answer in pairs if answer and answer[1] == _OPEN}
                self._note_ordinals({answer[0] for answer in answers if answer}, is_complete=None not in answers)
                self._found_at = time.monotonic()
            return self._owners

    def _note_ordinals(self, answering: set[int], *, is_complete: bool) -> None:
        """Judge whether lists are whole. An address that does not answer may be a pod that never starts, and makes no
        list less whole by itself.
        """
        if is_complete:
            self._known = answering
        self._is_whole = self._known is not None and self._known | answering <= self._owners.keys()

    async def _resolve(self) -> list[Address]:
        loop = asyncio.get_running_loop()
        found: dict[Address, None] = {}
        for host, port in self._names:
            try:
                async with asyncio.timeout(_FIND_S):
                    infos = await loop.getaddrinfo(host, port, type=1)  # SOCK_STREAM
            except (OSError, TimeoutError) as error:
                logger.warning("event=peers_not_resolved name=%s reason=%r", host, str(error))
                raise unavailable(f"The replicas of this deployment cannot be found: {host} has no address.") from error
            found |= {(str(info[4][0]), port): None for info in infos}
        return list(found)

    async def _ask_who(self, exchange: Exchange, address: Address) -> tuple[int, str] | None:
        """Return a replica's ordinal, and whether it has its folder; None if it does not say."""
        import httpx

        try:
            async with asyncio.timeout(_FIND_S):
                headers = [*_keys_of(exchange), (ORDINAL, _NOBODY.encode())]
                answer = await self._open_client().get(_url(address, "/v1/files/owner"), headers=headers)
        except (httpx.TransportError, TimeoutError):
            return None
        ordinal, state = answer.headers.get(ORDINAL.decode(), ""), answer.headers.get(STATE.decode(), "")
        return (int(ordinal), state) if answer.status_code == 421 and ordinal.isdigit() else None


def no_owner(ordinal: int, stored_id: str) -> ApiError:
    """Return the 503 of a file or batch whose replica is not there."""
    message = f"'{stored_id[:100]}' is kept by the replica with ordinal {ordinal}, which does not answer. Try again."
    return ApiError(503, message, code="replica_unavailable", headers=((b"retry-after", b"2"),))


def headers_of(answer: httpx.Response) -> dict[str, str]:
    """Return the headers of a peer's answer that the client gets."""
    return {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}


async def read_answer(answer: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Yield the body of a peer's answer. Raises a 503, which cuts the client's answer, where the peer's is cut."""
    import httpx

    try:
        async for part in answer.aiter_raw():
            yield part
    except httpx.TransportError as error:
        raise unavailable("The replica that was asked has stopped answering.") from error
    finally:
        await answer.aclose()


async def read_whole(answer: httpx.Response) -> bytes:
    """Return the body of a peer's answer. Raises a 503 where it is cut, and where it is longer than any of ours."""
    body = bytearray()
    async with aclosing(read_answer(answer)) as parts:
        async for part in parts:
            body += part
            if len(body) > _MAX_ANSWER_BYTES:
                raise unavailable("The replica that was asked has answered with too many bytes.")
    return bytes(body)


def _keys_of(exchange: Exchange) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in exchange.headers if name in (b"authorization", b"x-api-key")]


def _url(address: Address, path: str) -> str:
    host, port = address
    return f"http://[{host}]:{port}{path}" if ":" in host else f"http://{host}:{port}{path}"
