"""The one typed schema of a run: what a YAML file may hold, with its defaults. Standard library only."""

from dataclasses import dataclass, field
from typing import Any, Literal

from titans_pretrain.config.check import at_least, check_fields, setting
from titans_pretrain.config.model import VARIANTS, ModelConfig
from titans_pretrain.config.schedules import check_mixtures, check_warmup, check_weights, sum_until, value_at

CONFIG_VERSION = 3


@dataclass
class DataConfig:
    """What is read, and how it is cut into rows."""

    path: str | None = setting(None, "folder that titans-data wrote, or a URL or pipe: command")
    seq_len: int = setting(
        4096, "tokens in a row; a multiple of the chunk (mac: segment) unless reset_documents is false"
    )
    seq_len_warmup: list[list[int]] = setting(
        list,
        "[[STEP, TOKENS], ...]: after so many steps rows are cut into rows of so many tokens, a divisor of seq_len; from "
        "[0, TOKENS] to [STEP, seq_len]",
    )
    mixture: dict[str, float] = setting(dict, "{FOLDER: WEIGHT, ...} instead of path")
    mixture_schedule: list[list[Any]] = setting(
        list, "[[TOKENS, {FOLDER: WEIGHT, ...}], ...]: what the mixture becomes once so many tokens were read"
    )
    reset_documents: bool = setting(True, "each document starts from the initial state; false concatenates them")
    split_long_documents: bool = setting(
        True, "documents are cut wherever a row ends; false: only those longer than a row"
    )
    cache_dir: str | None = setting(None, "where remote shards are kept")
    on_bad_shard: Literal["stop", "skip"] = setting("stop", "skip goes on without a shard that stays unreadable")

    def __post_init__(self):
        check_fields(self, "data")
        at_least("data.seq_len", self.seq_len, 1)
        check_warmup("data.seq_len_warmup", self.seq_len_warmup, "data.seq_len", self.seq_len)
        for length in self.lengths:
            if self.seq_len % length:
                raise ValueError(
                    f"data.seq_len_warmup has {length} tokens, which do not divide data.seq_len={self.seq_len}"
                )
        if self.mixture:
            check_weights("data.mixture", self.mixture)
        check_mixtures("data.mixture_schedule", self.mixture_schedule)
        if self.mixture_schedule and not self.mixture:
            raise ValueError("data.mixture_schedule changes data.mixture, which is not set; give {FOLDER: WEIGHT, ...}")
        if self.path and self.mixture:
            raise ValueError("data.path and data.mixture are both set; give one of them")

    @property
    def lengths(self) -> list[int]:
        """Of the rows of a run, in order."""
        return [length for _, length in self.seq_len_warmup] or [self.seq_len]

    def length_at(self, steps: int) -> int:
        """Tokens in a row after so many steps."""
        return value_at(self.seq_len_warmup, steps, self.seq_len)

    @property
    def folders(self) -> list[str]:
        """All that are ever read."""
        mixtures = [self.mixture, *(weights for _, weights in self.mixture_schedule)]
        return list(dict.fromkeys(folder for weights in mixtures for folder in weights)) or [self.path] * bool(
            self.path
        )


