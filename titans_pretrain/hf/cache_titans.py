"""Hugging Face cache that carries a Titans model's state."""

from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from titans_pretrain.models import ModelState
from titans_pretrain.models.state_file import fingerprint, load_state, save_state


class TitansCache(Cache):
    """What has been read so far. Unlike a key/value cache its size is bounded, and it cannot be cropped.

    The library keeps one object per layer of a model; here a single one holds the state of all.
    """

    def __init__(self):
        super().__init__(layers=[TitansCacheLayer()])

    @property
    def content(self) -> "TitansCacheLayer":
        return self.layers[0]

    def save(self, path: str | Path, model: PreTrainedModel) -> None:
        """What was read, as a file. model: the one that read it, a TitansForCausalLM. Raises ValueError where a row has read nothing."""
        if not isinstance(self.content.states, ModelState):
            raise ValueError("there is no state to save: nothing was read yet, in some row at least")
        save_state(path, self.content.states, _fingerprint(model))

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, rows: int = 1) -> "TitansCache":
        """A cache behind a text that is not among the next call's tokens: generate(**question, cache=TitansCache.load(path, model)).

        rows: of the batch that goes on from it, each from all that was read, if one row was. Raises ValueError for the state of
        another model."""
        cache = cls()
        cache.content.states = load_state(path, _fingerprint(model), model.device)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache


class TitansCacheLayer(CacheLayerMixin):
    """states: None before the first token; then one state for the whole batch, ragged if its rows have read different numbers of
    tokens; while some row has none yet, a state of batch 1 per row, None for those.
    length: columns read, padding included, as the library counts; 0 behind a state that was loaded."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.states: ModelState | list[ModelState | None] | None = None
        self.length = 0

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


def _fingerprint(model: PreTrainedModel) -> str:
    """As of the model that was exported."""
    weights = {name.removeprefix("model."): x for name, x in model.state_dict().items()}
    if model.config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    return fingerprint(model.config.model_config(), weights)
