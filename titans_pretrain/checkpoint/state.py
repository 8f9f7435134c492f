"""What a checkpoint holds: logical, full-shape tensors by parameter name, random states, and the trainer's few numbers.

weights/        torch.distributed.checkpoint: "model.NAME" (parameters, float32 where an optimizer has masters, and persistent
                buffers; a tied tensor once); of trained parameters "exp_avg.NAME" and "exp_avg_sq.NAME", or Muon's
                "momentum_buffer.NAME", and "ema.NAME" where the weights are averaged; metadata.json
rng.pt          random states of torch, CUDA, numpy and Python
trainer.json    step, tokens, the reader's cursor, optimizer steps
config.yaml     the resolved config
SHA256SUMS      of all these files

The names and shapes are those of the model on one device, whatever layout wrote them: a sharded tensor is written in pieces and
read in others. Every rank writes its part, and reads what it needs; what several need, one of them reads (spread.py).
"""

import copy
import io
import json
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from titans_pretrain.checkpoint.checksums import SUMS, check_files, hash_files, write_sums
from titans_pretrain.checkpoint.metadata import Reader, Writer
from titans_pretrain.checkpoint.optimizer_states import AVERAGE, states_of
from titans_pretrain.checkpoint.store import (
    begin_folder,
    checkpoint_name,
    drop_folder,
    find_checkpoint,
    finish_folder,
    make_folder,
    point_latest,
    prune_checkpoints,
    temporary_folder,
)
from titans_pretrain.checkpoint.together import (
    DamagedCheckpoint,
    agreed_group,
    from_all,
    rank,
    reading,
    together,
    world,
)
from titans_pretrain.config import Config, load_run_config, save_config

FORMAT_VERSION = 3  # 2: a pickle in the place of weights/metadata.json, and no checksums
OLDEST_VERSION = 2
WEIGHTS = "weights"
_NUMBERS = {"version": int, "step": int, "tokens": int, "validated": int, "optimizer_steps": int, "reader": dict}


