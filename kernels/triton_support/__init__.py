"""What every Triton kernel of the package shares; no mathematics."""
