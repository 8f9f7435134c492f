"""One training case, on one process and on many: what both must agree on."""

import contextlib
import gc
import itertools

import torch
import torch.distributed as dist

from titans_pretrain.config.load import from_dict
from titans_pretrain.data.reader import Batch, context_columns
from titans_pretrain.models import build_model
from titans_pretrain.parallel.apply import build_engine
from titans_pretrain.parallel.mesh import Mesh, build_mesh, leave_mesh

ROWS, TOKENS, VOCAB, STEPS = 4, 48, 64, 3
FLOAT32, FLOAT64 = 1e-5, 1e-9  # largest relative difference
CALM = {
    "model__memory__max_lr": 0.005,
    "train__eps": 1e-4,
}  # for float32: neither the inner loop nor Adam magnifies rounding

# Layers that differ: in kind, window and heads of keys and values; in chunk, memory depth and segment.
HYBRIDS = {
    "mag-lmm-transformer": {
        "pattern": ["mag", "lmm", {"variant": "transformer", "window": None}], "heads": 8, "kv_heads": 4, "qk_norm": True,
    },
    "mac-mal": {
        "pattern": ["mac", {"variant": "mal", "kv_heads": 4, "memory": {"chunk_size": 2, "depth": 1}}], "heads": 4,
    },
}  # fmt: skip


