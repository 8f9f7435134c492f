"""What the fork server of the ranks imports, once. A collection in a rank does not walk these half a million objects (a quarter of a second,
and a copy of every page that they lie on)."""

import gc

import deepspeed  # noqa: F401
import megatron.core.tensor_parallel  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401

import titans_pretrain.commands.train  # noqa: F401

gc.collect()
gc.freeze()
