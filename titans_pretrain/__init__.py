from pathlib import Path

# Installed, kernels/ and data_prep/ stand in this folder. In the repository they stand beside it, and kernels/ has no __init__.py:
# as a regular package it would hide the Hugging Face package `kernels` from whoever runs Python at the repository's root.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))
