"""When a process of several dies, the others end with one sentence instead of waiting for it for ever.

Every process holds a connection to process 0. The system closes it when a process dies, however it dies; a machine that
is gone is noticed within ``IDLE + PROBES * EVERY`` seconds. A process that ends normally says so before.

JAX has connections of its own to process 0. It aborts a process, with pages of logs, at the moment when its own closes.
So a small program keeps these open until the other processes have ended, see ``outlive``. If the machine or the cgroup
of process 0 dies, it dies, too: the logs of JAX may then come first.
"""

import contextlib
import os
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from hope_jax.errors import UserError
from hope_jax.signals import STDERR

IDLE, EVERY, PROBES = 15, 5, 3  # seconds of silence, seconds between questions, unanswered questions
GOODBYE, LOST = b".", b"!"
GRACE = 10
"""Seconds in which this process may end by itself after another one failed: all may have the same error."""
HELD = 3 * GRACE
"""Seconds that the connections of JAX stay open after the end of process 0."""
JOINING = 60
"""Seconds that processes may take to connect to process 0."""
STATUS = 1
"""Exit status of a process that ends because another one did."""


class Watch(contextlib.AbstractContextManager["Watch"]):
    """A thread of process ``index`` of ``count`` that ends this process when another one is lost; a context manager.

    ``host``, ``port``: where process 0 listens for JAX. ``told``: gives all processes the number of process 0.
    """

    def __init__(self, index: int, count: int, host: str, port: int, told: Callable[[int], int]):
        self._index, self._count, self._leaving = index, count, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        server = socket.create_server(("", 0)) if index == 0 else None
        ours = told(server.getsockname()[1] if server else 0)
        self._holder = outlive(port) if server else None
        try:
            self._peers = _accepted(server, count - 1) if server else {_connected(host, ours, index): 0}
        except OSError as error:
            raise UserError(
                f"the processes could not all connect to process 0 ({error}): they must reach {host} at every port."
            ) from error
        for peer in self._peers:
            _probe(peer)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._holder and not self._leaving.is_set():  # all others have ended
            self._holder.kill()
            self._holder.wait()
        self._tell(GOODBYE)

    def fail(self) -> None:
        """This process ends before the others do."""
        self._tell(LOST)

    def wait(self) -> None:
        """Give the thread time to end this process: an error here may come from the death of another process."""
        self._thread.join(GRACE + 5)

    def _tell(self, word: bytes) -> None:
        if not self._leaving.is_set():
            self._leaving.set()
            for peer in self._peers:
                with contextlib.suppress(OSError):
                    peer.sendall(word)

    def _run(self) -> None:
        with selectors.DefaultSelector() as waiting:
            for peer, index in self._peers.items():
                waiting.register(peer, selectors.EVENT_READ, index)
            while waiting.get_map():
                for key, _ in waiting.select():
                    self._heard(key.fileobj, key.data)
                    waiting.unregister(key.fileobj)

    def _heard(self, peer: Any, index: int) -> None:
        try:
            word = peer.recv(1)
        except OSError:
            word = b""
        if word != GOODBYE and not self._leaving.wait(GRACE if word else 0):
            end(index, self._count)  # the others see that this connection closes


def end(index: int, count: int) -> None:
    """End this process at once: its threads may all wait for the process that is gone."""
    who = f"Process {index} of {count}" if index else f"Process 0 of {count}, or one that it waits for,"
    sentence = f"{who} has ended before its time, so this one ends, too; start all of them again to go on."
    with contextlib.suppress(OSError):
        os.write(STDERR, f"\n{sentence}\n".encode())
    os._exit(STATUS)


def outlive(port: int) -> subprocess.Popen:
    """Start a program that holds the connections to ``port`` of this process until ``HELD`` seconds after its end."""
    program = f"import sys, time; sys.stdin.read(); time.sleep({HELD})"  # the system closes its input at that end
    return subprocess.Popen(
        [sys.executable, "-ISc", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[number for number in map(int, os.listdir("/dev/fd")) if _is_connection(number, port)],
        start_new_session=True,  # so Ctrl-C does not end it
    )


def _is_connection(number: int, port: int) -> bool:
    """Whether a descriptor of this process is a connection to its ``port``."""
    try:
        found = socket.socket(fileno=number)
    except OSError:  # no socket
        return False
    try:
        found.getpeername()  # one that only listens has none
        return found.family in (socket.AF_INET, socket.AF_INET6) and found.getsockname()[1] == port
    except OSError:
        return False
    finally:
        found.detach()


def _accepted(server: socket.socket, count: int) -> dict[socket.socket, int]:
    """The connections of the other processes, each with the number of its process."""
    peers = {}
    server.settimeout(JOINING)
    with server:
        while len(peers) < count:
            peer, _ = server.accept()
            peers[peer] = int.from_bytes(peer.recv(4), "big")
    return peers


def _connected(host: str, port: int, index: int) -> socket.socket:
    peer = socket.create_connection((host.strip("[]"), port), timeout=JOINING)
    peer.settimeout(None)
    peer.sendall(index.to_bytes(4, "big"))
    return peer


def _probe(peer: socket.socket) -> None:
    """Let the system ask whether the other machine is still there."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", IDLE), ("TCP_KEEPINTVL", EVERY), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
