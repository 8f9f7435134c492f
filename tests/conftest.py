import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # before a test imports transformers: no test looks for a network
if not shutil.which("nvidia-smi"):
    # Triton kernels are interpreted. Its own functions are too, as chosen when triton is imported, by whichever library: so it is
    # said here, before any test is collected, and the kernels' tests run in the ordinary test processes.
    os.environ["TRITON_INTERPRET"] = "1"
