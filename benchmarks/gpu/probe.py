"""One small case in a process of its own, for one assembler: `python -m benchmarks.gpu.probe --device cuda` prints a JSON line.

First the compiler's probe (transposed.py), then a small memory scan, of whose outputs and gradients the bits are printed, so that two assemblers can be
compared. compute-sanitizer runs this file too."""

import argparse
import importlib.util
import json
import os

import torch

from benchmarks.gpu.harness import digest, gradients, scan_call, served_backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    found: dict[str, object] = {"ptxas": os.environ.get("TRITON_PTXAS_PATH", "triton's own")}
    if importlib.util.find_spec("triton") and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        from benchmarks.gpu.transposed import transposed_operand

        found["transposed_operand_error"] = transposed_operand(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = dict(depth=2, expansion=1, chunk=16, batch=1, tokens=49, heads=2, dtype=dtype)
    call, leaves = scan_call(device, **shape)
    found["backend"] = served_backend(call)
    found["digest"] = digest(gradients(call, leaves))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
