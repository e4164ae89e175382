"""``vitexplain serve``."""

from __future__ import annotations

import importlib.util
import signal
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from .app import Backend, Device, Dtype, Failure, Model, Weights, app, guarded


@app.command()
def serve(
    model: Model = "demo",
    weights: Weights = None,
    host: Annotated[str, typer.Option(help="Where to listen; the default is reached from this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: any free one.")] = 7860,
    device: Device = "auto",
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
) -> None:
    """Serve a page on this machine: drop a photo, choose model, methods and class, and see the maps side by side.

    Nothing leaves the machine, apart from the download of a model that is asked for. Ctrl-C ends it.
    """
    guarded(lambda: _serve(model, weights, host, port, device, backend, dtype, open_page))


def _serve(
    model: str, weights: Path | None, host: str, port: int, device: str, backend: str, dtype: str, open_page: bool
) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise Failure("serve: the page needs gradio: pip install 'vitexplain[serve]'")
    from ..serve.address import check_address

    port = check_address(host, port)
    from ..explainer import BACKENDS
    from ..loading import dtype_named
    from ..serve.service import Service

    if backend not in BACKENDS:
        raise Failure(f"backend: expected one of {', '.join(BACKENDS)}, received {backend!r}")
    service = Service(model, weights, device, dtype=dtype_named(dtype), backend=backend)
    from ..serve.page import running

    with suppress(KeyboardInterrupt), _ended_by_signals(), running(service, host, port) as address:
        typer.echo(f"{model!r} is ready at {address} (Ctrl-C ends it)")
        if open_page:
            webbrowser.open(address)
        _wait()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A request to end and a terminal that is closed are as Ctrl-C, once: uploaded photos go in any case."""
    ending = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in ending}
    handled = [number for number in ending if before[number] != signal.SIG_IGN]  # as nohup has it

    def end(*_: object) -> None:
        for number in handled:
            signal.signal(number, lambda *_: None)  # a second one would interrupt what the first one began
        raise KeyboardInterrupt

    for number in handled:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


def _wait() -> None:
    while True:
        time.sleep(3600)