def save_checkpoint(
    run_dir: str | Path, config: Config, model: nn.Module, optimizer, trainer: dict, tensor_group=None
) -> Path:
    """Writes RUN/checkpoints/step-N; see take_snapshot and write_snapshot. Makes the folder."""
    prepare(Path(run_dir))
    return write_snapshot(Path(run_dir), take_snapshot(config, model, optimizer, trainer, tensor_group))


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold of this process."""

    config: Config
    numbers: dict  # the trainer's
    rng: dict
    tensors: dict[str, Tensor]


def take_snapshot(
    config: Config, model: nn.Module, optimizer, trainer: dict, tensor_group=None, staging: Callable | None = None
) -> Snapshot:
    """model: this rank's parameters under their global names; optimizer: torch's or a DeepSpeed engine; trainer: JSON-able, with
    the number of finished steps as "step"; tensor_group: ranks over which parameters marked `tensor_model_parallel` are cut;
    staging(name, tensor) -> a copy, finished by staging.finish(). None: the tensors themselves, to be written before they change.
    Collective."""
    states, trained = states_of(optimizer), _trained(model)

    def own(name: str, tensor: Tensor) -> Tensor:
        return tensor if staging is None else staging(name, tensor)

    tensors = _untrained(model, tensor_group, own)
    for kind, name, tensor in states.tensors(trained):
        key = _key(kind, name)
        tensors[key] = _global(tensor if states.copies else own(key, tensor), trained[name], tensor_group)
    if staging is not None:
        staging.finish()
    numbers = {"version": FORMAT_VERSION, **trainer, "optimizer_steps": states.steps()}
    return Snapshot(copy.deepcopy(config), copy.deepcopy(numbers), _rng_states(), tensors)


def prepare(run_dir: Path) -> None:
    """Makes RUN/checkpoints. It is made once: where it is missing later, what lies at RUN is another disk than that of the run."""
    if rank() == 0:
        make_folder(run_dir / "checkpoints")


def write_snapshot(run_dir: Path, snapshot: Snapshot) -> Path:
    """Writes RUN/checkpoints/step-N whole or not at all, points `latest` at it and clears old ones away.

    With several processes all call it, and it raises on all or none: OSError (disk full, no permission, RUN/checkpoints gone),
    with every earlier checkpoint untouched."""
    step, train = snapshot.numbers["step"], snapshot.config.train
    target = run_dir / "checkpoints" / checkpoint_name(step)
    folder = temporary_folder(target)
    writing = partial(
        together,
        f"step {step}: cannot write {target}",
        "earlier checkpoints are untouched: see to room, permission and mount there, then give the same command again",
        undo=partial(drop_folder, target),
    )
    with writing():
        if rank() == 0:
            if not target.parent.is_dir():
                raise FileNotFoundError(f"{target.parent} was there and is gone (has its disk been unmounted?)")
            begin_folder(target)
    with writing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process, and whatever its own calls are warned of
        dcp.save(
            snapshot.tensors,
            storage_writer=Writer(folder / WEIGHTS),
            no_dist=world() == 1,
            process_group=agreed_group(),
        )
    sums = {}
    with writing():
        sums = hash_files(folder, (folder / WEIGHTS).glob(f"__{rank()}_*"))
    sums = {name: value for told in from_all(sums) for name, value in told.items()}
    with writing():
        if rank() == 0:
            torch.save(snapshot.rng, folder / "rng.pt")
            save_config(snapshot.config, folder / "config.yaml")
            (folder / "trainer.json").write_text(json.dumps(snapshot.numbers, indent=1))
            write_sums(folder, sums)
            finish_folder(target)
            point_latest(target)
            prune_checkpoints(target.parent, train.keep_checkpoints, train.keep_every, train.keep_best)
    return target


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer, tensor_group=None, data_group=None, *, checked: bool = False
) -> dict:
    """Puts a checkpoint of any layout back into a model, its optimizer and the random generators; returns the trainer's numbers. An
    average of the weights that it does not have starts with the weights.

    See take_snapshot for the arguments; data_group: ranks with the same parameters, which read them once; checked: its files
    have been compared with their checksums. With several processes all call it, and it raises on all or none: ValueError for a
    checkpoint that does not fit, DamagedCheckpoint (a ValueError) that names the file, OSError for one that cannot be read."""
    if not checked:
        check_files(checkpoint)
    trainer = read_trainer(checkpoint)
    _take_over(checkpoint, model, optimizer, tensor_group, data_group, trainer["optimizer_steps"])
    with reading(checkpoint):
        _set_rng_states(checkpoint / "rng.pt")
    return trainer


def load_initial(
    checkpoint: Path, model: nn.Module, optimizer, tensor_group=None, data_group=None, *, checked: bool = False
) -> None:
    """Puts the weights alone of a checkpoint of any layout into a model, and its optimizer where that of a new run starts.
    Arguments and errors as of load_checkpoint."""
    if not checked:
        check_files(checkpoint)
    read_trainer(checkpoint)
    _take_over(checkpoint, model, optimizer, tensor_group, data_group, None)


def _take_over(checkpoint: Path, model: nn.Module, optimizer, tensor_group, data_group, steps: int | None) -> None:
    """steps: finished ones of the optimizer. None: the weights alone, and the rest as before a first step."""
    trained, states = _trained(model), states_of(optimizer, data_group)
    kinds = {} if steps is None else {name: states.kinds(p) for name, p in trained.items()}
    averaged = _check_fit(checkpoint, model, kinds, tensor_group)

    def read(kind: str, tensors: dict[str, Tensor]) -> None:
        if kind == AVERAGE and not averaged:
            kind = "weight"
        if kind == "weight" or steps is not None:
            _read(checkpoint, {_key(kind, n): _global(t, trained[n], tensor_group) for n, t in tensors.items()})
        else:
            for tensor in tensors.values():
                tensor.zero_()

    with reading(checkpoint):
        states.load(trained, steps or 0, read)
        _read(checkpoint, _untrained(model, tensor_group))


def load_model(path: str | Path, average: bool = False) -> tuple[nn.Module, Config]:
    """The model of a run or checkpoint folder, in evaluation mode, and its config. average: with the average of its weights
    (`train.ema`); ValueError where there is none."""
    from titans_pretrain.models import build_model

    checkpoint = find_checkpoint(path)
    config = load_run_config(checkpoint)
    with torch.device("meta"):
        model = build_model(config.model)
    load_weights(checkpoint, model.to_empty(device="cpu"), average=average)
    return model.eval(), config


def load_weights(checkpoint: Path, model: nn.Module, tensor_group=None, average: bool = False) -> None:
    """Copies a checkpoint's parameters, or their average, and its buffers into `model`; every one must be there and fit."""
    check_files(checkpoint)
    read_trainer(checkpoint)
    trained = _trained(model)
    _check_fit(checkpoint, model, {}, tensor_group)
    with reading(checkpoint):
        there = any(name.startswith(f"{AVERAGE}.") for name in _entries(checkpoint))
    if average and not there:
        raise ValueError(f"{checkpoint} has no average of the weights: its run was trained with train.ema=0")
    kind = AVERAGE if average else "weight"
    tensors = {_key(kind, n): _global(p.data, p, tensor_group) for n, p in trained.items()}
    with reading(checkpoint):
        _read(checkpoint, tensors | _untrained(model, tensor_group))


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole: "model.NAME", and the optimizer's as "exp_avg.NAME"."""
    check_files(checkpoint)
    with reading(checkpoint):
        tensors = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in _entries(checkpoint).items()}
        _read(checkpoint, tensors)
    return tensors


