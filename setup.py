"""Build glue that pyproject.toml cannot say: the top-level folder kernels/ is installed as antlm_fast.kernels.

Never imports torch. An editable install copies nothing: antlm_fast/kernels/__init__.py finds the folder.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

KERNELS = Path(__file__).parent / "kernels"


def kernel_files() -> list[Path]:
    """Sources under kernels/, relative to it."""
    return sorted(path.relative_to(KERNELS) for path in KERNELS.rglob("*.py"))


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for relative in kernel_files():
            target = Path(self.build_lib) / "antlm_fast" / "kernels" / relative
            self.mkpath(str(target.parent))
            self.copy_file(str(KERNELS / relative), str(target))


class SdistWithKernels(sdist):
    def make_distribution(self) -> None:
        self.filelist.extend(str(Path("kernels") / relative) for relative in kernel_files())
        super().make_distribution()


setup(cmdclass={"build_py": BuildWithKernels, "sdist": SdistWithKernels})
