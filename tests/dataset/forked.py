"""Programs forked from a process that has imported what they import.

``python -m vitexplain`` takes seconds to import torch and all the rest before it does anything. Here one process has done so, and
forks for each program: a process of its own, in a session of its own, that signals reach as they reach any other. This file is
that process's program, and the tests' side of it.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing.process
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

# All that a run imports sooner or later; none of it may start a thread of Python's, which no fork would have.
PRELOADED = (
    *("vitexplain.cli", "vitexplain.dataset.entry", "vitexplain.dataset.loader", "vitexplain.loading", "torch", "timm", "zarr"),
    *("pyarrow.parquet", "pandas", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "rich.progress"),
)
NUMBER = struct.Struct("i")  # a process's number and its exit code, which may come together


class Forked:
    """A program that runs, with what tests use of ``subprocess.Popen``.

    Attributes:
        pid: its process, which leads a session.
        returncode: as ``Popen`` has it, None while it is not known to have ended.
        stdout, stderr: what it prints, as text.
    """

    def __init__(self, pid: int, status: int, stdout: int, stderr: int) -> None:
        self.pid, self._status = pid, status
        self.stdout, self.stderr = os.fdopen(stdout), os.fdopen(stderr)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its return code, where it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its return code, when it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not after so many seconds.
        """
        if self.returncode is None:
            with selectors.DefaultSelector() as waiting:
                waiting.register(self._status, selectors.EVENT_READ)
                if not waiting.select(timeout):
                    raise subprocess.TimeoutExpired("forked", timeout or 0.0)
            (self.returncode,) = NUMBER.unpack(os.read(self._status, NUMBER.size))
            os.close(self._status)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it prints on both, when it has ended; nothing where that was asked for before.

        Raises:
            subprocess.TimeoutExpired: there is more to come after none was for so many seconds.
        """
        found = dict.fromkeys((self.stdout, self.stderr), b"")
        with selectors.DefaultSelector() as waiting:
            for stream in found:
                if not stream.closed:
                    waiting.register(stream, selectors.EVENT_READ)
            while waiting.get_map():
                ready = waiting.select(timeout)
                if not ready:
                    raise subprocess.TimeoutExpired("forked", timeout or 0.0)
                for key, _ in ready:
                    text = os.read(key.fd, 1 << 16)
                    found[key.fileobj] += text
                    if not text:
                        waiting.unregister(key.fileobj)
                        key.fileobj.close()
        self.wait(timeout)
        return found[self.stdout].decode(), found[self.stderr].decode()

    def send_signal(self, number: int) -> None:
        """To the process alone; to none where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """At once."""
        self.send_signal(signal.SIGKILL)


def start(arguments: Sequence[object], folder: Path, environment: Mapping[str, str] | None = None) -> Forked:
    """Run ``python ARGUMENTS`` in a folder, in a session of its own.

    Args:
        arguments: ``-m`` and a module, ``-c`` and a program, or a script, and what they are given.
        folder: where it runs.
        environment: what it has beside that of ``base_environment``.
    """
    request = json.dumps([list(map(str, arguments)), str(folder), {**base_environment(), **(environment or {})}])
    (out, out_end), (errors, errors_end), (status, status_end) = (os.pipe() for _ in range(3))
    requests, server = _server()
    socket.send_fds(requests, [request.encode()], [out_end, errors_end, status_end])
    for end in (out_end, errors_end, status_end):
        os.close(end)
    pid = os.read(status, NUMBER.size)
    assert pid, server.communicate()[1].decode()
    return Forked(*NUMBER.unpack(pid), status, out, errors)


def base_environment() -> dict[str, str]:
    """What programs are to have: one thread, and nothing of a cluster that a test has begun."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"OMP_NUM_THREADS": "1"}


@functools.cache
def _server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """The process that forks, one for all tests of this one; it ends when the returned end of a socket is closed."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, __file__, str(theirs.fileno())]
    # Its output is a pipe, as that of programs is: a stream that has begun as a file would be taken for one.
    process = subprocess.Popen(
        command,
        pass_fds=[theirs.fileno()],
        env=base_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    theirs.close()
    return ours, process


# -- the process that forks ----------------------------------------------------------------------------------------------


def _serve(requests: socket.socket) -> list[str]:
    """Fork for each request until there are no more; in a program's process, return its arguments."""
    for module in PRELOADED:
        importlib.import_module(module)
    assert threading.active_count() == 1, "a fork would lack the others"
    while True:
        text, ends, *_ = socket.recv_fds(requests, 1 << 16, 3)
        if not text:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            return _keep(*json.loads(text), *ends)
        for end in ends:
            os.close(end)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _keep(arguments: list[str], folder: str, variables: dict[str, str], out: int, errors: int, status: int) -> list[str]:
    """Fork the program and tell how it ends; in its process, return its arguments."""
    program = os.fork()
    if program:
        os.close(out)
        os.close(errors)
        code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        os.write(status, NUMBER.pack(code))
        os._exit(0)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    os.dup2(out, 1)
    os.dup2(errors, 2)
    os.write(status, NUMBER.pack(os.getpid()))
    for end in (out, errors, status):
        os.close(end)
    return arguments


def _run(arguments: list[str]) -> None:
    """What ``python ARGUMENTS`` does in the folder where it stands."""
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()
    if arguments[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.path[0] = os.getcwd()
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
