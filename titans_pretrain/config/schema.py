"""The one typed schema of a run: what a YAML file may hold, with its defaults. Standard library only."""

from dataclasses import dataclass, field
from typing import Any, Literal

from titans_pretrain.config.check import at_least, check_fields
from titans_pretrain.config.model import ModelConfig

CONFIG_VERSION = 2


@dataclass
class DataConfig:
    """What is read, and how it is cut into rows."""

    path: str | None = None  # folder that titans-data wrote
    seq_len: int = 4096  # tokens in a row
    mixture: dict[str, float] = field(default_factory=dict)  # folder -> weight, instead of `path`
    reset_documents: bool = True  # each document starts from the initial state; false concatenates them
    split_long_documents: bool = True  # cut documents wherever a row ends; false: only those longer than a row
    cache_dir: str | None = None  # where remote shards are kept
    on_bad_shard: Literal["stop", "skip"] = "stop"

    def __post_init__(self):
        check_fields(self, "data")
        at_least("data.seq_len", self.seq_len, 1)
        for path, weight in self.mixture.items():
            if not weight > 0:
                raise ValueError(f"data.mixture gives {path!r} the weight {weight}; weights must be positive")
        if self.path and self.mixture:
            raise ValueError("data.path and data.mixture are both set; give one of them")


