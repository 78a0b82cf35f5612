"""HTTP to one or more vLLM servers: balanced, retried with back-off, in the end one error that names the address."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    wait_random_exponential,
)

from opd_lightning.backends.vllm.answers import UnfitAnswer, first_choice
from opd_lightning.backends.vllm.server.exchange import FailedAttempt, Server, shown_address

COMPLETIONS = "/v1/completions"
Answer = TypeVar("Answer")


class ServerUnreachable(ConnectionError):
    """A server did not answer for as long as we were told to wait."""


@dataclass(frozen=True)
class Connection:
    """How to talk to the servers.

    Args:
        urls: Addresses such as ``http://localhost:8000``; requests go to the least busy one. A user and a password
            (``http://user:password@host``) are sent and never shown.
        max_in_flight: Requests that a server is given at once. More keep it busier; a request's answer waits in memory
            until it is used.
        timeout: Seconds within which the whole answer to one request must be there.
        patience: Seconds during which a failed request is repeated, with growing pauses, before the run stops, counted
            from its first failure. A server that is restarted within them costs nothing else.
        api_key: Sent as bearer token, for servers started with ``--api-key``.
        max_answer_mib: Largest answer that is read, in MiB. A teacher's takes about 70 bytes per token and entry of its
            top-k list: 45 MiB for 32 thousand tokens and k = 20.

    Raises:
        ValueError: An address is none, or a number is out of range.
    """

    urls: list[str] = field(repr=False)
    max_in_flight: int = 64
    timeout: float = 600.0
    patience: float = 120.0
    api_key: str | None = field(default=None, repr=False)
    max_answer_mib: int = 256

    def __post_init__(self) -> None:
        if not self.urls:
            raise ValueError("connection.urls: expected at least one address, for example http://localhost:8000.")
        for url in self.urls:
            if not _is_address(url):
                raise ValueError(
                    "connection.urls: expected addresses such as http://localhost:8000 (without /v1, query and"
                    f" fragment), got {shown_address(url)!r}."
                )
        if len(set(self.addresses)) != len(self.urls):
            raise ValueError(f"connection.urls: an address is there twice: {self.addresses}.")
        for name in ("max_in_flight", "timeout", "patience", "max_answer_mib"):
            if not getattr(self, name) > 0:
                raise ValueError(f"connection.{name}: expected a positive number, got {getattr(self, name)}.")
        if self.timeout > threading.TIMEOUT_MAX:
            raise ValueError(f"connection.timeout: expected at most {threading.TIMEOUT_MAX:g}, got {self.timeout}.")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError(
                "connection.api_key: expected ASCII letters on one line; is there a line break at its end?"
            )

    @property
    def addresses(self) -> list[str]:
        """The addresses as they may be shown."""
        return [shown_address(url) for url in self.urls]


def _is_address(url: str) -> bool:
    if not url.startswith(("http://", "https://")) or url.rstrip("/").endswith("/v1") or {"?", "#"} & set(url):
        return False
    try:
        return bool(httpx2.URL(url).host)
    except httpx2.InvalidURL:
        return False


class ServerPool:
    """The servers of one teacher or engine.

    Requests run in threads, at most `max_in_flight` per server. Each attempt goes to the server that has least to do,
    and a server where the request has failed comes last, so one that is down is passed over while another answers.
    """

    def __init__(self, connection: Connection, role: str) -> None:
        self.connection = connection
        self.role = role
        limits = {"max_in_flight": connection.max_in_flight, "max_mib": connection.max_answer_mib}
        self.servers = [
            Server(url, api_key=connection.api_key, timeout=connection.timeout, **limits) for url in connection.urls
        ]
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._threads = ThreadPoolExecutor(
            connection.max_in_flight * len(self.servers), thread_name_prefix=f"opd-lightning-{role}"
        )

    def submit(self, body: Any, use: Callable[[Mapping[str, Any]], Answer], path: str = COMPLETIONS) -> Future[Answer]:
        """Ask any server for a completion in the background; the future holds what `use` makes of it.

        Raises:
            ServerUnreachable: The pool is closed.
        """
        with self._lock:
            if self._closed.is_set():
                raise ServerUnreachable(f"{self.role}: the connections were closed; the run is over.")
            return self._threads.submit(self.complete, body, use, path)

    def complete(self, body: Any, use: Callable[[Mapping[str, Any]], Answer], path: str = COMPLETIONS) -> Answer:
        """Ask any server for a completion, wait for it, and return what `use` makes of its first choice.

        Raises:
            ServerUnreachable: None answered for `patience` seconds.
            ValueError: The server refuses the request, or its answer does not fit.
        """
        failures: Counter[str] = Counter()

        def attempt() -> tuple[Server, Mapping[str, Any]]:
            with self._lock:  # not where this request has failed before, if there is another
                server = min(self.servers, key=lambda server: (failures[server.url], server.num_in_flight))
                server.num_in_flight += 1
            try:
                with server.slots:  # all requests come here when the other servers are down
                    return server, server.ask(path, body, read=first_choice)
            except FailedAttempt:
                failures[server.url] += 1
                raise
            finally:
                with self._lock:
                    server.num_in_flight -= 1

        server, choice = self.insist(attempt)
        return self.use_of(server, choice, use)

    def use_of(self, server: Server, answer: Any, use: Callable[[Any], Answer]) -> Answer:
        """What `use` makes of an answer; says whose it was when it does not fit.

        Raises:
            UnfitAnswer: It does not.
        """
        try:
            return use(answer)
        except UnfitAnswer as error:
            raise UnfitAnswer(f"{self.role}: {server.url}: {error}") from None

    def ask(self, server: Server, path: str, body: Any = None, *, read: Callable[[Any], Any]) -> Any:
        """Ask this very server, patiently; for requests that may be repeated.

        Args:
            server: One of the pool.
            path: Where to.
            body: Posted as JSON; None gets.
            read: See `Server.ask`.

        Raises:
            ServerUnreachable: It did not answer for `patience` seconds.
            ValueError: The server refuses the request.
        """
        return self.insist(lambda: server.ask(path, body, read=read))

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
