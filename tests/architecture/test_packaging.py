"""An installed package holds the kernels, and never mistakes another package called kernels for them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package as setup.py lays it out for a wheel, in a folder that plays site-packages."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("site-packages")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def run(code, folder):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_wheel_holds_every_kernel_file(installed):
    sources = {path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*.py")}
    home = installed / "antlm_fast" / "kernels"
    assert {path.relative_to(home) for path in home.rglob("*.py")} == sources | {Path("__init__.py")}
    assert not (installed / "kernels").exists()  # a wheel with a top-level kernels would overwrite the other package


def test_the_installed_kernels_are_the_ones_that_run(installed):
    code = "import antlm_fast.kernels.attention as a; print(a.__file__)"
    assert run(code, installed) == str(installed / "antlm_fast" / "kernels" / "attention" / "__init__.py")


def test_another_package_called_kernels_stays_itself(installed, tmp_path):
    folder = tmp_path / "site-packages"
    shutil.copytree(installed, folder)
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("name = 'the other one'\n")
    code = "import antlm_fast.kernels as ours, kernels; print(len(ours.__path__), kernels.name)"
    assert run(code, folder) == "1 the other one"


def test_a_checkout_finds_the_folder_beside_the_package():
    code = "import antlm_fast.kernels.attention as a; print(a.__file__)"
    assert run(code, ROOT) == str(ROOT / "kernels" / "attention" / "__init__.py")
