"""HTTP to one or more vLLM servers: balanced, retried with back-off, in the end one error that names the address."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakSet

import httpx2
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    wait_random_exponential,
)

Answer = TypeVar("Answer")

_CONNECTED = ("connection.connect_tcp.complete", "connection.start_tls.complete")
_BUSY = (429, 500, 502, 503, 504)  # worth another try; everything else the server has refused for good


class ServerUnreachable(ConnectionError):
    """A server did not answer for as long as we were told to wait."""


class FailedAttempt(ConnectionError):
    """One attempt at this address failed; another may not."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url} ({reason})")
        self.url = url


@dataclass(frozen=True)
class Connection:
    """How to talk to the servers.

    Args:
        urls: Addresses such as ``http://localhost:8000``; requests go to the least busy one.
        max_in_flight: Requests that a server is given at once. More keep it busier; a request's answer waits in memory
            until it is used.
        timeout: Seconds to wait for the answer to one request.
        patience: Seconds during which a failed request is repeated, with growing pauses, before the run stops, counted
            from its first failure. A server that is restarted within them costs nothing else.
        api_key: Sent as bearer token, for servers started with ``--api-key``.

    Raises:
        ValueError: An address is none, or a number is out of range.
    """

    urls: list[str]
    max_in_flight: int = 64
    timeout: float = 600.0
    patience: float = 120.0
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.urls:
            raise ValueError("connection.urls: expected at least one address, for example http://localhost:8000.")
        for url in self.urls:
            if not url.startswith(("http://", "https://")) or url.rstrip("/").endswith("/v1"):
                raise ValueError(
                    f"connection.urls: expected addresses such as http://localhost:8000 (without /v1), got {url!r}."
                )
        if len(set(self.urls)) != len(self.urls):
            raise ValueError(f"connection.urls: an address is there twice: {self.urls}.")
        for name in ("max_in_flight", "timeout", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"connection.{name}: expected a positive number, got {getattr(self, name)}.")


class Server:
    """One vLLM server.

    Attributes:
        url: Its address.
        num_in_flight: Requests it is working on for us, or that wait for one of its slots.
        slots: As many as it may work on at once.
    """

    def __init__(self, url: str, connection: Connection) -> None:
        self.url = url.rstrip("/")
        self.num_in_flight = 0
        self.slots = threading.BoundedSemaphore(connection.max_in_flight)
        headers = {} if connection.api_key is None else {"Authorization": f"Bearer {connection.api_key}"}
        self._http = httpx2.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx2.Timeout(connection.timeout, connect=min(10.0, connection.timeout)),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=connection.max_in_flight),
            trust_env=False,  # a proxy for the internet is not meant for these
        )
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._is_closed = False
        self._lock = threading.Lock()

    def ask(self, path: str, body: Any = None, *, method: str | None = None) -> Any:
        """Make one attempt: POST the body (or GET without one) and return the JSON of the answer.

        Raises:
            FailedAttempt: No answer, or one that says "later".
            ValueError: The server refuses the request.
        """
        if self._is_closed:
            raise FailedAttempt(self.url, "the connection was closed")
        try:
            response = self._http.request(
                method or ("GET" if body is None else "POST"), path, json=body, extensions={"trace": self._note_socket}
            )
        except httpx2.TransportError as error:
            raise FailedAttempt(self.url, f"{type(error).__name__}: {error}") from error
        if response.status_code in _BUSY:
            raise FailedAttempt(self.url, f"HTTP {response.status_code}: {_message(response)}")
        if response.is_error:
            raise ServerRefusal(self.url, path, response.status_code, _message(response))
        return response.json() if response.content else None

    def close(self) -> None:
        """Hang up, also on threads that are waiting for an answer."""
        with self._lock:
            self._is_closed = True
            sockets = list(self._sockets)
        for connected in sockets:
            _hang_up(connected)
        self._http.close()

    def _note_socket(self, event: str, info: Mapping[str, Any]) -> None:
        if event in _CONNECTED:
            connected = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets.add(connected)
                is_closed = self._is_closed
            if is_closed:
                _hang_up(connected)


def _hang_up(connected: socket.socket) -> None:
    with suppress(OSError):  # the other side was faster
        connected.shutdown(socket.SHUT_RDWR)  # closing it alone would not wake who is reading from it


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


