"""Build glue that pyproject.toml cannot say: the top-level folder kernels/ is installed as antlm_fast.kernels.

Never imports torch. An editable install copies nothing: antlm_fast/kernels/__init__.py finds the folder.

The C++ kernels for CPUs are compiled where there is a compiler; without one the install goes on and `antlm-fast doctor`
says what is missing. ANTLM_FAST_NATIVE=0 leaves them out.

ANTLM_FAST_CUDA_ARCHS="80;90" compiles the Triton kernels for these GPUs while it builds (`antlm-fast prime`).
"""

import os
import platform
import re
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
KERNELS = ROOT / "kernels"
ARCHS = "ANTLM_FAST_CUDA_ARCHS"
MISSING = """
from importlib.util import find_spec
print(*(name for name in ("torch", "triton", "numpy", "safetensors") if find_spec(name) is None))
"""


NATIVE = "ANTLM_FAST_NATIVE"


def kernel_files() -> list[Path]:
    """Sources and tables of tiles under kernels/, relative to it."""
    found = (path for pattern in ("*.py", "*.json", "*.cpp", "*.h") for path in KERNELS.rglob(pattern))
    return sorted(path.relative_to(KERNELS) for path in found)


def builds_native() -> bool:
    return os.environ.get(NATIVE) != "0" and platform.system() == "Linux"


def compile_native(folder: Path) -> None:
    """The C++ kernels into a folder kernels/; a compiler that is missing or fails is told, and ends nothing."""
    if not builds_native():
        return
    native = runpy.run_path(str(KERNELS / "native" / "build.py"))
    try:
        print(f"compiled {native['build'](folder / 'native' / native['LIBRARY'])}", flush=True)
    except native["BuildError"] as error:
        print(f"the C++ kernels are left out, the others serve: {error}", file=sys.stderr, flush=True)


def prime(package_root: Path) -> None:
    """Compile the kernels of the package in that folder for the GPUs of ANTLM_FAST_CUDA_ARCHS; does nothing without it.

    Triton's cache is keyed by source and line, not by path, so what is compiled from here serves the installed package.
    """
    archs = [arch for arch in re.split(r"[;,\s]+", os.environ.get(ARCHS, "")) if arch]
    if not archs:
        return
    # pip isolates a build by these two variables: without them this very interpreter sees the packages of the
    # environment that is installed into
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    probe = [sys.executable, "-c", MISSING]
    missing = subprocess.run(
        probe, env=env, cwd=package_root, capture_output=True, text=True, check=True
    ).stdout.split()
    # SystemExit, because setuptools turns any Exception of an editable build into a warning
    if missing:
        raise SystemExit(
            f"{ARCHS} needs {', '.join(missing)} in {sys.prefix}: pip install {' '.join(missing)} first (and add "
            f"--no-build-isolation if that is not your environment), or unset it and run `antlm-fast prime` afterwards"
        )
    command = [sys.executable, "-m", "antlm_fast.cli", "prime", *(word for arch in archs for word in ("--arch", arch))]
    print(f"{ARCHS}: compiling Triton kernels for {', '.join(archs)}", flush=True)
    if subprocess.run(command, env=env | {"PYTHONPATH": str(package_root)}, cwd=package_root, check=False).returncode:
        raise SystemExit(f"{ARCHS}={os.environ[ARCHS]}: the kernels were not compiled; the line above says why")


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            compile_native(KERNELS)
            prime(ROOT)
            return
        for relative in kernel_files():
            target = Path(self.build_lib) / "antlm_fast" / "kernels" / relative
            self.mkpath(str(target.parent))
            self.copy_file(str(KERNELS / relative), str(target))
        compile_native(Path(self.build_lib) / "antlm_fast" / "kernels")
        prime(Path(self.build_lib).resolve())


class SdistWithKernels(sdist):
    def make_distribution(self) -> None:
        self.filelist.extend(str(Path("kernels") / relative) for relative in kernel_files())
        super().make_distribution()


class KernelsDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        """A wheel with machine code in it is one for this platform."""
        return builds_native()


class WheelOfAnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """The library is reached through pointers: every Python and every torch can load it."""
        *_, system = super().get_tag()
        return "py3", "none", system


setup(
    distclass=KernelsDistribution,
    cmdclass={"build_py": BuildWithKernels, "sdist": SdistWithKernels, "bdist_wheel": WheelOfAnyPython},
)
