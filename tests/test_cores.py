"""How threads wait is chosen by what others do on the cores, and a user's own word stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from antlm_fast import cores

STAT = """cpu  0 0 0 0 0 0 0 0 0 0
cpu0 {busy0} 0 0 {idle0} 0 0 0 0 0 0
cpu1 0 0 {busy1} 0 {idle1} 0 0 0 0 0
cpu2 900 0 0 0 0 0 0 0 0 0
intr 5
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose third core is not ours; `watched` says what the first two did."""
    monkeypatch.setattr(cores, "_STAT", tmp_path / "stat")
    monkeypatch.setattr(cores, "my_cores", lambda: {0, 1})
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def watched(monkeypatch: pytest.MonkeyPatch, busy0: int, busy1: int) -> None:
    cores._STAT.write_text(STAT.format(busy0=100, idle0=100, busy1=100, idle1=100))
    later = STAT.format(busy0=100 + busy0, idle0=200 - busy0, busy1=100 + busy1, idle1=200 - busy1)
    monkeypatch.setattr(cores.time, "sleep", lambda seconds: cores._STAT.write_text(later))


@pytest.mark.usefixtures("machine")
def test_threads_spin_on_idle_cores_and_sleep_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    environ: dict[str, str] = {}
    watched(monkeypatch, 3, 10)
    assert cores.busy_cores() == pytest.approx(0.13)
    watched(monkeypatch, 3, 10)
    assert cores.choose_waiting(environ) is None
    assert environ == {}
    watched(monkeypatch, 75, 50)
    assert cores.choose_waiting(environ) == (
        "note: 1.2 of 2 cores are busy, so threads sleep while they wait "
        "(OMP_WAIT_POLICY=passive; set OMP_WAIT_POLICY to choose)"
    )
    assert environ == {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    "own", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "5"}, {"KMP_BLOCKTIME": "0"}, {"OMP_NUM_THREADS": "1"}]
)
def test_a_users_own_settings_stand(own: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    watched(monkeypatch, 100, 100)
    environ = dict(own)
    assert cores.choose_waiting(environ) is None
    assert environ == own


@pytest.mark.usefixtures("machine")
def test_a_system_that_does_not_tell_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    environ: dict[str, str] = {}
    assert cores.busy_cores(0.0) is None
    assert cores.choose_waiting(environ) is None
    monkeypatch.setattr(cores, "my_cores", lambda: {0, 7})  # not in the table
    watched(monkeypatch, 100, 100)
    assert cores.busy_cores() is None
    assert environ == {}


def test_the_runtime_that_torch_loads_sees_the_choice() -> None:
    """OpenMP reads its settings once, so the command line chooses before it imports torch."""
    code = (
        "import sys; from antlm_fast import cli, cores; assert 'torch' not in sys.modules;"
        "cores.busy_cores = lambda: 1.5; cores.my_cores = lambda: {0, 1}; sys.exit(cli.main(['doctor']))"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env=plain | {"OMP_DISPLAY_ENV": "true"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "note: 1.5 of 2 cores are busy" in shown.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown.stderr
    assert "threads wait by OMP_WAIT_POLICY=passive" in shown.stdout
