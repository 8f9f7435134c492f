"""doctor on machines that this one is not: known faults, with what to do; and which kernels it would run."""

import json
import os
from dataclasses import replace

import pytest
import torch

from titans_pretrain import cli
from titans_pretrain.commands import doctor as command
from titans_pretrain.commands import machine
from titans_pretrain.commands.machine import Gpu, Machine, Ptxas, faults
from titans_pretrain.kernels.backends import Backend
from titans_pretrain.kernels.memory_scan import contract

HOPPER, AMPERE, BLACKWELL = Gpu("H100", (9, 0), 80), Gpu("A100", (8, 0), 80), Gpu("B200", (10, 0), 180)
LAPTOP = Machine("3.11", "Linux", 2, 1, "2.13.0", packages={"triton": "3.6.0"}, ptxas=Ptxas("/t/ptxas", "12.8.93"))
HEALTHY = replace(LAPTOP, gpus=(HOPPER,), packages={"triton": "3.7.1"}, ptxas=Ptxas("/t/ptxas", "13.3.33"))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (LAPTOP, []),
        (HEALTHY, []),
        (replace(HEALTHY, packages={"triton": "3.3.1"}), []),
        (replace(HEALTHY, packages={"triton": "3.4.0"}), ["transposed_operand"]),
        (replace(HEALTHY, packages={"triton": "3.6.0+git1"}), ["transposed_operand"]),
        (replace(HEALTHY, packages={"triton": "3.7.0"}), ["transposed_operand"]),
        (replace(HEALTHY, packages={"triton": "3.7"}), ["transposed_operand"]),
        (replace(HEALTHY, packages={"triton": None}), []),
        (replace(HEALTHY, gpus=(AMPERE,), packages={"triton": "3.6.0"}), []),
        (replace(HEALTHY, ptxas=Ptxas("/t/ptxas", "13.0.88")), ["wgmma_registers"]),
        (replace(HEALTHY, ptxas=Ptxas("/t/ptxas", "13.1.80")), []),
        (replace(HEALTHY, gpus=(AMPERE,), ptxas=Ptxas("/t/ptxas", "12.8.93")), []),
        (replace(HEALTHY, ptxas=None), []),
        (replace(HEALTHY, ptxas=Ptxas("/gone", None)), ["unusable_ptxas"]),
        (replace(HEALTHY, ptxas_variable=""), ["empty_ptxas_path"]),
        (replace(HEALTHY, ptxas_variable="/t/ptxas"), []),
        (replace(HEALTHY, gpus=(BLACKWELL,)), ["unproven_generation"]),
        (replace(HEALTHY, gpus=(AMPERE, BLACKWELL)), ["unproven_generation"]),
    ],
)
def test_known_faults(found, expected):
    assert list(faults(found)) == expected
    assert all("\n" not in told for told in faults(found).values())


def test_a_fault_says_what_to_do():
    old = replace(HEALTHY, ptxas=Ptxas("/t/ptxas", "12.8.93"), newer_ptxas="/site/nvidia/cu13/bin/ptxas")
    assert faults(old)["wgmma_registers"].endswith("export TRITON_PTXAS_PATH=/site/nvidia/cu13/bin/ptxas")
    assert "pip install 'nvidia-cuda-nvcc" in faults(replace(old, newer_ptxas=None))["wgmma_registers"]


def test_the_version_is_that_of_the_file_triton_would_take(tmp_path, monkeypatch):
    fake = tmp_path / "ptxas"
    fake.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.1, V13.1.80'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(fake))
    if machine._ptxas() is not None:  # where triton is installed
        assert machine._ptxas() == Ptxas(str(fake), "13.1.80")
    assert machine.ptxas_version(str(fake)) == "13.1.80"
    assert machine.ptxas_version(str(tmp_path / "none")) is None


def test_the_exit_code_and_the_lines_of_a_fault(monkeypatch, capsys):
    monkeypatch.setattr(command, "this_machine", lambda: replace(LAPTOP, ptxas_variable=""))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "TRITON_PTXAS_PATH is set and empty" in out and out.endswith("not healthy: see FAILED and FAULT above\n")


def test_json(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["slurm"] == "in job 17" and found["torch"] == torch.__version__
    assert found["faults"] == {} and not any(found["checks"].values())
    assert {"memory_scan", "sliding_window_attention", "causal_conv", "linear_cross_entropy"} <= set(found["backends"])
    assert found["disk_free_gib"] > 0 and found["cores"] == len(os.sched_getaffinity(0))


def test_the_backends_are_read_from_the_kernels_lists(monkeypatch):
    """Those that others add are found, and why they are not taken."""
    new = Backend("new", print, lambda **_: "q: this is not its day")
    monkeypatch.setattr(contract, "SCAN", (new, *contract.SCAN))
    name, why = command.chosen_backends("cpu")["memory_scan"]
    assert name == "chunked" and why.startswith("not new: q: this is not its day; not triton: ")


def test_a_kernel_that_fails_is_told(monkeypatch, capsys):
    def broken(**_):
        raise RuntimeError("ptxas fatal: no such thing")

    monkeypatch.setattr(contract, "SCAN", (Backend("broken", broken), *contract.SCAN))
    assert cli.main(["doctor"]) == 1
    assert "FAILED: RuntimeError: ptxas fatal: no such thing" in capsys.readouterr().out


def test_the_check_of_a_gpu_runs_on_what_training_gives_it():
    """On a CPU, where the same calls are legal."""
    assert command.check_training_scan("cpu") == ""
    assert 1e-8 < max(command.scan_errors("cpu", torch.bfloat16, 2, 64, 256)) < 2e-2  # it rounds
