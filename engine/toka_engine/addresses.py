"""Reads the addresses of other servers. Pure."""

from __future__ import annotations

from urllib.parse import urlsplit

from toka_engine.errors import ConfigError


def parse_udp_address(text: str, key: str) -> tuple[str, int]:
    """Return host and port of `host:port`, with or without `udp://`. Raises ConfigError that names the key."""
    try:
        parts = urlsplit(text if "://" in text else f"udp://{text}")
        host, port = parts.hostname, parts.port
        is_bare = parts.scheme == "udp" and parts.path in ("", "/") and not parts.query and parts.username is None
        (host or "").encode("idna")  # as who looks the name up will
    except ValueError:
        host, port, is_bare = None, None, False
    if not host or not port or not is_bare:
        raise ConfigError(f"{key}={text[:100]}: it must be host:port, as localhost:8125")
    return host, port