def read_trainer(checkpoint: Path) -> dict:
    """The trainer's numbers. Raises ValueError for a format that is not read here, DamagedCheckpoint where they are none."""
    path = checkpoint / "trainer.json"
    try:
        trainer = json.loads(path.read_bytes())
        odd = [n for n, kind in _NUMBERS.items() if type(trainer[n]) is not kind or (kind is int and trainer[n] < 0)]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise DamagedCheckpoint(f"{path} is damaged: it does not hold a trainer's numbers ({e!r})") from e
    if odd:
        raise DamagedCheckpoint(f"{path} is damaged: {odd[0]} is {trainer[odd[0]]!r}")
    version = trainer["version"]
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{checkpoint} has format version {version}, this titans-pretrain reads up to {FORMAT_VERSION}; update it"
        )
    if version < OLDEST_VERSION:
        raise ValueError(
            f"{checkpoint} has format version {version}, written before checkpoints crossed layouts; this titans-pretrain "
            f"reads versions {OLDEST_VERSION} to {FORMAT_VERSION}: go on from it with the version that wrote it"
        )
    if version > OLDEST_VERSION and not (checkpoint / SUMS).exists():
        raise DamagedCheckpoint(f"{checkpoint / SUMS} is not there, so nothing says whether the checkpoint is whole")
    return trainer


