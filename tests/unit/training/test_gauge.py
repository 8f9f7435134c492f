"""Epochs and MFU of a step, against counts by hand."""

import pytest
import torch

from benchmarks.common import flop_counter
from titans_pretrain.config import Config, DataConfig, MemoryConfig, ModelConfig, TrainConfig
from titans_pretrain.models import build_model
from titans_pretrain.training import gauge
from titans_pretrain.training.gauge import Gauge, known_peak, model_flops


@pytest.fixture
def config():
    memory = MemoryConfig(heads=2, chunk_size=16)
    model = ModelConfig(dim=64, layers=2, heads=2, vocab_size=128, window=64, persistent_tokens=0, memory=memory)
    return Config(model=model, data=DataConfig(seq_len=64), train=TrainConfig(micro_batch=1, global_batch=4))


def test_mfu_is_flops_over_seconds_over_peak(config, monkeypatch):
    monkeypatch.setattr(gauge, "peak_flops", lambda device, precision: 1e9)
    read = Gauge(config, torch.device("cpu"), 2, corpus_tokens=400).read(0.5, [1], tokens=100)
    assert read == {"epochs": 0.25, "mfu": round(model_flops(config) * 4 * 64 / 0.5 / 2e9, 4)}
    assert read["mfu"] > 0.01


def test_mfu_is_absent_where_the_peak_is_unknown(config, monkeypatch):
    monkeypatch.setattr(gauge, "peak_flops", lambda device, precision: None)
    assert Gauge(config, torch.device("cpu"), 1, corpus_tokens=400).read(0.5, [1], tokens=100) == {"epochs": 0.25}


def test_the_flops_are_those_of_a_training_step_with_its_inner_loop(config):
    """Counted by torch; as much recomputed as the formula says, so within a few percent."""
    model = build_model(config.model)
    tokens = torch.randint(128, (1, 64))
    with flop_counter() as counted:
        model(tokens, labels=tokens).loss.backward()
    assert model_flops(config) * 64 == pytest.approx(counted.get_total_flops(), rel=0.1)
    config.model.memory = MemoryConfig(heads=2, chunk_size=16, depth=1)
    assert model_flops(config) < 0.9 * counted.get_total_flops() / 64  # the memory's share is in it


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 67e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L40", "bf16", None),
        ("Tesla V100", "bf16", None),
        ("", "bf16", None),
    ],
)
def test_the_peak_of_a_gpu_by_its_name(name, precision, peak):
    assert known_peak(name, precision) == peak


def test_measuring_a_cpu_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert gauge._measure(torch.float32) > 0
    assert torch.equal(before, torch.get_rng_state())
