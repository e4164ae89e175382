"""``vitexplain serve`` at the terminal: what it refuses, the address it prints, and how it ends."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vitexplain.cli import app
from vitexplain.cli import serve as command

pytestmark = pytest.mark.xdist_group("serve")  # one process, which loads gradio once


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["serve", *arguments])


@pytest.fixture
def ended_by(monkeypatch) -> dict[str, object]:
    """The server ends, soon after it stands, by the signal under ``"signal"``; ``"page"`` is then what it served."""
    found: dict[str, object] = {"signal": signal.SIGINT}
    wait = command._wait

    def wait_for_signal() -> None:
        with urllib.request.urlopen(str(found["address"])) as answer:
            found["page"] = answer.read().decode()
        threading.Timer(0.2, os.kill, (os.getpid(), found["signal"])).start()
        wait()

    def echo(text: str) -> None:
        found["address"] = re.search(r"http://\S+", text).group()

    monkeypatch.setattr(command, "_wait", wait_for_signal)
    monkeypatch.setattr(command.typer, "echo", echo)
    return found


ENDS = {"ctrl-c": "SIGINT", "terminated": "SIGTERM", "terminal-closed": "SIGHUP"}


@pytest.mark.parametrize(
    "end", [pytest.param(getattr(signal, name), id=label) for label, name in ENDS.items() if hasattr(signal, name)]
)
def test_it_says_where_it_is_and_ends_cleanly(ended_by, monkeypatch, tmp_path, end: signal.Signals) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended_by["signal"] = end
    before = signal.getsignal(end)
    result = _run("--port", "0")
    assert signal.getsignal(end) is before
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert ended_by["address"].startswith("http://127.0.0.1:")
    assert "vitexplain" in ended_by["page"]
    assert list(tmp_path.glob("vitexplain_serve_*")) == []


def test_an_address_of_ipv6(ended_by) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"needs IPv6 on this machine: {error}")
    result = _run("--port", "0", "--host", "::1")
    assert result.exit_code == 0, result.output
    assert ended_by["address"].startswith("http://[::1]:")
    assert "vitexplain" in ended_by["page"]


def test_what_is_to_outlive_its_terminal_does() -> None:
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is None:
        pytest.skip("needs SIGHUP, which this system has not")
    before = signal.signal(hangup, signal.SIG_IGN)  # as nohup does
    try:
        with command._ended_by_signals():
            assert signal.getsignal(hangup) is signal.SIG_IGN
    finally:
        signal.signal(hangup, before)


def test_the_page_is_opened_where_that_is_asked_for(ended_by, monkeypatch) -> None:
    opened = []
    monkeypatch.setattr(command.webbrowser, "open", opened.append)
    assert _run("--port", "0", "--open").exit_code == 0
    assert opened == [ended_by["address"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "port: expected 0 to 65535, received 70000"),
        (["--host", "not a host"], "host: there is none called 'not a host' here"),
        (["--model", "vit_tinny_patch16_224"], "unknown model .*did you mean"),
        (["--weights", "none.pth"], "weights: there is no file 'none.pth'"),
        (["--backend", "tritn"], "backend: expected one of .*received 'tritn'"),
        (["--dtype", "float8"], "dtype: expected one of .*received 'float8'"),
        (["--device", "tpu"], "device: expected one that is available here"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line_before_it_starts(monkeypatch, arguments: list[str], message: str) -> None:
    monkeypatch.setattr(command, "_wait", lambda: pytest.fail("it started"))
    result = _run("--port", "0", *arguments)
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert re.match(f"error: {message}", line)


def test_a_port_that_is_taken(monkeypatch) -> None:
    monkeypatch.setattr(command, "_wait", lambda: pytest.fail("it started"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = _run("--port", str(taken.getsockname()[1]))
    assert result.exit_code == 1
    assert re.fullmatch(r"error: port: cannot listen at 127\.0\.0\.1:\d+: .*in use; try another --port\n", result.stderr)


def test_without_the_extra_it_names_what_to_install(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest))
    result = _run()
    assert result.exit_code == 1
    assert result.stderr == "error: serve: the page needs gradio: pip install 'vitexplain[serve]'\n"


def test_help_and_a_bad_port_load_neither_torch_nor_gradio() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from vitexplain.cli import app; "
        "run = lambda *a: CliRunner().invoke(app, ['serve', *a]).exit_code; "
        "assert (run('--help'), run('--port', '-1')) == (0, 1); "
        "print(sorted({'torch', 'gradio', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.stdout == "[]\n", done.stderr
