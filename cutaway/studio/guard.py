"""The guard: what every request must show before anything else sees it, and what every answer carries.

* The `Host` must be this server (a foreign name that resolves here is an attack by DNS rebinding).
* A request needs the cookie. The address that the terminal prints sets it, once; then that address is spent.
* What changes something must come from this page (`Origin`, `Sec-Fetch-Site`) and be JSON.
* A body has at most `MOST_BODY` bytes, that of a graph file `MOST_FILE`.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs

MOST_BODY, MOST_FILE = 1 << 20, 32 << 20
_FILES = frozenset({"/api/v1/import_graph"})
COOKIE = "cutaway"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
Scope = dict[str, Any]


class Guard:
    """An ASGI application around another one.

    Attributes:
        secret: the value of the cookie.
    """

    def __init__(self, app: Any, hosts: Iterable[str]):
        self.app, self.hosts = app, frozenset(h.lower() for h in hosts)
        self.secret = secrets.token_urlsafe(32)
        self._links: set[str] = set()

    def link(self) -> str:
        """Return the query of an address that lets one browser in."""
        token = secrets.token_urlsafe(32)
        self._links.add(token)
        return f"?token={token}"

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        if (cookie := self._entered(scope)) is not None:
            await _answer(send, 303, "", {"location": "/", "set-cookie": cookie})
            return
        if (refusal := self._refusal(scope, headers)) is not None:
            status, why, instead = refusal
            await _answer(send, status, json.dumps({"what": "the request", "why": why, "instead": instead}))
            return
        await self.app(scope, _limited(receive, _most(scope)), _with_headers(send))

    def _entered(self, scope: Scope) -> str | None:
        """Return the cookie for a request whose address is a fresh link; the link is spent."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if scope["path"] != "/" or scope["method"] != "GET" or "token" not in query or not self._host(scope):
            return None
        for link in list(self._links):
            if hmac.compare_digest(link.encode(), query["token"][0].encode()):
                self._links.discard(link)
                return f"{COOKIE}={self.secret}; HttpOnly; SameSite=Strict; Path=/"
        return None

    def _host(self, scope: Scope) -> bool:
        host = next((v for k, v in scope["headers"] if k == b"host"), b"").decode("latin-1").lower()
        return host in self.hosts

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        if not self._host(scope):
            return 421, "it was sent to another host", "use the address that the terminal printed"
        if not hmac.compare_digest(_cookie(headers.get("cookie", "")).encode(), self.secret.encode()):
            return 401, "it shows no valid token", "open the address that the terminal printed; each opens one browser"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return 403, "another page sent it", "use the page itself"
        if scope["method"] in ("GET", "HEAD"):
            return None
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower():
            return 403, "another page sent it", "use the page itself"
        if headers.get("content-type", "application/json").partition(";")[0].strip() != "application/json":
            return 415, "its body is not JSON", "send application/json"
        length, most = headers.get("content-length", "0"), _most(scope)
        if not length.isdecimal() or int(length) > most:
            return 413, f"its body is longer than {most} bytes", "send less"
        return None


def _cookie(text: str) -> str:
    for part in text.split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return ""


def _most(scope: Scope) -> int:
    return MOST_FILE if scope["path"] in _FILES else MOST_BODY


def _limited(receive: Any, most: int) -> Any:
    """Pass on at most `most` bytes of a body, whatever its header says of its length."""
    seen = 0

    async def limited() -> dict[str, Any]:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > most else message

    return limited


def _with_headers(send: Any) -> Any:
    async def carrying(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            have = {k.lower() for k, _ in message["headers"]}
            extra = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in have]
            message = {**message, "headers": [*message["headers"], *extra]}
        await send(message)

    return carrying


async def _answer(send: Any, status: int, body: str, headers: dict[str, str] | None = None) -> None:
    said = {"content-type": "application/json", "cache-control": "no-store", **_HEADERS, **(headers or {})}
    pairs = [(k.encode(), v.encode()) for k, v in said.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body.encode()})
