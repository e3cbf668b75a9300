"""An installed package holds the kernels, and never mistakes another package called kernels for them."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package as setup.py lays it out for a wheel, in a folder that plays site-packages."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("site-packages")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    # the C++ kernels take a minute to compile, and are tested where the package is installed
    subprocess.run(command, cwd=ROOT, env=os.environ | {"ANTLM_FAST_NATIVE": "0"}, check=True, capture_output=True)
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


def kernel_files(folder):
    """What the kernels are made of: sources and tables of tiles."""
    patterns = ("*.py", "*.json", "*.cpp", "*.h")
    return {path.relative_to(folder) for pattern in patterns for path in folder.rglob(pattern)}


def test_a_wheel_holds_every_kernel_file(installed):
    sources = kernel_files(ROOT / "kernels")
    assert {Path("attention/tiles.json"), Path("native/attention.cpp"), Path("native/simd.h")} <= sources
    assert kernel_files(installed / "antlm_fast" / "kernels") == sources | {Path("__init__.py")}
    # what an exported model needs to be loaded elsewhere
    for name in ("configuration", "layers", "modeling"):
        assert (installed / "antlm_fast" / "models" / f"{name}_antlm_bert.py").is_file()
    assert not (installed / "kernels").exists()  # a wheel with a top-level kernels would overwrite the other package


def test_an_sdist_holds_every_kernel_file(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"  # setuptools builds an sdist in the folder it is run in
    for folder in ("antlm_fast", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=source, check=True, capture_output=True)
    with tarfile.open(next((source / "dist").glob("*.tar.gz"))) as archive:
        names = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert {Path("kernels") / path for path in kernel_files(ROOT / "kernels")} <= names


@pytest.fixture
def setup_py(monkeypatch):
    """What setup.py defines."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def prime(setup_py):
    """setup.py's function that compiles the Triton kernels while it builds."""
    return setup_py["prime"]


def test_the_demo_is_silent_while_it_compiles_and_opens_with_a_warning_of_torch(tmp_path):
    """What make would do in a new environment. torch warns where numpy is missing, which comes after it."""
    command = ["make", "--dry-run", "demo", f"VENV={tmp_path / 'new'}", f"PYTHON={sys.executable}"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    install = next(number for number, line in enumerate(lines) if "--editable" in line)
    assert "compiling its C++ kernels" in lines[install - 1]
    asking = [line for line in lines if "torch.__" in line]
    assert len(asking) == 2
    assert all("-W ignore" in line for line in asking)


@pytest.mark.skipif(sys.platform != "linux", reason="the C++ kernels are built on Linux")
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "no-such-compiler cannot be run"), ("false", "false failed on cpu.cpp")],
)
def test_without_a_compiler_that_works_the_install_goes_on(setup_py, tmp_path, monkeypatch, capfd, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    setup_py["compile_native"](tmp_path)
    assert capfd.readouterr().err.startswith(f"the C++ kernels are left out, the others serve: {reason}")
    assert not list(tmp_path.rglob("*.so"))
    monkeypatch.setenv("ANTLM_FAST_NATIVE", "0")
    setup_py["compile_native"](tmp_path)
    assert not capfd.readouterr().err


def test_the_library_is_made_of_the_sources_beside_it(tmp_path):
    build = pytest.importorskip("antlm_fast.kernels.native.build")
    for path in (*build.FOLDER.glob("*.cpp"), *build.FOLDER.glob("*.h")):
        shutil.copy(path, tmp_path)
    assert build.sources_hash(tmp_path) == build.sources_hash()
    (tmp_path / "simd.h").write_text("// changed\n")
    assert build.sources_hash(tmp_path) != build.sources_hash()
    library = tmp_path / "library.so"
    assert not build.is_current(library)
    library.write_bytes(b"..." + build.sources_hash().encode() + b"...")
    assert build.is_current(library)


def test_a_build_that_shall_compile_kernels_says_what_is_missing(prime, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setattr("sys.executable", str(bare / "bin" / "python"))
    monkeypatch.delenv("ANTLM_FAST_CUDA_ARCHS", raising=False)
    prime(ROOT)  # nobody asked for anything
    monkeypatch.setenv("ANTLM_FAST_CUDA_ARCHS", "80;90")
    with pytest.raises(SystemExit) as stopped:
        prime(ROOT)
    message = str(stopped.value)
    assert message.startswith("ANTLM_FAST_CUDA_ARCHS needs torch, triton, numpy, safetensors in ")
    assert "pip install torch triton numpy safetensors first" in message
    assert "run `antlm-fast prime` afterwards" in message


def test_a_build_compiles_the_kernels_for_the_gpus_it_is_told(prime, installed, tmp_path, monkeypatch, capfd):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ANTLM_FAST_CUDA_ARCHS", "90")
    prime(installed)
    told = capfd.readouterr().out
    assert told.startswith("ANTLM_FAST_CUDA_ARCHS: compiling Triton kernels for 90\n")
    assert f"4 kernels in {tmp_path}: 4 compiled, 0 were there" in told
    # the same kernels in another folder: the checkout
    command = [sys.executable, "-m", "antlm_fast.cli", "prime", "--arch", "90"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"4 kernels in {tmp_path}: 0 compiled, 4 were there" in again.stdout
    monkeypatch.setenv("ANTLM_FAST_CUDA_ARCHS", "70")
    with pytest.raises(SystemExit, match="ANTLM_FAST_CUDA_ARCHS=70: the kernels were not compiled"):
        prime(installed)
    assert "antlm-fast: arch must be one of sm_80" in capfd.readouterr().err


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
