"""What the app demands of requests, and says in answers, beyond what Gradio does: an ASGI middleware."""

from __future__ import annotations

import contextlib
import contextvars
import re
import secrets
from collections.abc import Collection, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Events and logins; pictures and adapters travel as uploads.
MOST_BYTES_OF_A_MESSAGE = 8 * 2**20

# The address that the request at hand came from.
caller_address: contextvars.ContextVar[str] = contextvars.ContextVar("caller_address", default="")

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_SERVED_FILE = re.compile(r"/file[=/]")

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=(), display-capture=()",
}
# Gradio compiles scripts of components ('unsafe-eval') and styles elements one by one; scripts in the page itself run
# with the nonce only, so that none that came in as text can.
_PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
# A picture or a download, opened by its own address.
_FILE_POLICY = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; sandbox; frame-ancestors 'none'"


class Guard:
    """Adds headers, caps bodies, and refuses requests that another site makes through a visitor's browser."""

    def __init__(self, app: ASGIApp, *, most_upload_bytes: int, names: Collection[str] | None) -> None:
        """
        Args:
            app: what answers.
            most_upload_bytes: of one request, whatever it says of its length.
            names: of this machine, in small letters; None: answer to any. Another site whose name its owner lets
                stand for 127.0.0.1 would otherwise be in reach of the app.
        """
        self._app = app
        self._most_upload_bytes = most_upload_bytes
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if _SERVED_FILE.search(scope["path"]):
            send = _with_headers(send, _HEADERS | {"Content-Security-Policy": _FILE_POLICY})
        else:
            nonce = secrets.token_urlsafe(16)
            policy = _PAGE_POLICY.format(nonce=nonce)
            send = _with_nonce(_with_headers(send, _HEADERS | {"Content-Security-Policy": policy}), nonce)
        most_bytes = self._most_upload_bytes if _is_upload(scope["path"]) else MOST_BYTES_OF_A_MESSAGE
        refusal = self._refusal(scope["method"], headers, most_bytes)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        client = scope.get("client")
        caller_address.set(client[0] if client else "")
        await _capped(self._app, scope, receive, send, most_bytes)

    def _refusal(self, method: str, headers: Headers, most_bytes: int) -> PlainTextResponse | None:
        if self._names is not None and _host_name(headers.get("host", "")) not in self._names:
            return PlainTextResponse(
                "This app answers on this machine's own names only. Behind a proxy, start it with --auth_file or "
                "--allow_public.",
                status_code=421,
            )
        if method not in _SAFE_METHODS and headers.get("sec-fetch-site") == "cross-site":
            return PlainTextResponse("Requests from other sites are refused.", status_code=403)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > most_bytes:
            return _too_large(most_bytes)
        return None


def _host_name(host: str) -> str:
    """``[::1]:7860`` -> ``[::1]``."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()


def _is_upload(path: str) -> bool:
    return path.rstrip("/").endswith("/gradio_api/upload")  # and not an event that is called so


def _too_large(most_bytes: int) -> PlainTextResponse:
    return PlainTextResponse(
        f"That is more than the {most_bytes / 2**20:.0f} MB that may be sent at once.",
        status_code=413,
        headers={"Connection": "close"},
    )


async def _capped(app: ASGIApp, scope: Scope, receive: Receive, send: Send, most_bytes: int) -> None:
    """Run ``app`` on a body of at most ``most_bytes``.

    At more than that, and where the visitor breaks off, it gets the error of a broken form: for others Gradio leaves
    the part of an upload that has arrived on the disk.
    """
    received, whole, too_large, answered = 0, False, False, False

    async def counted() -> Message:
        nonlocal received, whole, too_large
        message = {"type": "http.disconnect"} if too_large else await receive()
        received += len(message.get("body", b""))
        too_large = received > most_bytes
        if too_large or (message["type"] == "http.disconnect" and not whole):
            raise MultiPartException("The upload is too large, or was broken off.")
        whole = whole or not message.get("more_body", False)
        return message

    async def answer(message: Message) -> None:
        nonlocal answered
        if too_large and not answered:
            return
        answered = True
        await send(message)

    with contextlib.suppress(MultiPartException):  # where nobody has caught it on the way
        await app(scope, counted, answer)
    if too_large and not answered:
        await _too_large(most_bytes)(scope, receive, send)


def _with_headers(send: Send, headers: Mapping[str, str]) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(headers)
        await send(message)

    return sending


def _with_nonce(send: Send, nonce: str) -> Send:
    """Mark the scripts of an HTML page. Data in the page can't make itself such a script: Gradio writes ``<`` in it as
    an escape."""
    start: Message | None = None
    page = bytearray()

    async def sending(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            if Headers(raw=message["headers"]).get("content-type", "").startswith("text/html"):
                start = message
                return
        elif message["type"] == "http.response.body" and start is not None:
            page.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            marked = bytes(page).replace(b"<script", f'<script nonce="{nonce}"'.encode())
            MutableHeaders(scope=start)["Content-Length"] = str(len(marked))
            await send(start)
            message = {"type": "http.response.body", "body": marked}
        await send(message)

    return sending
