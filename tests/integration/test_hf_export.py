"""An exported run in a process where this package cannot be imported: the same logits, text and tokens."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from titans_pretrain.checkpoint import save_checkpoint
from titans_pretrain.config import Config, DataConfig, RunConfig
from titans_pretrain.config.model import VARIANTS, MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.data_prep.tokenizer import ByteTokenizer
from titans_pretrain.hf.export import export_checkpoint
from titans_pretrain.models import build_model

TEXT = "A memory that learns at test time; <|titans_eos|> is text here."
NEW = 10

# Loads every folder named on the command line, as a user would, and saves what came out.
USER = """
import sys

class NoTitans:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "titans_pretrain":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTitans())

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

text, new, results, *folders = sys.argv[1:]
out = {}
for folder in folders:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(text, return_tensors="pt")
    batch = tokenizer([text, text[:20]], return_tensors="pt", padding=True, padding_side="left")
    again = results + "-again"
    model.save_pretrained(again)
    again = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    with torch.no_grad():
        out[folder] = {
            "ids": inputs.input_ids,
            "logits": model.double()(**inputs).logits,
            "again": again.double()(**inputs).logits,
            "generated": model.generate(**inputs, max_new_tokens=int(new), min_new_tokens=int(new), do_sample=False),
            "batch": model.generate(**batch, max_new_tokens=int(new), min_new_tokens=int(new), do_sample=False),
            "problems": [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]],
            "half": AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)(**inputs).logits,
        }
assert not any(name.partition(".")[0] == "titans_pretrain" for name in sys.modules)
torch.save(out, results)
"""


QUICKSTART = Path(__file__).parents[2] / "scripts" / "quickstart.py"


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


HYBRID = [
    "mac",
    {"variant": "lmm", "memory": {"chunk_size": 8, "depth": 3}},
    {"variant": "transformer", "window": None},
]
KINDS = [*VARIANTS, "hybrid"]


def make_run(folder, variant):
    """A run folder with one checkpoint, as training leaves it, and its model."""
    own = (
        {"pattern": HYBRID, "layers": 3, "kv_heads": 1, "qk_norm": True}
        if variant == "hybrid"
        else {"variant": variant}
    )
    model_config = ModelConfig(
        **{"layers": 2} | own, dim=32, heads=2, vocab_size=260, window=12, persistent_tokens=3,
        tie_embeddings=variant != "mal", memory=MemoryConfig(heads=2, chunk_size=4), mac=MacConfig(segment=16),
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(model_config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 8, dtype=torch.int64), labels=torch.zeros(1, 8, dtype=torch.int64)).loss.backward()
    optimizer.step()
    config = Config(model=model_config, data=DataConfig(seq_len=64), run=RunConfig(name="demo", dir=str(folder)))
    ByteTokenizer().save(folder / "tokenizer")
    save_checkpoint(folder, config, model, optimizer, {"step": 7, "tokens": 0, "validated": 0, "reader": {}})
    return model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """{variant: (the trained model, what a user's process got from its export)}."""
    folder = tmp_path_factory.mktemp("hf")
    models = {variant: make_run(folder / f"run-{variant}", variant) for variant in KINDS}
    outs = {variant: export_checkpoint(folder / f"run-{variant}", folder / f"out-{variant}") for variant in KINDS}
    arguments = [TEXT, str(NEW), str(folder / "results.pt"), *map(str, outs.values())]
    command = [sys.executable, "-c", USER, *arguments]
    subprocess.run(command, check=True, env=environment(folder), cwd=folder, timeout=300)
    results = torch.load(folder / "results.pt")
    return {variant: (models[variant], results[str(outs[variant])]) for variant in KINDS}


@pytest.mark.parametrize("variant", KINDS)
@torch.no_grad()
def test_an_export_computes_what_was_trained(loaded, variant):
    model, got = loaded[variant]
    assert got["problems"] == []
    assert got["ids"].tolist()[0] == ByteTokenizer().encode(TEXT).tolist()
    exact = model.double()(got["ids"]).logits
    assert exact.std() > 0.5  # not the flat logits of a fresh model
    assert_close(got["logits"], exact, rtol=1e-10, atol=1e-10)
    assert_close(got["again"], exact, rtol=1e-10, atol=1e-10)
    assert (got["half"].double() - exact).square().mean().sqrt() < 0.1 * exact.std()


@pytest.mark.parametrize("variant", KINDS)
@torch.no_grad()
def test_an_export_generates_what_the_model_would(loaded, variant):
    model, got = loaded[variant]
    model, ids, state = model.double(), got["ids"], None
    out = model(ids)
    for _ in range(NEW):
        logits = out.logits[:, -1:]
        logits[..., 256] = float("-inf")  # min_new_tokens forbids the end
        ids = torch.cat((ids, logits.argmax(-1)), 1)
        state = out.state
        out = model(ids[:, -1:], state=state)
    assert torch.equal(got["generated"], ids)
    assert torch.equal(got["batch"][:1], ids)  # beside a shorter row
    assert got["batch"][1, -NEW - 1] == ByteTokenizer().encode(TEXT[:20])[-1]


@pytest.mark.slow
def test_the_quickstart_notices_an_export_that_forgets(tmp_path):
    make_run(tmp_path / "run", "mag")
    out = export_checkpoint(tmp_path / "run", tmp_path / "out")
    script = runpy.run_path(str(QUICKSTART))["GENERATE"]

    def complete() -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", script, str(out), TEXT]
        return subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), cwd=tmp_path)

    done = complete()
    assert done.returncode == 0 and len(done.stdout) > len(TEXT), done.stderr
    assert not any(word in done.stderr for word in ("Warning", "warning", "deprecated")), done.stderr
    code = (out / "modeling_titans.py").read_text()
    forgetful = code.replace("self._read(x, states, every", "self._read(x, None, every")
    assert forgetful != code
    (out / "modeling_titans.py").write_text(forgetful)
    done = complete()
    assert done.returncode == 1 and "error: without its cache the model says something else" in done.stderr
