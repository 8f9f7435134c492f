"""A state in a file: the same to the bit, and of one model only."""

import dataclasses

import pytest
import torch

from titans_pretrain.config.model import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.models import build_model
from titans_pretrain.models.rows import stack_rows
from titans_pretrain.models.state import tensors
from titans_pretrain.models.state_file import fingerprint, load_state, save_state

CONFIG = ModelConfig(
    pattern=["mac", "lmm", {"variant": "transformer", "window": None}], layers=3, dim=16, heads=2, vocab_size=40, window=6,
    memory=MemoryConfig(heads=2, chunk_size=4), mac=MacConfig(segment=8),
)  # fmt: skip


def build(seed=0):
    torch.manual_seed(seed)
    return build_model(CONFIG).eval()


def key(model, config=CONFIG):
    return fingerprint(config, model.state_dict())


@pytest.mark.parametrize("lengths", [(6,), (8,), (3, 6, 8)], ids=str)
@torch.no_grad()
def test_a_state_comes_back_to_the_bit(lengths, tmp_path):
    model, after = build(), torch.ones(len(lengths), 1, dtype=torch.int64)
    states = [model(torch.arange(n)[None]).state for n in lengths]
    state = stack_rows(states) if len(states) > 1 else states[0]
    save_state(tmp_path / "state", state, key(model))
    read = load_state(tmp_path / "state", key(build()))  # another process, which has the same model
    assert read.ragged == state.ragged and len(tensors(read)) < len(tensors(state))  # the initial memory is not in it
    assert torch.equal(model(after, state=read).logits, model(after, state=state).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@torch.no_grad()
def test_another_models_state_is_refused(tmp_path):
    model = build()
    save_state(tmp_path / "state", model(torch.zeros(1, 5, dtype=torch.int64)).state, key(model))
    faster = dataclasses.replace(
        CONFIG, attention_backend="reference", memory=dataclasses.replace(CONFIG.memory, backend="chunked")
    )
    assert key(model, faster) == key(model)
    other = dataclasses.replace(CONFIG, rope_theta=1e6)
    for wrong in (key(build(1)), key(model, other), key(model.bfloat16())):
        with pytest.raises(ValueError, match="was read by another model"):
            load_state(tmp_path / "state", wrong)


def test_another_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no state file"):
        load_state(tmp_path / "gone", "")
    (tmp_path / "text").write_text("no tensors in here")
    with pytest.raises(ValueError, match="damaged, or no state file"):
        load_state(tmp_path / "text", "")
    save_file({"x": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="holds no state of a Titans model"):
        load_state(tmp_path / "weights", "")
    for structure in ('{"kind": "Path"}', '{"kind": "ModelState", "layers": [], "position": {"tensor": "y"}}', "["):
        save_file({"x": torch.zeros(2)}, tmp_path / "odd", {"titans_state": "1", "model": "m", "structure": structure})
        with pytest.raises(ValueError, match="damaged, or no state file"):
            load_state(tmp_path / "odd", "m")
