"""What the backend refuses, and that "auto" leaves the interpreter alone."""

import re
from types import SimpleNamespace

import pytest
import torch
from scan_cases import arguments, make, run, states
from scan_compared import DEVICE, inputs

from titans_pretrain.kernels.backends import choose
from titans_pretrain.kernels.memory_scan import HiddenSplit, memory_scan
from titans_pretrain.kernels.memory_scan.contract import SCAN
from titans_pretrain.kernels.memory_scan.options import ScanOptions
from titans_pretrain.kernels.memory_scan.triton import entry

interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter")


def refused(message, x, depth=2, **options):
    with pytest.raises(ValueError, match=f"^memory_scan: backend=triton cannot serve {message}"):
        run(x, depth, "triton", **options)


def test_shapes_without_a_row_are_named():
    sizes = dict(dim=16, hidden=16)
    refused("chunk_size=8: it has depth 1 or 2", inputs(3, 2, **sizes), chunk_size=8)
    refused("chunk_size=96", inputs(3, 2, **sizes), chunk_size=96)
    refused(
        "state: depth 2, head size 16, hidden size 48; it has depth 1", inputs(3, 2, dim=16, hidden=48), chunk_size=16
    )
    refused("state: depth 2, head size 24", inputs(3, 2, dim=24, hidden=24), chunk_size=16)
    refused("state: depth 3", inputs(3, 3, **sizes), 3, chunk_size=16)
    refused("state: it is torch.float64", make(3, 2, device=DEVICE, **sizes), chunk_size=16)


def test_a_split_memory_is_refused():
    x = inputs(3, 2, dim=16, hidden=16)
    split = HiddenSplit(2, torch.clone, torch.clone)
    with pytest.raises(ValueError, match="hidden_split: it holds a whole memory"):
        memory_scan(*arguments(x), states(x, 2)[0], chunk_size=16, backend="triton", hidden_split=split)


@pytest.mark.parametrize(
    ("capability", "shared", "told"),
    [
        ((7, 5), 64, r"q: .* capability 8.0 to 9.0, and cuda:0 has \(7, 5\)"),
        ((8, 0), 163, None),
        ((8, 9), 99, "state: depth 2, head size 128 takes 120 KiB of shared memory, and cuda:0 has 99"),
        ((9, 0), 227, None),
        ((10, 0), 227, r"q: .* capability 8.0 to 9.0, and cuda:0 has \(10, 0\)"),
    ],
)
def test_a_gpu_that_a_program_does_not_fit_is_refused(monkeypatch, capability, shared, told):
    monkeypatch.setattr(entry, "_capability", lambda device: capability)
    monkeypatch.setattr(entry, "_shared_memory", lambda device: shared)
    state, _ = states(inputs(1, 2, dim=128, hidden=128, heads=1, batch=1), 2)
    q = SimpleNamespace(device=torch.device("cuda", 0), shape=torch.Size([1, 1, 1, 128]))
    found = entry.refuses_read(q=q, state=state, hidden_split=HiddenSplit(1, torch.clone, torch.clone))
    assert found is None if told is None else re.fullmatch(told, found)


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    refused(
        re.escape("any call: its kernels need triton; pip install 'titans-pretrain[gpu]'"),
        inputs(3, 2, dim=16),
        chunk_size=16,
    )


@interpreted
def test_auto_is_for_cuda(monkeypatch):
    x = inputs(3, 2, dim=16, hidden=16)
    state, _ = states(x, 2)
    options = ScanOptions(16)
    call = dict(q=x["q"], state=state, options=options, hidden_split=HiddenSplit(1, torch.clone, torch.clone))
    assert choose("memory_scan", SCAN, "triton", call).name == "triton"
    assert choose("memory_scan", SCAN, "auto", call).name == "chunked"
    monkeypatch.delenv("TRITON_INTERPRET")
    refused("q: it is on cpu, and the kernels are for cuda", x, chunk_size=16)
