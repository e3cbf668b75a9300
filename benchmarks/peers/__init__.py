"""Kernels of the best-known form of an algorithm, compiled beside the package's own as a yardstick."""