@dataclass
class TrainConfig:
    """The optimisation (defaults: Titans section 5.1, with the clipping of the setup it follows)."""

    steps: int = setting(1000, "optimizer steps")
    seed: int = setting(0, "of the initial weights and the order of the data")
    lr: float = setting(4e-4, "peak learning rate")
    min_lr: float = setting(1e-5, "learning rate of the last step")
    warmup_steps: int = setting(100, "linear warm-up, from lr / warmup_steps")
    schedule: Literal["cosine", "wsd", "constant"] = setting(
        "cosine", "after the warm-up; wsd: lr until the last decay_steps, which go down to min_lr"
    )
    decay_steps: int = setting(0, "with schedule=wsd: the last steps, in which the learning rate falls")
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "muon: Muon for the hidden matrices, at AdamW's learning rate and decay, and AdamW for all else"
    )
    weight_decay: float = setting(0.1, "of matrices that multiply activations, and of nothing else")
    beta1: float = setting(0.9, "of AdamW")
    beta2: float = setting(0.95, "of AdamW")
    eps: float = setting(1e-8, "of AdamW")
    muon_momentum: float = setting(0.95, "of Muon")
    ema: float = setting(0.0, "decay of a moving average of the weights, e.g. 0.999, kept beside them; 0: none")
    grad_clip: float = setting(1.0, "largest global gradient norm; 0: no clipping")
    micro_batch: int = setting(8, "rows in one forward pass")
    global_batch: int = setting(8, "rows in one step, a multiple of micro_batch")
    batch_warmup: list[list[int]] = setting(
        list,
        "[[STEP, ROWS], ...]: after so many steps a step has so many rows, each a multiple of micro_batch; from [0, ROWS] to "
        "[STEP, global_batch]",
    )
    precision: Literal["fp32", "bf16"] = setting(
        "fp32", "bf16: autocast over float32 parameters; with zero_stage bfloat16 parameters with float32 masters"
    )
    recompute: Literal["none", "block", "segment"] = setting(
        "none",
        "what the backward pass runs again: each block from its input, or each segment from the states that entered it",
    )
    compile: bool = setting(False, "torch.compile of every block; the first step takes longer")
    truncate_state_gradient_every: int | None = setting(
        None, "tokens; no gradient passes through the state across these boundaries of segments; null: exact"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes a GPU if there is one")
    eval_every: int = setting(100, "steps between validations; 0: never")
    eval_batches: int = setting(16, "micro-batches in one validation, always the same ones")
    checkpoint_every: int = setting(200, "steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = setting(3, "newest ones kept; 0: all")
    keep_every: int = setting(0, "steps; checkpoints of their multiples are kept for ever; 0: none")
    keep_best: int = setting(0, "checkpoints with the lowest validation loss that are kept as well")
    checkpoint_async: bool = setting(
        False, "training goes on while a checkpoint is written, from a copy of the state in CPU memory"
    )
    checkpoint_store: str | None = setting(
        None,
        "a URL of an object store (s3://BUCKET/RUN, whatever fsspec knows) or a folder, where every checkpoint is copied in the "
        "background; a run folder without a checkpoint goes on from there",
    )
    health_every: int = setting(
        100,
        "steps between looks at every memory layer (gates, drift, surprise; not with compile) and at the norms of groups of "
        "parameters, in metrics.jsonl; 0: none",
    )
    log_every: int = setting(
        10, "steps between printed lines, and on a GPU between looks at the loss; metrics.jsonl has every step"
    )
    on_nan: Literal["stop", "skip", "rollback"] = setting(
        "stop",
        "what a loss or gradient norm that is not finite does; skip: the step makes no update; rollback: likewise, and "
        "rollback_after of them in a row go back to the weights of the newest checkpoint",
    )
    on_spike: Literal["ignore", "stop", "skip", "rollback"] = setting(
        "ignore", "what a loss or gradient norm far above the latest ones does; as on_nan"
    )
    spike_sigma: float = setting(6.0, "a spike is so many standard deviations above the mean")
    spike_window: int = setting(128, "of the latest steps; none is a spike before there are half as many")
    rollback_after: int = setting(3, "steps in a row without an update, before a rollback")
    resume: str = setting(
        "auto", "auto: the run's own newest checkpoint; never; or the folder or URL of another run to start from"
    )
    resume_data: bool = setting(
        True, "with resume=FOLDER; false: this run's data from the start, with FOLDER's weights, optimizer and step"
    )
    init_from: str | None = setting(
        None,
        "a run, checkpoint or exported folder, or the URL of a run or checkpoint, whose weights a new run starts with, and nothing else of it",
    )

    def __post_init__(self):
        check_fields(self, "train")
        for name in ("steps", "micro_batch", "global_batch", "eval_batches", "log_every", "rollback_after"):
            at_least("train." + name, getattr(self, name), 1)
        at_least("train.spike_window", self.spike_window, 4)
        if not self.spike_sigma > 0:
            raise ValueError(f"train.spike_sigma must be positive, got {self.spike_sigma}")
        if self.schedule == "wsd" and not 0 < self.decay_steps <= self.steps:
            raise ValueError(
                f"train.schedule=wsd needs train.decay_steps in 1 ... {self.steps}, got {self.decay_steps}"
            )
        if self.schedule != "wsd" and self.decay_steps:
            raise ValueError(f"train.decay_steps={self.decay_steps} goes with train.schedule=wsd, not {self.schedule}")
        for name in ("seed", "lr", "min_lr", "warmup_steps", "weight_decay", "eps", "grad_clip"):
            at_least("train." + name, getattr(self, name), 0)
        for name in ("eval_every", "checkpoint_every", "keep_checkpoints", "keep_every", "keep_best", "health_every"):
            at_least("train." + name, getattr(self, name), 0)
        for name in ("beta1", "beta2", "muon_momentum", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.min_lr > self.lr:
            raise ValueError(f"train.min_lr={self.min_lr} is above train.lr={self.lr}; lower it")
        check_warmup("train.batch_warmup", self.batch_warmup, "train.global_batch", self.global_batch)
        for key, batch in self.batches:
            if batch % self.micro_batch:
                raise ValueError(
                    f"{key}={batch} must be a multiple of train.micro_batch={self.micro_batch}; "
                    f"try {-(-batch // self.micro_batch) * self.micro_batch}"
                )
        if self.truncate_state_gradient_every is not None:
            at_least("train.truncate_state_gradient_every", self.truncate_state_gradient_every, 1)
        if self.checkpoint_store == "":
            raise ValueError("train.checkpoint_store is empty; give a URL or a folder, or null for none")
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
        """Micro-batches in one step, after the warm-up."""
        return self.global_batch // self.micro_batch

    @property
    def batches(self) -> list[tuple[str, int]]:
        """Rows of the steps of a run, and the keys that say so."""
        return [
            ("train.global_batch", self.global_batch),
            *(("train.batch_warmup", n) for _, n in self.batch_warmup[:-1]),
        ]

    def batch_at(self, steps: int) -> int:
        """Rows of the step after so many."""
        return value_at(self.batch_warmup, steps, self.global_batch)

    def rows_until(self, steps: int) -> int:
        """Rows of the first so many steps together."""
        return sum_until(self.batch_warmup, steps, self.global_batch)


@dataclass
class ParallelConfig:
    """How the work is spread over processes: world size = dp * cp * tp * pp; dp is what the others leave."""

    tp: int = setting(1, "tensor parallel: heads, feed-forward part and vocabulary")
    pp: int = setting(1, "pipeline parallel: stages of consecutive layers")
    cp: int = setting(1, "context parallel: the sequence")
    segments_per_rank: int = setting(
        1, "k: the sequence is cut into k * cp equal segments, multiples of the chunk (mac: of its segment)"
    )
    inflight: int = setting(1, "micro-batches on a context-parallel ring before the first backward pass")
    sequence_parallel: bool = setting(False, "split the activations between tensor-parallel regions along the sequence")
    memory_split: Literal["heads", "hidden"] = setting(
        "heads", "what tp shards of a memory: its heads, or the hidden size of each"
    )
    pipeline_schedule: Literal["1f1b", "interleaved"] = setting("1f1b", "interleaved: several stages on each rank")
    stages_per_rank: int = setting(1, "with interleaved: stages that each pipeline rank holds")
    zero_stage: Literal[0, 1, 2, 3] = setting(
        0, "DeepSpeed ZeRO over dp * cp; 0: the optimizer's state whole on every rank"
    )
    offload_optimizer: bool = setting(False, "ZeRO keeps the optimizer's state in CPU memory")
    timeout_minutes: float = setting(30.0, "how long a process waits for the others, at the start and in a collective")
    lost_after_seconds: float = setting(60.0, "without a sign of life from a process, before all end")
    hang_minutes: float = setting(
        20.0, "without a finished step or validation, before all print their stacks and end; 0: never"
    )

    def __post_init__(self):
        check_fields(self, "parallel")
        for name in ("tp", "pp", "cp", "segments_per_rank", "inflight", "stages_per_rank"):
            at_least("parallel." + name, getattr(self, name), 1)
        if not self.lost_after_seconds >= 5:
            raise ValueError(f"parallel.lost_after_seconds must be 5 or more, got {self.lost_after_seconds}")
        at_least("parallel.hang_minutes", self.hang_minutes, 0)
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
    name: str | None = setting(None, "null: the name of the config file")
    dir: str | None = setting(None, "the run folder; null: runs/NAME")
    wandb: str | None = setting(None, "a Weights & Biases project; offline unless WANDB_MODE says otherwise")
    tensorboard: bool = setting(False, "write RUN/tensorboard")
    profile_steps: list[int] | None = setting(
        None, "steps that torch's profiler records into RUN/profile; SIGUSR2 to a process records its next one"
    )

    def __post_init__(self):
        check_fields(self, "run")


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)
    deepspeed: dict[str, Any] = setting(
        dict,
        "further DeepSpeed settings, as in its ds_config.json; used with zero_stage. They may not differ from other keys",
    )
    version: int = setting(CONFIG_VERSION, "of this schema")

    def warming(self, steps: int) -> dict[str, int]:
        """What warm-ups make of the step after so many, for its line in the metrics."""
        batch = {"global_batch": self.train.batch_at(steps)} if self.train.batch_warmup else {}
        return batch | ({"seq_len": self.data.length_at(steps)} if self.data.seq_len_warmup else {})

    def __post_init__(self):
        check_fields(self)
        for length in reversed(self.data.lengths):
            key = "data.seq_len" if length == self.data.seq_len else "data.seq_len_warmup"
            self._check_length(key, length)
            self._check_segments(key, length)

    def _check_length(self, key: str, length: int) -> None:
        multiple = self.model.document_multiple
        if self.data.reset_documents and length % multiple:
            source = "model.mac.segment" if VARIANTS[self.model.variant].segments else "model.memory.chunk_size"
            if self.model.pattern is not None:
                source = "the least common multiple of the chunks and segments of model.pattern"
            below, above = length // multiple * multiple, -(-length // multiple) * multiple
            raise ValueError(
                f"{key}={length} must be a multiple of {source}={multiple}, where documents may start; "
                f"try {f'{below} or {above}' if below else above}, or data.reset_documents=false"
            )

    def _check_segments(self, key: str, total: int) -> None:
        """The cuts of the sequence: segments of equal length, each starting where documents may."""
        parts, multiple = self.parallel.segments, self.model.document_multiple
        if parts > 1 and total % (parts * multiple):
            unit = parts * multiple
            above = -(-total // unit) * unit
            raise ValueError(
                f"{key}={total} must divide into parallel.cp={self.parallel.cp} * parallel.segments_per_rank="
                f"{self.parallel.segments_per_rank} segments, each a multiple of {multiple} (the memory's chunk, for mac its "
                f"segment); try {key}={above}"
            )
        every = self.train.truncate_state_gradient_every
        if every is not None and every % (total // parts):
            raise ValueError(
                f"train.truncate_state_gradient_every={every} must be a multiple of a segment's {total // parts} tokens "
                f"(data.seq_len / (cp * segments_per_rank)); raise parallel.segments_per_rank to truncate more often"
            )
