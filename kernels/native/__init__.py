"""C++ kernels for CPUs: their sources, how they are compiled, and how they are called."""
