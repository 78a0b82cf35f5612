"""One attempt at one vLLM server: a request, a bounded answer within a bounded time, or one line that says why not."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import httpx2

from opd_lightning.backends.vllm.answers import NoAnswer

_CONNECTED = ("connection.connect_tcp.complete", "connection.start_tls.complete")
_BUSY = (429, 500, 502, 503, 504)  # worth another try; everything else the server has refused for good
_MEBIBYTE = 2**20
_LONGEST_MESSAGE = 500


class FailedAttempt(ConnectionError):
    """One attempt at this address failed; another may not."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url} ({one_line(reason)})")
        self.url = url


class ServerRefusal(ValueError):
    """A server understood a request and refused it.

    Attributes:
        status: HTTP status.
        reason: What the server said.
    """

    def __init__(self, url: str, path: str, status: int, reason: str) -> None:
        super().__init__(f"{url}{path} refused the request (HTTP {status}): {reason}")
        self.status = status
        self.reason = reason


class Server:
    """One vLLM server.

    Attributes:
        url: Its address as it may be shown, without a password.
        num_in_flight: Requests it is working on for us, or that wait for one of its slots.
        slots: As many as it may work on at once.
    """

    def __init__(self, url: str, *, api_key: str | None, timeout: float, max_in_flight: int, max_mib: int) -> None:
        self.url = shown_address(url)
        self.num_in_flight = 0
        self.slots = threading.BoundedSemaphore(max_in_flight)
        self._timeout = timeout
        self._max_mib = max_mib
        headers = {"Accept-Encoding": "identity"}  # what is packed can be a thousand times as large as it looks
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._client_options: dict[str, Any] = {
            "base_url": url.rstrip("/"),
            "headers": headers,
            "timeout": httpx2.Timeout(None, connect=min(10.0, timeout)),  # the rest is `_Line`'s
            "limits": httpx2.Limits(max_connections=1, max_keepalive_connections=1),
            "trust_env": False,  # a proxy for the internet is not meant for these
            "verify": httpx2.create_ssl_context(trust_env=False),
        }
        self._lines: list[_Line] = []
        self._idle: list[_Line] = []
        self._is_closed = False
        self._lock = threading.Lock()

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        read: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Make one attempt: POST the body (or GET without one).

        Args:
            path: Where to.
            body: Sent as JSON.
            read: Takes the parsed JSON of the answer and returns what is wanted of it, or raises `NoAnswer`; None when
                the answer says nothing.

        Raises:
            FailedAttempt: No answer, none of vLLM's, or one that says "later".
            ValueError: The server refuses the request.
        """
        status, content = self._exchange("GET" if body is None else "POST", path, body)
        if status in _BUSY:
            raise FailedAttempt(self.url, f"HTTP {status}: {_message(content)}")
        if status >= 400:
            raise ServerRefusal(self.url, path, status, _message(content))
        if not 200 <= status < 300:
            raise FailedAttempt(self.url, f"HTTP {status}: a redirect; is this the address of the server itself?")
        if read is None:
            return None
        try:
            return read(json.loads(content))
        except NoAnswer as error:
            raise FailedAttempt(self.url, f"{error}; is this a vLLM server?") from None
        except (ValueError, RecursionError):
            reason = f"{len(content)} bytes that are no JSON" if content else "an empty answer"
            raise FailedAttempt(self.url, f"{reason}; is this a vLLM server?") from None

    def close(self) -> None:
        """Hang up, also on threads that are waiting for an answer."""
        with self._lock:
            self._is_closed = True
            lines = list(self._lines)
        for line in lines:
            line.close()

    def _exchange(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        with self._lock:
            if self._is_closed:
                raise FailedAttempt(self.url, "the connection was closed")
            if self._idle:
                line = self._idle.pop()
            else:
                line = _Line(self._client_options)
                self._lines.append(line)
        try:
            return line.exchange(method, path, body, self._timeout, self._max_mib * _MEBIBYTE)
        except _TooLate:
            raise FailedAttempt(self.url, f"no whole answer within {self._timeout:g} s") from None
        except _TooLarge:
            raise FailedAttempt(
                self.url, f"an answer of more than {self._max_mib} MiB, or a packed one; see connection.max_answer_mib"
            ) from None
        except httpx2.TransportError as error:
            raise FailedAttempt(self.url, f"{type(error).__name__}: {error}") from error
        finally:
            with self._lock:
                self._idle.append(line)


class _TooLate(Exception):
    pass


class _TooLarge(Exception):
    pass


class _Line:
    """One connection, kept alive between requests, that carries one request at a time.

    Time-outs of sockets begin anew with every byte, so a request that must end is hung up on; this is why none shares
    its connections with others.
    """

    def __init__(self, client_options: Mapping[str, Any]) -> None:
        self._http = httpx2.Client(**client_options)
        self._sockets: list[socket.socket] = []
        self._request = 0
        self._is_late = self._is_closed = False
        self._lock = threading.Lock()

    def exchange(self, method: str, path: str, body: Any, timeout: float, max_bytes: int) -> tuple[int, bytes]:
        """Status and content of the answer.

        Raises:
            _TooLate: It is not there after `timeout` seconds.
            _TooLarge: It has more than `max_bytes`.
            httpx2.TransportError: The connection broke, or was closed here.
        """
        with self._lock:
            self._is_late = False
            alarm = threading.Timer(timeout, self._give_up, (self._request,))
        alarm.daemon = True
        alarm.start()
        try:
            return self._exchange(method, path, body, max_bytes)
        except httpx2.TransportError:
            if self._is_late:
                raise _TooLate from None
            raise
        except RuntimeError as error:  # the client's own, where another thread closed it a moment before
            if self._is_closed:
                raise httpx2.TransportError("closed here") from error
            raise
        finally:
            alarm.cancel()
            with self._lock:
                self._request += 1

    def close(self) -> None:
        """Hang up, whatever is under way."""
        with self._lock:
            self._is_closed = True
        self._hang_up()
        self._http.close()

    def _exchange(self, method: str, path: str, body: Any, max_bytes: int) -> tuple[int, bytes]:
        content = bytearray()
        trace = {"trace": self._note_socket}
        with self._http.stream(method, path, json=body, extensions=trace) as response:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise _TooLarge
            for part in response.iter_raw():
                content += part
                if len(content) > max_bytes:
                    raise _TooLarge
        if self._is_late:  # hung up on, which some answers take for their end
            raise _TooLate
        return response.status_code, bytes(content)

    def _note_socket(self, event: str, info: Mapping[str, Any]) -> None:
        if event in _CONNECTED:
            connected = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets = [connected]
                is_over = self._is_closed or self._is_late
            if is_over:
                _hang_up(connected)

    def _give_up(self, request: int) -> None:
        with self._lock:
            if request != self._request:  # answered just now
                return
            self._is_late = True
            for connected in self._sockets:
                _hang_up(connected)

    def _hang_up(self) -> None:
        with self._lock:
            for connected in self._sockets:
                _hang_up(connected)


def _hang_up(connected: socket.socket) -> None:
    with suppress(OSError):  # the other side was faster
        connected.shutdown(socket.SHUT_RDWR)  # closing it alone would not wake who is reading from it


def shown_address(url: str) -> str:
    """An address as it may be shown: without user, password, query and fragment."""
    scheme = re.match(r"https?://", url)
    place = re.split(r"[?#]", url.rpartition("@")[2].removeprefix(scheme[0] if scheme else ""))[0]
    return one_line((scheme[0] if scheme else "") + place).rstrip("/")


def one_line(text: str) -> str:
    """Somebody else's words for the terminal: one line, of bounded length, without control and escape characters."""
    visible = "".join(letter if letter.isprintable() else " " for letter in text[: 8 * _LONGEST_MESSAGE])
    return " ".join(visible.split())[:_LONGEST_MESSAGE]


def _message(content: bytes) -> str:
    """What the server says is wrong, in one line."""
    try:
        body = json.loads(content)
        message = body["error"]["message"] if "error" in body else body
    except (ValueError, TypeError, KeyError, RecursionError):
        message = content[: 8 * _LONGEST_MESSAGE].decode(errors="replace")
    return one_line(str(message)) or "no reason given"
