"""Steps that are to make no update make none under any optimizer: weights, moments, and the steps after them."""

import pytest
import torch
from parity import case, fresh, global_batch

from titans_pretrain.checkpoint.state import take_snapshot
from titans_pretrain.data.reader import Batch
from titans_pretrain.parallel.apply import build_engine
from titans_pretrain.parallel.mesh import build_mesh, leave_mesh
from titans_pretrain.training.guard import FINE, NOT_FINITE, SPIKE


def losses(values: dict, harm: dict[int, float]) -> tuple[list[int], list[float], dict[str, torch.Tensor]]:
    """Verdicts and losses of ten steps, and what this rank would save after eight that were not harmed; harm: what the gradients of
    a step are multiplied by. A step that is harmed reads no row of its own, so that without it all would be the same."""
    config, model = fresh(values)
    mesh = build_mesh(config, torch.device("cpu"))
    torch.manual_seed(0)
    engine = build_engine(config, model, mesh)
    verdicts, found, saved, read = [], [], {}, 0
    for step in range(10):
        batch = global_batch(read, 4)
        read += step not in harm
        each = 4 // mesh.data.size
        own = slice(mesh.data.rank * each, (mesh.data.rank + 1) * each)
        batches = [Batch(*(x[own][i : i + 2] for x in batch)) for i in range(0, each, 2)]
        hooks = [
            p.register_hook(lambda g, by=harm[step]: g * by)
            for p in engine.model.parameters()
            if step in harm and p.requires_grad
        ]
        loss = engine.forward_backward(batches, engine.count(batches))
        engine.update(1e-3, loss)
        for hook in hooks:
            hook.remove()
        verdicts.append(int(engine.guard.verdict))
        if step not in harm:
            found.append(float(loss))
        if len(found) == 8 and not saved:
            tensors = take_snapshot(config, engine.model, engine.optimizer, {"step": step}).tensors
            saved = {name: tensor.clone() for name, tensor in tensors.items()}
    leave_mesh()
    return verdicts, found, saved


LAYOUTS = [
    {},
    {"zero_stage": 1},
    {"zero_stage": 1, "precision": "bf16"},
    {"zero_stage": 1, "offload_optimizer": True},
    {"zero_stage": 2},
    {"zero_stage": 2, "precision": "bf16"},
    {"zero_stage": 3},
    {"zero_stage": 3, "precision": "bf16"},
    {"optimizer": "muon", "ema": 0.9},
    {"optimizer": "muon", "ema": 0.9, "tp": 2},
    {"optimizer": "muon", "ema": 0.9, "zero_stage": 1, "precision": "bf16"},
    {"optimizer": "muon", "ema": 0.9, "zero_stage": 1, "offload_optimizer": True},
    {"optimizer": "muon", "ema": 0.9, "zero_stage": 2},
]
OF_TRAINING = {"precision", "optimizer", "ema"}
QUICK = ({}, {"zero_stage": 2})


@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=[] if x in QUICK else [pytest.mark.slow]) for x in LAYOUTS],
    ids=lambda x: "-".join(map(str, x.values())) or "plain",
)
def test_a_harmful_step_is_as_if_it_had_not_been(ranks, layout):
    changes = {f"{'train' if k in OF_TRAINING else 'parallel'}__{k}": v for k, v in layout.items()}
    values = case("lmm", model__layers=2, train__micro_batch=2, train__on_nan="skip", train__on_spike="skip", **changes)
    values["train"] |= {"warmup_steps": 0, "spike_window": 8, "spike_sigma": 100.0}
    harmed, clean = (ranks(2).run(losses, values, harm) for harm in ({5: 1e4, 6: float("nan")}, {}))
    for (verdicts, found, saved), (_, expected, kept) in zip(harmed, clean, strict=True):
        assert verdicts == [FINE] * 5 + [SPIKE, NOT_FINITE] + [FINE] * 3
        assert found == expected[:8]
        assert saved.keys() == kept.keys() and any(n.startswith("momentum_buffer.") for n in saved) == (
            "optimizer" in layout
        )
        for name, tensor in kept.items():
            assert torch.equal(saved[name], tensor), name
    assert clean[0][0] == [FINE] * 10
