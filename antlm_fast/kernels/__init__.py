"""Path glue only: makes the top-level folder `kernels/` of a checkout importable as `antlm_fast.kernels`.

In a wheel the files lie here (setup.py copies them). In a checkout they lie in the sibling folder, which has no
`__init__.py` because a popular package is also called `kernels` and must never be shadowed. The pyproject.toml beside
that folder tells a checkout from site-packages, where the sibling may be that other package.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root / "kernels"))
