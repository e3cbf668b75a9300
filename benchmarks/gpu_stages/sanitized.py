"""Every kernel on small inputs, for compute-sanitizer to watch: `compute-sanitizer python -m gpu_stages.sanitized`."""

from __future__ import annotations

import torch

from gpu_stages.proof import CASES, launched


def main() -> None:
    for name, case in CASES.items():
        if case.dtype == torch.bfloat16:
            launched(case, "cuda")
            print(f"{name}: ran", flush=True)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
