"""Hugging Face cache that carries a Titans model's state."""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from titans_pretrain.models import ModelState
from titans_pretrain.models.rows import rows_of


class TitansCache(Cache):
    """What has been read so far. Unlike a key/value cache its size is bounded, and it cannot be cropped.

    The library keeps one object per layer of a model; here a single one holds the state of all.
    """

    def __init__(self):
        super().__init__(layers=[TitansCacheLayer()])

    @property
    def content(self) -> "TitansCacheLayer":
        return self.layers[0]


class TitansCacheLayer(CacheLayerMixin):
    """states: None before the first token; then one state for the whole batch, ragged if its rows have read different numbers of
    tokens; while some row has none yet, a state of batch 1 per row, None for those.
    length: columns read, padding included, as the library counts."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.states: ModelState | list[ModelState | None] | None = None
        self.length = 0

    def by_row(self, batch: int) -> list[ModelState | None]:
        """The state of each row by itself."""
        if self.states is None:
            return [None] * batch
        if isinstance(self.states, list):
            return self.states
        return rows_of(self.states)

    def get_seq_length(self) -> int:
        return self.length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if isinstance(self.states, list):
            self.states = [self.states[row] for row in beam_idx.tolist()]
        elif self.states is not None:
            self.states = self.states.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.states is not None:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        if self.states is None:
            return -1
        return len(self.states) if isinstance(self.states, list) else self.states.position.shape[0]

    def crop(self, *args, **kwargs) -> None:
        raise ValueError("a Titans cache cannot be cropped: its memory has learned from the tokens; start a new cache")

    # The rest of the library's interface concerns keys and values, which this cache does not hold one by one.

    def get_mask_sizes(self, query) -> tuple[int, int]:
        return self.length + (query if isinstance(query, int) else query.shape[0]), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.9

    def lazy_initialization(self, *args, **kwargs) -> None:
        raise NotImplementedError

    def update(self, *args, **kwargs):
        raise NotImplementedError
