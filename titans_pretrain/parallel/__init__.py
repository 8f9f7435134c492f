"""Parallelism, applied from outside to single-device models; `apply.py` has the order."""