class ServerPool:
    """The servers of one teacher or engine.

    Requests run in threads, at most `max_in_flight` per server. Each attempt goes to the server that has least to do,
    and a server where the request has failed comes last, so one that is down is passed over while another answers.
    """

    def __init__(self, connection: Connection, role: str) -> None:
        self.connection = connection
        self.role = role
        self.servers = [Server(url, connection) for url in connection.urls]
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._threads = ThreadPoolExecutor(
            connection.max_in_flight * len(self.servers), thread_name_prefix=f"opd-lightning-{role}"
        )

    def submit(self, path: str, body: Any, use: Callable[[Any], Answer]) -> Future[Answer]:
        """Post to any server in the background; the future holds what `use` makes of the answer.

        Raises:
            ServerUnreachable: The pool is closed.
        """
        with self._lock:
            if self._closed.is_set():
                raise ServerUnreachable(f"{self.role}: the connections were closed; the run is over.")
            return self._threads.submit(lambda: use(self.post(path, body)))

    def post(self, path: str, body: Any) -> Any:
        """Post to any server and wait for the answer.

        Raises:
            ServerUnreachable: None answered for `patience` seconds.
            ValueError: The server refuses the request.
        """
        failures: Counter[str] = Counter()

        def attempt() -> Any:
            with self._lock:  # not where this request has failed before, if there is another
                server = min(self.servers, key=lambda server: (failures[server.url], server.num_in_flight))
                server.num_in_flight += 1
            try:
                with server.slots:  # all requests come here when the other servers are down
                    return server.ask(path, body)
            except FailedAttempt:
                failures[server.url] += 1
                raise
            finally:
                with self._lock:
                    server.num_in_flight -= 1

        return self.insist(attempt)

    def ask(self, server: Server, path: str, body: Any = None, *, method: str | None = None) -> Any:
        """Ask this very server, patiently; for requests that may be repeated.

        Raises:
            ServerUnreachable: It did not answer for `patience` seconds.
            ValueError: The server refuses the request.
        """
        return self.insist(lambda: server.ask(path, body, method=method))

    def on_every_server(self, ask: Callable[[Server], Answer]) -> list[Answer]:
        """Do something with every server at once and return the results in order."""
        return wait_for([self._threads.submit(ask, server) for server in self.servers])

    def close(self) -> None:
        """Call off what is waiting or under way and close the connections."""
        with self._lock:
            self._closed.set()
            self._threads.shutdown(wait=False, cancel_futures=True)
        for server in self.servers:
            server.close()

    def insist(self, attempt: Callable[[], Answer]) -> Answer:
        """Repeat an attempt that may fail, with growing pauses.

        Raises:
            ServerUnreachable: It failed for `patience` seconds; names the addresses.
        """
        failed: dict[str, str] = {}  # address: last failure
        failing_since: list[float] = []  # a long answer that fails at last has only just begun to fail

        def attempt_and_note() -> Answer:
            try:
                return attempt()
            except FailedAttempt as failure:
                failed[failure.url] = str(failure)
                failing_since.append(time.monotonic())
                raise

        def is_over(_: RetryCallState) -> bool:
            return self._closed.is_set() or time.monotonic() - failing_since[0] >= self.connection.patience

        retrying = Retrying(
            retry=retry_if_exception_type(FailedAttempt),
            stop=is_over,
            sleep=sleep_using_event(self._closed),
            wait=wait_random_exponential(multiplier=0.2, max=10),
            reraise=True,
        )
        try:
            answer: Answer = retrying(attempt_and_note)
            return answer
        except FailedAttempt:
            raise ServerUnreachable(
                f"{self.role}: no answer for {self.connection.patience:g} s from {'; '.join(failed.values())}. Start it"
                " again and resume from the last checkpoint; connection.patience says how long to wait."
            ) from None


def wait_for(futures: Sequence[Future[Answer]]) -> list[Answer]:
    """Results in order; at the first failure the rest is called off."""
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _message(response: httpx2.Response) -> str:
    """What the server says is wrong, in one line."""
    try:
        body = response.json()
        message = body["error"]["message"] if "error" in body else body
    except (ValueError, TypeError, KeyError):
        message = response.text
    return " ".join(str(message).split())[:500] or "no reason given"