def check_checkpoint(checkpoint: Path) -> int | None:
    """Compares a checkpoint's files with their checksums and reads what describes them; how many files, None where it has no
    checksums (format version 2). Collective, with errors as of check_files, and ValueError for another format."""
    files = check_files(checkpoint)
    read_trainer(checkpoint)
    with reading(checkpoint):
        _entries(checkpoint)
    return files


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; tensors that share memory appear under their first name only."""
    first_names: dict[int | str, str] = {}
    state = model.state_dict()
    return {n: t for n, t in state.items() if first_names.setdefault(t.data_ptr() or n, n) == n}


def _key(kind: str, name: str) -> str:
    return f"{'model' if kind == 'weight' else kind}.{name}"


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def _untrained(model: nn.Module, tensor_group, own: Callable = lambda name, tensor: tensor) -> dict[str, Tensor]:
    """What no optimizer has: the other parameters, and persistent buffers. own(name, tensor): what is taken of each."""
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    tensors = {n: _global(own(n, p.data), p, tensor_group) for n, p in frozen.items()}
    tensors |= {n: own(n, t) for n, t in _buffers(model).items()}
    return {_key("weight", n): t for n, t in tensors.items()}


def _global(tensor: Tensor, p: nn.Parameter, tensor_group) -> Tensor:
    """This rank's tensor of a parameter as a piece of the logical one; shares its memory."""
    if tensor_group is None or not getattr(p, "tensor_model_parallel", False) or tensor_group.size() == 1:
        return tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(tensor_group, tensor.device.type)
    return DTensor.from_local(tensor, mesh, [Shard(p.partition_dim)], run_check=False)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers."""
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    return {n: t for n, t in model.state_dict().items() if n not in parameters and isinstance(t, Tensor)}


def _entries(checkpoint: Path) -> dict:
    """Name -> size and dtype of every tensor of a checkpoint."""
    return Reader(checkpoint / WEIGHTS).read_metadata().state_dict_metadata


def _read(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fills the tensors in place. Each process reads for itself: pipeline stages need different ones."""
    if not tensors:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=Reader(checkpoint / WEIGHTS), no_dist=True)


def _check_fit(checkpoint: Path, model: nn.Module, kinds: dict[str, Sequence[str]], tensor_group) -> bool:
    """Raises ValueError, on all ranks, unless every tensor of the model is there, in the same shape, and, in one process, no other.
    kinds: what is wanted of a parameter, the weight alone where it is not in it. Returns whether an average of the weights is both
    there and wanted: either may do without."""
    wanted = {}
    for name, p in model.named_parameters():
        shape = list(getattr(p, "ds_shape", p.shape))
        if getattr(p, "tensor_model_parallel", False) and tensor_group is not None:
            shape[p.partition_dim] *= tensor_group.size()
        for kind in kinds.get(name, ("weight",)):
            wanted[_key(kind, name)] = shape
    wanted |= {_key("weight", name): list(t.shape) for name, t in _buffers(model).items()}
    with reading(checkpoint):
        there = {name: list(entry.size) for name, entry in _entries(checkpoint).items()}
    averaged = all(any(name.startswith(f"{AVERAGE}.") for name in names) for names in (there, wanted))
    names = set(wanted)
    if world() == 1:
        names |= {n for n in there if n.startswith("model.") or kinds}
    if not averaged:
        names = {n for n in names if not n.startswith(f"{AVERAGE}.")}
    odd = {n: (there.get(n), wanted.get(n)) for n in names if there.get(n) != wanted.get(n)}
    odd = {n: shapes for found in from_all(odd) for n, shapes in found.items()}
    if odd:
        first = min(odd, key=lambda n: (not n.startswith("model."), n))
        has, needs = ("no such tensor" if shape is None else shape for shape in odd[first])
        raise ValueError(
            f"{checkpoint} does not fit the model: {len(odd)} tensors differ, the first is {first.removeprefix('model.')} "
            f"({has} there, {needs} here)"
        )
    return averaged


def _rng_states() -> dict:
    kind, keys, *rest = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def _set_rng_states(path: Path) -> None:
    content = io.BytesIO(path.read_bytes())
    try:
        states = torch.load(content, weights_only=True)
        torch.set_rng_state(states["torch"])
        if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states["cuda"])
        numpy.random.set_state(states["numpy"])
        random.setstate(states["python"])
    except Exception as e:  # whatever torch and numpy say of bytes that may be anything
        raise DamagedCheckpoint(f"{path} is damaged, or no random states ({type(e).__name__})") from e
