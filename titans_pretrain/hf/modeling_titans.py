"""Titans for Hugging Face transformers: a thin wrapper around the model that was trained."""

import dataclasses
from typing import ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from titans_pretrain.hf.cache_titans import TitansCache
from titans_pretrain.hf.configuration_titans import CACHE_NAMES, TitansConfig
from titans_pretrain.models import ModelState, build_model

# The name by which this version of transformers reads a cache from an output and hands it to the next call.
CACHE_NAME = next(name for name in CACHE_NAMES if name in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)})
# What the library passes beside forward's own arguments. Positions are counted by the cache, whatever it says of them.
LIBRARY_ARGUMENTS = {"cache_position", "num_items_in_batch", "position_ids", "return_dict"}
PIECE = 1024  # tokens read at a time where only the last logits are wanted: those of a long prompt never exist whole


class TitansForCausalLM(PreTrainedModel, GenerationMixin):
    """Reads and generates like any causal language model; its cache is a TitansCache.

    The memory learns from every token it reads, so padding may not be read: rows of a batch that are not all of one length
    (by `attention_mask`) are run one by one, each with a state of its own. Exact, and slower than a batch of equal lengths.
    """

    config_class = TitansConfig
    base_model_prefix = "model"
    _is_stateful = True  # refuses assisted decoding, which would have to take tokens back
    _supports_sdpa = True
    _skip_keys_device_placement: ClassVar[list[str]] = list(CACHE_NAMES)

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.model = build_model(config.model_config())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """build_model has initialised them."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value
        self.model.config.vocab_size = value.num_embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.lm_head  # None when tied: the model then reads the embeddings

    def set_output_embeddings(self, value: nn.Module | None) -> None:
        self.model.lm_head = value

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        """generate() would make a key/value cache otherwise. A cache that was given stays, so does use_cache=False."""
        cache = _the_cache(**{name: model_kwargs.pop(name, None) for name in CACHE_NAMES})
        if cache is not None or generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = TitansCache() if cache is None else cache

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        cache: TitansCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, T]; attention_mask [B, T], or [B, tokens read before + T], 0 for padding on either side; labels
        [B, T], shifted in here, -100 for none; cache: what was read before, also as `past_key_values`, its name before
        transformers 5.24. Logits [B, T, vocab_size], 0 at padding. Positions are counted by the cache: `position_ids` has
        no effect."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("a Titans model reads input_ids; inputs_embeds is not supported")
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.pop(name, None):
                raise ValueError(f"{name} is not supported by a Titans model")
        _refuse_unknown(kwargs)
        cache = _the_cache(cache=cache, past_key_values=past_key_values)
        cache = TitansCache() if cache is None else cache
        content = cache.content
        real = _real_tokens(input_ids, attention_mask, content.length)
        last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1 and labels is None
        if real is None and not isinstance(content.states, list):
            logits, content.states = self._read(input_ids, content.states, last_only)
        else:
            real = torch.ones_like(input_ids, dtype=torch.bool) if real is None else real
            logits, content.states = self._read_rows(input_ids, real, content.by_row(len(input_ids)), last_only)
        content.length += input_ids.shape[1]
        loss = None
        if labels is not None:
            if real is not None:  # neither padding nor the first token after it is predicted from a token
                labels = labels.masked_fill(~(real & real.roll(1, 1)), -100)
            items = kwargs.get("num_items_in_batch")
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=items)
        if not last_only:
            logits = logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: cache if use_cache else None})

    def _read(self, tokens: Tensor, state: ModelState | None, last_only: bool) -> tuple[Tensor, ModelState]:
        """tokens [B, T] -> logits [B, T, V], or [B, 1, V] of the last one; and the state after them."""
        pieces = tokens.split(PIECE, 1) if last_only and not torch.is_grad_enabled() else (tokens,)
        for piece in pieces:
            out = self.model(piece, state=state)
            state = out.state
        return out.logits[:, -1:] if last_only else out.logits, state

    def _read_rows(self, tokens: Tensor, real: Tensor, states: list, last_only: bool) -> tuple[Tensor, list]:
        """As `_read`, each row by itself without its padding. real [B, T]."""
        rows, after = [], []
        columns = 1 if last_only else tokens.shape[1]
        for row, state in enumerate(states):
            logits = self.model.embed_tokens.weight.new_zeros(columns, self.config.vocab_size)
            if real[row].any():
                read, state = self._read(tokens[row, real[row]][None], state, last_only)
                if last_only:
                    logits = read[0] * real[row, -1:, None]
                else:
                    logits[real[row]] = read[0]
            rows.append(logits)
            after.append(state)
        return torch.stack(rows), after


def _refuse_unknown(arguments: dict) -> None:
    """A state under a name that a later version invents must not be lost in **kwargs: the model would forget."""
    unknown = [name for name, value in arguments.items() if value is not None and name not in LIBRARY_ARGUMENTS]
    if unknown:
        raise ValueError(
            f"a Titans model takes no {unknown[0]}; if transformers {transformers.__version__} passes it by itself, "
            "this version is too new for the code of this model: install an older one or export the model again"
        )


def _the_cache(*, cache: TitansCache | None, past_key_values: TitansCache | None) -> TitansCache | None:
    """The one that was given, by whichever name."""
    given = {name: x for name, x in (("cache", cache), ("past_key_values", past_key_values)) if x is not None}
    if len(given) > 1:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them")
    for name, x in given.items():
        if not isinstance(x, TitansCache):
            raise ValueError(f"{name} is a {type(x).__name__}; it must be a TitansCache")
        return x
    return None


def _real_tokens(input_ids: Tensor, attention_mask: Tensor | None, read_before: int) -> Tensor | None:
    """[B, T] bool, False at padding; None: all are tokens."""
    if attention_mask is None:
        return None
    batch, tokens = input_ids.shape
    if attention_mask.shape not in ((batch, tokens), (batch, read_before + tokens)):
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}; for {tokens} tokens after {read_before} that the cache has "
            f"read it must be [{batch}, {tokens}] or [{batch}, {read_before + tokens}], 1 for tokens and 0 for padding"
        )
    real = attention_mask[:, -tokens:].bool()
    return None if real.all() else real