@dataclass
class TrainConfig:
    """The optimisation (defaults: Titans section 5.1, with the clipping of the setup it follows)."""

    steps: int = 1000
    seed: int = 0
    lr: float = 4e-4  # peak of the schedule
    min_lr: float = 1e-5
    warmup_steps: int = 100  # linear, from lr / warmup_steps
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0  # largest global gradient norm; 0 switches clipping off
    micro_batch: int = 8  # rows in one forward pass
    global_batch: int = 8  # rows in one step; a multiple of micro_batch, the rest is accumulated
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: under autocast; with ZeRO bf16 parameters and float32 masters
    # What the backward pass runs again: nothing, each block from its input, or each segment of the sequence
    # (parallel.segments_per_rank) from the states that entered it.
    recompute: Literal["none", "block", "segment"] = "none"
    truncate_state_gradient_every: int | None = None  # tokens; no gradient through the state across these; null: exact
    device: Literal["auto", "cpu", "cuda"] = "auto"
    eval_every: int = 100  # steps between validations; 0: never
    eval_batches: int = 16  # micro-batches in one validation, always the same ones
    checkpoint_every: int = 200  # steps between checkpoints; 0: only the last step
    keep_checkpoints: int = 3  # newest ones kept; 0: all
    log_every: int = 10  # steps between printed lines; metrics.jsonl has every step
    on_nan: Literal["stop"] = "stop"
    resume: str = "auto"  # auto: the run's own newest checkpoint; never; or a folder to start from
    resume_data: bool = (
        True  # with resume=FOLDER; false: this run's data from the start, with FOLDER's weights, optimizer and step
    )
    init_from: str | None = (
        None  # a run or checkpoint folder whose weights a new run starts with, and nothing else of it
    )

    def __post_init__(self):
        check_fields(self, "train")
        for name in ("steps", "micro_batch", "global_batch", "eval_batches", "log_every"):
            at_least("train." + name, getattr(self, name), 1)
        for name in ("seed", "lr", "min_lr", "warmup_steps", "weight_decay", "eps", "grad_clip"):
            at_least("train." + name, getattr(self, name), 0)
        for name in ("eval_every", "checkpoint_every", "keep_checkpoints"):
            at_least("train." + name, getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.min_lr > self.lr:
            raise ValueError(f"train.min_lr={self.min_lr} is above train.lr={self.lr}; lower it")
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.global_batch={self.global_batch} must be a multiple of train.micro_batch={self.micro_batch}; "
                f"try {-(-self.global_batch // self.micro_batch) * self.micro_batch}"
            )
        if self.truncate_state_gradient_every is not None:
            at_least("train.truncate_state_gradient_every", self.truncate_state_gradient_every, 1)
        if not self.resume:
            raise ValueError("train.resume is empty; legal are auto, never, or a run or checkpoint folder")
        if self.resume in ("auto", "never") and not self.resume_data:
            raise ValueError(
                "train.resume_data=false needs train.resume=FOLDER and a new run.dir: a run goes on with its own data"
            )
        if self.resume not in ("auto", "never") and self.init_from is not None:
            raise ValueError(
                f"train.resume={self.resume} and train.init_from={self.init_from} are both set; give init_from for the weights "
                "alone, resume for the optimizer and the step too"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches in one step."""
        return self.global_batch // self.micro_batch


@dataclass
class ParallelConfig:
    """How the work is spread over processes: world size = dp * cp * tp * pp; dp is what the others leave."""

    tp: int = 1  # tensor parallel: heads, feed-forward and vocabulary
    pp: int = 1  # pipeline parallel: stages of consecutive layers
    cp: int = 1  # context parallel: the sequence
    segments_per_rank: int = 1  # k: the sequence is cut into k * cp segments; more give less idle time and less memory
    inflight: int = 1  # micro-batches in flight on a context-parallel ring before the first backward pass
    sequence_parallel: bool = False  # split the residual stream over tp between the sharded parts
    memory_split: Literal["heads", "hidden"] = "heads"  # what tp shards of a memory: heads, or the hidden size of each
    pipeline_schedule: Literal["1f1b", "interleaved"] = "1f1b"
    stages_per_rank: int = 1  # with interleaved: stages that each pipeline rank holds
    zero_stage: Literal[0, 1, 2, 3] = 0  # DeepSpeed ZeRO; 0 keeps the optimizer state whole on every rank
    offload_optimizer: bool = False  # ZeRO keeps its optimizer state in CPU memory
    timeout_minutes: float = 30.0  # ranks give up on one that does not answer after this long

    def __post_init__(self):
        check_fields(self, "parallel")
        for name in ("tp", "pp", "cp", "segments_per_rank", "inflight", "stages_per_rank"):
            at_least("parallel." + name, getattr(self, name), 1)
        if not self.timeout_minutes > 0:
            raise ValueError(f"parallel.timeout_minutes must be positive, got {self.timeout_minutes}")
        if (self.stages_per_rank > 1) != (self.pipeline_schedule == "interleaved"):
            raise ValueError(
                f"parallel.stages_per_rank={self.stages_per_rank} does not go with parallel.pipeline_schedule="
                f"{self.pipeline_schedule}: interleaved has 2 or more stages on a rank, 1f1b has 1"
            )
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("parallel.offload_optimizer needs parallel.zero_stage=1, 2 or 3")

    @property
    def segments(self) -> int:
        """Segments of a sequence, over all context-parallel ranks."""
        return self.cp * self.segments_per_rank


@dataclass
class RunConfig:
    name: str | None = None  # null: the name of the config file
    dir: str | None = None  # null: runs/NAME
    wandb: str | None = None  # a Weights & Biases project; offline unless WANDB_MODE says otherwise
    tensorboard: bool = False

    def __post_init__(self):
        check_fields(self, "run")


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # further DeepSpeed settings, as in its ds_config.json
    version: int = CONFIG_VERSION

    def __post_init__(self):
        check_fields(self)
        multiple = self.model.document_multiple
        if self.data.reset_documents and self.data.seq_len % multiple:
            source = "model.mac.segment" if self.model.layer(0).has_segments else "model.memory.chunk_size"
            if self.model.pattern is not None:
                source = "the least common multiple of the chunks and segments of model.pattern"
            below, above = self.data.seq_len // multiple * multiple, -(-self.data.seq_len // multiple) * multiple
            raise ValueError(
                f"data.seq_len={self.data.seq_len} must be a multiple of {source}={multiple}, where documents may start; "
                f"try {f'{below} or {above}' if below else above}, or data.reset_documents=false"
            )
        self._check_segments()

    def _check_segments(self) -> None:
        """The cuts of the sequence: segments of equal length, each starting where documents may."""
        parts, multiple, total = self.parallel.segments, self.model.document_multiple, self.data.seq_len
        if parts > 1 and total % (parts * multiple):
            unit = parts * multiple
            above = -(-total // unit) * unit
            raise ValueError(
                f"data.seq_len={total} must divide into parallel.cp={self.parallel.cp} * parallel.segments_per_rank="
                f"{self.parallel.segments_per_rank} segments, each a multiple of {multiple} (the memory's chunk, for mac its "
                f"segment); try data.seq_len={above}"
            )
        every = self.train.truncate_state_gradient_every
        if every is not None and every % (total // parts):
            raise ValueError(
                f"train.truncate_state_gradient_every={every} must be a multiple of a segment's {total // parts} tokens "
                f"(data.seq_len / (cp * segments_per_rank)); raise parallel.segments_per_rank to truncate more often"
            )
