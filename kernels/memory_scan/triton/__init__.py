"""The chunked scan in Triton kernels: the mathematics of README.md one folder up, tile by tile."""
