"""The life of the server: listen, reload on SIGHUP, drain on SIGTERM, several workers on one port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NoReturn

from aiohttp import web
from threadpoolctl import threadpool_limits

from iccache import config, metrics
from iccache.api.front import Front
from iccache.api.server import make_app
from iccache.api.unreadable import Handler
from iccache.assemble import Proxy, refuse_fixed, with_keys
from iccache.collector import Collector
from iccache.errors import ConfigError, IccacheError

log = logging.getLogger(__name__)

BACKLOG = 1024
KEEPALIVE_S = 75.0
LINGERING_S = 2.0  # for the rest of a body that nobody reads
LAST_WORD_S = 1.0  # for handlers that are cut off at the end of the drain
RESPAWN_AFTER_S = 1.0
SWITCH_S = 0.001  # that the loop waits for the interpreter, each time another thread is at work
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
UNFORESEEN = 70  # a worker's exit code


def serve(settings: config.Config, path: Path | None) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    listener = listen(bound(settings.server, settings.server.port))
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    def announce() -> None:
        print(f"iccache listens on http://{shown}:{port}", flush=True)

    if settings.server.workers == 1:
        return run_worker(settings, path, listener, announce)
    listener.close()  # the address can be had: now together
    return Workers(settings, path, port).run(announce)


def bound(server: config.Server, port: int, *, together: bool = False) -> socket.socket:
    """A socket with the server's address. Raises IccacheError where it cannot be had.

    `together`: others may have the same address, so that the kernel spreads connections over those that listen.
    """
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if together:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((server.host.strip("[]"), port))
    except OSError as exc:
        listener.close()
        raise IccacheError(f"cannot listen on {server.host}:{port}: {exc.strerror or exc}") from exc
    return listener


def listen(listener: socket.socket) -> socket.socket:
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


def run_worker(
    settings: config.Config,
    path: Path | None,
    listener: socket.socket,
    announce: Callable[[], object],
    lifeline: int | None = None,
) -> int:
    """One process's event loop, from start to the end of its drain. It also ends when `lifeline`, a pipe, does.

    Linear algebra has one thread: the matrices are small, and threads that wait for one another on busy cores make of
    3 ms half a second, in which nobody is answered.
    """
    sys.setswitchinterval(SWITCH_S)
    try:
        import uvloop  # noqa: PLC0415 - not there on every platform
    except ImportError:
        factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    else:
        factory = uvloop.new_event_loop
    with threadpool_limits(1, user_api="blas"), asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_worker(settings, path, listener, announce, lifeline))


async def _worker(
    settings: config.Config,
    path: Path | None,
    listener: socket.socket,
    announce: Callable[[], object],
    lifeline: int | None,
) -> int:
    proxy = Proxy(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _not_begun, number)
    early = asyncio.Event()  # SIGHUP came before there was anything to put another configuration into
    loop.add_signal_handler(signal.SIGHUP, lambda: reload(proxy, path) if proxy.loaded else early.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])
    if lifeline is not None:
        loop.add_reader(lifeline, _left_alone, lifeline, stop)
    collector = Collector(lambda: proxy.requests, lambda: proxy.open_requests)
    async with serving(proxy, listener, loaded=collector.start):
        if early.is_set():
            reload(proxy, path)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _asked_to_stop, stop)
        announce()
        await stop.wait()
        await drain(proxy)
    return 0


@contextlib.asynccontextmanager
async def serving(
    proxy: Proxy,
    listener: socket.socket,
    *,
    keepalive_s: float = KEEPALIVE_S,
    lingering_s: float = LINGERING_S,
    last_word_s: float = LAST_WORD_S,
    loaded: Callable[[], object] = lambda: None,
) -> AsyncIterator[None]:
    """Start the proxy and take connections at `listener`, which listens; stop both in the end. `loaded` is called when
    everything is there and nobody is served yet.
    """
    ways: dict[str, Any] = {"access_log": None, "keepalive_timeout": keepalive_s, "lingering_time": lingering_s}
    runner = web.AppRunner(
        make_app(proxy), handler_cancellation=True, shutdown_timeout=last_word_s, handle_signals=False, **ways
    )
    await runner.setup()
    try:
        general, loop = runner.server, asyncio.get_running_loop()
        assert general is not None
        loaded()
        proxy.loop_lag.start()
        front = Front(proxy, lambda: Handler(general, loop=loop, **ways), keepalive_s=keepalive_s)
        server = await loop.create_server(front, sock=listener, backlog=BACKLOG)
        try:
            yield
        finally:
            server.close()
            await front.stop(last_word_s)
    finally:
        await runner.cleanup()


def _not_begun(number: int) -> None:
    """Told to stop while still loading, which may take long and cannot be broken off. Nobody was answered yet, and the
    store is sound at every moment."""
    log.info("stopping: %s came before the start was done", signal.Signals(number).name)
    logging.shutdown()
    os._exit(0)


def _asked_to_stop(stop: asyncio.Event) -> None:
    if stop.is_set():  # asked twice: now
        os._exit(1)
    stop.set()


def _left_alone(lifeline: int, stop: asyncio.Event) -> None:
    asyncio.get_running_loop().remove_reader(lifeline)
    log.error("the parent process is gone: stopping")
    stop.set()


async def drain(proxy: Proxy) -> None:
    """`/readyz` says 503 from here on; open answers get `drain_s` to end."""
    proxy.draining = True
    log.info("stopping: %d requests open", proxy.open_requests)
    deadline = time.monotonic() + proxy.settings.server.drain_s
    while proxy.open_requests and time.monotonic() < deadline:  # noqa: ASYNC110 - polled, so that requests pay nothing
        await asyncio.sleep(0.05)


def reload(proxy: Proxy, path: Path | None) -> None:
    """Read the configuration again; a bad one changes nothing."""
    try:
        proxy.reload(config.load(path))
    except ConfigError as exc:
        log.error("the configuration stays as it was: %s", exc)
    else:
        log.info("the configuration was read again")


class Workers:
    """Forked processes that share one port. Signals are passed on to them, one that dies is replaced."""

    def __init__(self, settings: config.Config, path: Path | None, port: int) -> None:
        self.count = settings.server.workers
        self.settings, self.path, self.port = settings, path, port
        self.reserved = bound(settings.server, port, together=True)  # never listens: keeps the port while none does
        self.places: dict[int, int] = {}  # by process id
        self.stopping = False
        self.lifeline, self.held = os.pipe()  # nothing is ever written: `held` closes when this process ends

    def run(self, announce: Callable[[], object]) -> int:
        """Until all have ended. The first starts alone: where it cannot, the others could not either."""
        for number in SIGNALS:
            signal.signal(number, self.pass_on)
        heard, word = os.pipe()
        self.fork(0, lambda: (announce(), os.write(word, b".")))
        os.close(word)
        if not os.read(heard, 1):
            code = self.ended()[1]
            return 0 if self.stopping and code <= 0 else max(code, 1)
        for place in range(1, self.count):
            self.fork(place)
        return self.watch()

    def watch(self) -> int:
        """Replace those that end before they were told to. Returns the exit code when all have ended."""
        failed = 0
        while self.places:
            place, code = self.ended()
            if self.stopping:
                failed = max(failed, code)
                continue
            log.error("worker %d ended with %d; another takes its place", place, code)
            time.sleep(RESPAWN_AFTER_S)
            self.fork(place)
        return 1 if failed else 0

    def ended(self) -> tuple[int, int]:
        """Wait for one to end: its place and its exit code."""
        pid, status = os.wait()
        metrics.forget_process(pid)
        return self.places.pop(pid, -1), os.waitstatus_to_exitcode(status)

    def pass_on(self, number: int, _frame: object) -> None:
        self.stopping = self.stopping or number != signal.SIGHUP
        if number == signal.SIGHUP:
            self.reread()
        for pid in self.places:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def reread(self) -> None:
        """What workers begin with from now on; where they stay with what they have, so does this."""
        with contextlib.suppress(ConfigError):
            settings = config.load(self.path)
            refuse_fixed(self.settings, settings)
            with_keys(settings, os.environ)
            self.settings = settings

    def fork(self, place: int, announce: Callable[[], object] = lambda: None) -> None:
        """One more worker, unless all are to stop. No signal comes between its start and its being known here."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            if self.stopping:
                return
            pid = os.fork()
            if not pid:
                self._live(announce)
            self.places[pid] = place
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _live(self, announce: Callable[[], object]) -> NoReturn:
        """The life of a worker."""
        code = UNFORESEEN
        try:
            os.setpgid(0, 0)  # Ctrl-C reaches the parent, which passes it on: once
            os.close(self.held)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, set(SIGNALS) - {signal.SIGHUP})  # that one when it is heeded
            listener = bound(self.settings.server, self.port, together=True)
            listener.setblocking(False)  # it listens when there is somebody to answer
            code = run_worker(self.settings, self.path, listener, announce, self.lifeline)
        except IccacheError as exc:
            code = 2 if isinstance(exc, ConfigError) else 1
            print("\n".join(f"iccache: {line}" for line in str(exc).splitlines()), file=sys.stderr)
        except BaseException:
            log.exception("unexpected")
        finally:
            sys.stdout.flush()
            os._exit(code)
