"""The page on adding a variant, followed: its file and its line, and nothing else."""

import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from titans_pretrain import cli
from titans_pretrain.config import ModelConfig, load_config
from titans_pretrain.config.model import VARIANTS, MemoryConfig, Variant
from titans_pretrain.hf.model_card import model_card
from titans_pretrain.models import build_model
from titans_pretrain.models.state import tensors
from titans_pretrain.parallel.ring import LocalLink
from titans_pretrain.parallel.segments import SegmentedStage
from titans_pretrain.parallel.stage import Stage

ROOT = Path(__file__).parents[2]
SHAPE = dict(dim=16, layers=3, heads=4, kv_heads=2, vocab_size=40, window=6, persistent_tokens=2)


@pytest.fixture
def mix(monkeypatch):
    """The page's file as if it stood in titans_pretrain/models/, and its line in the registry."""
    text = (ROOT / "docs/adding-a-variant.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (line,) = re.findall(r'^ {4}"mix": (Variant\(.*\)),$', text, re.MULTILINE)
    module = ModuleType("titans_pretrain.models.mix")
    exec(code, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(VARIANTS, "mix", eval(line, {"Variant": Variant}))
    return module.MixBlock


def build(**options):
    torch.manual_seed(0)
    return build_model(ModelConfig("mix", memory=MemoryConfig(heads=2, chunk_size=4), **SHAPE | options)).double()


def sample(tokens, seed=1):
    return torch.randint(0, 40, (2, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pattern", [None, ["mix", "lmm", {"window": None}]])
def test_it_trains_splits_and_decodes(mix, pattern):
    model, x, y = build(pattern=pattern), sample(24), sample(24, seed=2)
    assert isinstance(model.layers[0], mix)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        losses.append(model(x, labels=y).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        whole = model(x)
        for cuts in ((0, 3, 4, 17, 24), range(25)):
            parts, state = [], None
            for start, stop in itertools.pairwise(cuts):
                out = model(x[:, start:stop], state=state)
                parts.append(out.logits)
                state = out.state
            torch.testing.assert_close(torch.cat(parts, 1), whole.logits)
            for a, b in zip(tensors(state), tensors(whole.state), strict=True):
                torch.testing.assert_close(a, b, check_dtype=False)


def test_it_runs_in_segments_and_from_the_meta_device(mix):
    model, x, y = build(), sample(24), sample(24, seed=2)
    positions = torch.arange(24).expand(2, -1)
    model(x, labels=y).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    stage = SegmentedStage(Stage(model, range(3)), LocalLink(), 3, "block")
    (stage(x, positions=positions, labels=y).sum() / y.numel()).backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n])
    with torch.device("meta"):
        model = build_model(model.config)
    model.to_empty(device="cpu").init_weights()
    assert all(p.isfinite().all() for p in model.parameters())


def test_commands_and_cards_know_it(mix, tmp_path, capsys):
    path = tmp_path / "mix.yaml"
    path.write_text("model: {variant: mix, dim: 64, layers: 4, heads: 2, vocab_size: 500, memory: {heads: 2}}\n")
    assert load_config(path).model.document_multiple == 16
    options = ["parallel.pp=2", "parallel.cp=2", "train.global_batch=16", "data.seq_len=128"]
    assert cli.main(["plan", str(path), "--processes", "4", *options]) == 0
    assert "layers 0-1, 2-3" in capsys.readouterr().out
    card = model_card(load_config(path).model, "float32", 1000, "")
    assert "attention beside a neural memory, summed" in card and "2 heads, window 2048" in card


def test_a_class_from_elsewhere_does_as_well(mix, monkeypatch):
    monkeypatch.setitem(VARIANTS, "mix", Variant(mix, "summed", memory=True, attention=True))
    assert isinstance(build().layers[1], mix)


def test_an_unknown_one_is_refused():
    with pytest.raises(ValueError, match="model.variant is 'mix'; legal are"):
        ModelConfig("mix")
