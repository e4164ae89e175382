"""How processes that decode are started; it loads nothing heavy, so that they can begin while the rest is loading."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import signal
from multiprocessing.context import BaseContext

_PRELOADED = "vitexplain.dataset.loader"  # imported once, not once a process


def process_context() -> BaseContext:
    """Processes that share no lock and no thread with this one, which may hold a GPU."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED])
    return context


def start_early() -> None:
    """Have what starts processes import what they need while there is other work to do."""
    if process_context().get_start_method() != "forkserver":
        return
    multiprocessing.resource_tracker.ensure_running()  # which would undo the following
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C would show where its imports are
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
