"""One process trains in a run folder: two would cut each other's files."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from antlm_fast.types import InputError


@contextlib.contextmanager
def hold(run_folder: Path) -> Iterator[None]:
    """Makes the folder and holds it while this is open. The lock goes with the process.

    What fails before the run has its config.json leaves no folder and no lock behind.

    Raises:
        InputError: another process holds it, or this one was started beside others by torchrun.
    """
    processes = os.environ.get("WORLD_SIZE") or "1"
    if processes != "1":
        raise InputError(
            f"training must have one process, on one device; got WORLD_SIZE={processes}, as torchrun sets it (start "
            "antlm-fast by itself, or unset WORLD_SIZE)"
        )
    made = [path for path in (run_folder, *run_folder.parents) if not path.exists()]
    run_folder.mkdir(parents=True, exist_ok=True)
    lock = run_folder / ".lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # not one that its holder has removed in the meantime
            held = lock.exists() and lock.stat().st_ino == os.fstat(file.fileno()).st_ino
        except BlockingIOError:
            held = False
        if not held:
            raise InputError(
                f"run folder {run_folder} must have one process at a time; another trains in it (a run is one process: "
                "start it once, not by srun or mpirun for several)"
            )
        try:
            yield
        finally:
            if not (run_folder / "config.json").exists():
                lock.unlink()
                with contextlib.suppress(OSError):  # a folder that holds something stays
                    for path in made:
                        path.rmdir()