def case(variant: str = "mag", *, dtype: str = "float32", rows: int = ROWS, **changes) -> dict:
    """A config as nested dicts. variant: of all layers, or a key of HYBRIDS. changes: "group__key" = value."""
    values = {
        "model": {
            "dim": 32,
            "layers": 4,
            "heads": 4,
            "vocab_size": VOCAB,
            "window": 11,
            "persistent_tokens": 3,
            "memory": {"heads": 4, "chunk_size": 4, "expansion": 2.0},
            "mac": {"segment": 4},
            **HYBRIDS.get(variant, {"variant": variant}),
        },
        "data": {"seq_len": TOKENS},
        "train": {"micro_batch": 1, "global_batch": rows, "grad_clip": 0.5, "lr": 1e-3, "eps": 1e-6},
        "parallel": {},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        group = values
        for part in path:
            group = group.setdefault(part, {})
        group[last] = value
    return values | {"dtype": dtype}


def fresh(values: dict):
    """The config, and its model on the meta device."""
    config = from_dict({k: v for k, v in values.items() if k != "dtype"})
    with torch.device("meta"):
        return config, build_model(config.model).to(getattr(torch, values["dtype"]))


def global_batch(step: int, rows: int) -> Batch:
    """Packed documents that start on multiples of four, also across every cut of the sequence; padding; missing labels."""
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (rows, TOKENS), generator=g)
    labels = (tokens * 5 + 3 + tokens.roll(3, 1)) % VOCAB
    positions = torch.empty_like(tokens)
    for row in range(rows):
        cuts = [0, *sorted(4 * torch.randperm(TOKENS // 4 - 1, generator=g)[: row % 4].add(1)), TOKENS]
        for start, stop in itertools.pairwise(cuts):
            positions[row, start:stop] = torch.arange(int(stop - start))
            padding = row % 3
            if stop - start > 4 and padding:
                positions[row, stop - padding : stop] = -1
                labels[row, stop - padding : stop] = -100
        labels[row, row::7] = -100
    return Batch(tokens, labels, positions)


def micro_batches(config, step: int, data_rank: int = 0, data: int = 1, context_rank: int = 0, context: int = 1):
    """This rank's micro-batches of a step, as the reader would give them."""
    batch = global_batch(step, config.train.global_batch)
    k = config.parallel.segments_per_rank
    columns = torch.cat([torch.arange(r.start, r.stop) for r in context_columns(TOKENS, context_rank, context, k)])
    size = config.train.micro_batch
    found = []
    for start in range(data_rank * size, config.train.global_batch, size * data):
        found.append(Batch(*(x[start : start + size][:, columns].contiguous() for x in batch)))
    return found


def train_alone(values: dict) -> dict:
    """losses, norms, gradients of the first step (name -> tensor), weights at the end; each step in one pass over all rows."""
    whole = {"recompute": "none", "micro_batch": values["train"]["global_batch"]}
    plain = values | {"parallel": {}, "train": values["train"] | whole}
    config, model = fresh(plain)
    return _train(build_engine(config, model, Mesh(torch.device("cpu"))), config, None)


def train_parallel(values: dict) -> dict:
    """The same on one rank of many; tensors that this rank can tell, full-shape."""
    config, model = fresh(values)
    with running_engine(config, model) as (engine, mesh):
        return _train(engine, config, mesh)


def _train(engine, config, mesh) -> dict:
    found = {"losses": [], "norms": []}
    for step in range(STEPS):
        rate = config.train.lr * (1 - step / 10)  # not what the optimizer was made with
        batches = micro_batches(config, step, *_place(mesh))
        targets = engine.count(batches)
        loss = engine.forward_backward(batches, targets)
        found["losses"].append(float(loss))
        if mesh is None:
            if step == 0:
                found["gradients"] = {n: p.grad.clone() for n, p in engine.model.named_parameters()}
            found["norms"].append(float(engine.update(rate, loss)))
        else:
            engine.reduce_gradients()
            if step == 0:
                found["gradients"] = full_tensors(engine, mesh, _gradient)
            found["norms"].append(float(engine.step(rate, loss)))
    found["weights"] = (
        {n: p.detach().clone() for n, p in engine.model.named_parameters()}
        if mesh is None
        else full_tensors(engine, mesh, _weight)
    )
    batch = micro_batches(config, STEPS, *_place(mesh))
    found["validation"] = engine.evaluate(batch) / engine.count(batch)
    return found


def full_tensors(engine, mesh, read) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in engine.model.named_parameters():
        tensor = read(engine, p).detach().clone()
        if getattr(p, "tensor_model_parallel", False):
            parts = [torch.empty_like(tensor) for _ in range(mesh.tensor.size)]
            dist.all_gather(parts, tensor.contiguous(), group=mesh.tensor.group)
            tensor = torch.cat(parts, p.partition_dim)
        found[name] = tensor
    return found


def _gradient(engine, p) -> torch.Tensor:
    if engine.zero is None:
        return p.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(p)


def _weight(engine, p) -> torch.Tensor:
    if engine.zero is None:
        return p
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(p)


def worst(ours: list[dict], reference: dict, floor: bool = False) -> dict[str, float]:
    """Largest relative difference of each kind over all ranks; of tensors max |a - b| / max |b|.

    floor: a tensor counts as at least as large as the root mean square over all of its kind. For float32: the rounding of a sum
    over ranks is as large as what was summed, and Adam makes steps of full size of gradients that are nothing else."""
    scalars = {
        kind: max(
            abs(a - b) / abs(b) for rank in ours for a, b in zip(_list(rank[kind]), _list(reference[kind]), strict=True)
        )
        for kind in ("losses", "norms", "validation")
    }
    tensors = {}
    for kind in ("gradients", "weights"):
        expected = reference[kind]
        names = {n for rank in ours for n in rank[kind]}
        assert names == expected.keys(), names ^ expected.keys()
        least = torch.cat([t.flatten() for t in expected.values()]).square().mean().sqrt() if floor else 0.0
        tensors[kind] = max(
            float((t - expected[n]).abs().max() / max(expected[n].abs().max(), least))
            for rank in ours
            for n, t in rank[kind].items()
        )
    return scalars | tensors


def _list(x) -> list:
    return x if isinstance(x, list) else [x]


def run_and_save(values: dict, steps: int, run_dir) -> None:
    """On every rank: trains from the start and saves a checkpoint."""
    config, model = fresh(values)
    with running_engine(config, model) as (engine, mesh):
        for step in range(steps):
            _step(engine, config, step, mesh)
        _save(engine, config, steps, run_dir)


def resume_each(values: dict, checkpoints: list, steps: int, run_dir) -> list[dict]:
    """On every rank, for each checkpoint: loads it, saves at once under run_dir/NUMBER, and trains on: its losses and weights."""
    from titans_pretrain.checkpoint import load_checkpoint

    config, model = fresh(values)
    results = []
    with running_engine(config, model) as (engine, mesh):
        for number, checkpoint in enumerate(checkpoints):
            groups = engine.tensor_group, engine.data_group
            start = load_checkpoint(checkpoint, engine.model, engine.optimizer, *groups)["step"]
            _save(engine, config, start, run_dir / str(number))
            losses = [_step(engine, config, step, mesh) for step in range(start, start + steps)]
            _save(engine, config, start + steps, run_dir / str(number))
            results.append(losses)
    return results


def start_and_save(values: dict, checkpoint, run_dir) -> int:
    """On every rank: takes over a checkpoint's weights alone and saves at once; the optimizer's steps."""
    from titans_pretrain.checkpoint import load_initial, read_trainer

    config, model = fresh(values)
    with running_engine(config, model) as (engine, _):
        load_initial(checkpoint, engine.model, engine.optimizer, engine.tensor_group, engine.data_group)
        _save(engine, config, 0, run_dir)
    return read_trainer(run_dir / "checkpoints/step-00000000")["optimizer_steps"]


@contextlib.contextmanager
def running_engine(config, model):
    """The engine of this process, alone or among the ranks, and its mesh, None when alone."""
    if not dist.is_initialized():
        yield build_engine(config, model, Mesh(torch.device("cpu"))), None
        return
    mesh = build_mesh(config, torch.device("cpu"))
    engine = None
    try:
        engine = build_engine(config, model, mesh)
        yield engine, mesh
    finally:
        if engine is not None and engine.zero is not None:
            engine.zero.destroy()  # its hooks hold it, the model and the groups, where no collector finds them
        engine = None
        gc.collect()
        leave_mesh()


def _place(mesh) -> tuple:
    """Where this process reads: its data rank of how many, its context rank of how many."""
    return () if mesh is None else (mesh.data.rank, mesh.data.size, mesh.context.rank, mesh.context.size)


def _step(engine, config, step: int, mesh) -> float:
    batches = micro_batches(config, step, *_place(mesh))
    loss = engine.forward_backward(batches, engine.count(batches))
    engine.update(config.train.lr, loss)
    return float(loss)


def _save(engine, config, step: int, run_dir) -> None:
    from titans_pretrain.checkpoint import save_checkpoint

    numbers = {"step": step, "tokens": 0, "validated": 0, "reader": {}}
    save_checkpoint(run_dir, config, engine.model, engine.optimizer, numbers, engine.tensor_group)
