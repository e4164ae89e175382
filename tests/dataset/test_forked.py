"""Programs that are forked behave as programs that are started do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from . import forked


def test_a_program_that_ends_before_its_number_is_read_has_its_own_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.read

    def late(descriptor: int, size: int) -> bytes:
        time.sleep(0.3)
        return read(descriptor, size)

    monkeypatch.setattr(os, "read", late)
    assert forked.start(["-c", "import os; os._exit(3)"], tmp_path).wait(30) == 3


def test_its_folder_variables_and_streams_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_LATER", "seen")
    program = "import os, sys; print(os.getcwd(), os.environ['SET_LATER'], os.environ['GIVEN']); print('to', file=sys.stderr)"
    done = forked.start(["-c", program], tmp_path, {"GIVEN": "too"})
    assert done.communicate(30) == (f"{tmp_path} seen too\n", "to\n")
    assert done.returncode == 0


def test_a_signal_ends_it_as_it_ends_any_program(tmp_path: Path) -> None:
    program = forked.start(["-c", "import time; print('up', flush=True); time.sleep(60)"], tmp_path)
    assert program.stdout.readline() == "up\n"
    program.send_signal(signal.SIGTERM)
    assert program.wait(30) == -signal.SIGTERM
