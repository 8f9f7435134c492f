"""Titans for Hugging Face transformers: the layers that were trained, under the library's interface."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from titans_pretrain.config.model import VARIANTS
from titans_pretrain.hf.cache_titans import TitansCache
from titans_pretrain.hf.configuration_titans import CACHE_NAMES, TitansConfig
from titans_pretrain.hf.documents_titans import document_starts, on_grid, real_tokens
from titans_pretrain.models.causal_lm import Stack
from titans_pretrain.models.inputs import check_values
from titans_pretrain.models.linear import Embedding, Projection
from titans_pretrain.models.norm import RMSNorm
from titans_pretrain.models.rows import rows_of, stack_rows
from titans_pretrain.models.state import ModelState
from titans_pretrain.models.variants import build_block

# The name by which this version of transformers reads a cache from an output and hands it to the next call.
CACHE_NAME = next(name for name in CACHE_NAMES if name in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)})
# What the library passes beside forward's own arguments, without effect here.
LIBRARY_ARGUMENTS = {"cache_position", "num_items_in_batch", "return_dict"}
# What says of packed documents, for other kernels, the same as position_ids beside it.
PACKED_ARGUMENTS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
States = ModelState | list[ModelState | None] | None  # of a cache
PIECE = 1024  # tokens read at a time where only the last one's output is wanted: a long prompt takes the memory of a short one


class TitansPreTrainedModel(PreTrainedModel):
    config_class = TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = [
        v.block.rpartition(".")[2] for v in VARIANTS.values() if isinstance(v.block, str)
    ]
    _is_stateful = True  # refuses assisted decoding, which would have to take tokens back
    _supports_sdpa = True
    _skip_keys_device_placement: ClassVar[list[str]] = list(CACHE_NAMES)

    def _init_weights(self, module: nn.Module) -> None:
        """Values of what a checkpoint does not have; the library leaves the parameters alone that it has loaded."""
        init: Any = getattr(module, "init_weights", None)
        if init is None:
            super()._init_weights(module)  # not of this model: an embedding that was resized
        elif not isinstance(module, PreTrainedModel) and next(module.parameters(recurse=False), None) is not None:
            init()


class TitansModel(Stack, TitansPreTrainedModel):
    """Embedding, layers and norm: hidden states.

    The memory learns from every token it reads, so padding is not read. Rows of unequal length (by `attention_mask`) and packed
    documents (by `position_ids`) give what each would alone.
    """

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.embed_tokens = Embedding(config.vocab_size, config.dim, config.init_std)
        self.layers = nn.ModuleList(build_block(layer) for layer in config.model_config().layer_configs)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def recompute(self) -> str:
        """Without reentrance, whatever the library's arguments for checkpointing say: the gradients are the same."""
        return "block" if self.gradient_checkpointing and self.training else "none"

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: TitansCache | None = None,
        last_only: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T], or inputs_embeds [B, T, dim]; attention_mask [B, T], or [B, tokens read before + T], 0 for padding
        anywhere; position_ids [1 or B, T]: 0 starts a document (packed rows), without effect behind a cache, which counts by itself;
        cache: what was read before, also as `past_key_values`, its name before transformers 5.24; last_only: the last column alone.

        last_hidden_state [B, T, dim] (T = 1 if last_only); at padding that of the last token before it, 0 before the first. hidden_states:
        of embedding and layers, the last one normalised. A state of several documents in a row, or after padding that was read
        without a cache, is none: there is no cache then. Raises ValueError."""
        _refuse_unknown(kwargs, packed=position_ids is not None)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("a Titans model reads input_ids or inputs_embeds; give one of them")
        x = inputs_embeds if input_ids is None else input_ids
        if 0 in x.shape[:2]:
            raise ValueError(
                "there is no token to read; to generate behind a cache, give the text that it has read as well, or a cache that "
                "TitansCache.load made"
            )
        if input_ids is not None:
            check_values(self.config, input_ids, None)
        every = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        last_only = last_only and not every
        cache = _the_cache(cache=cache, past_key_values=past_key_values)
        real, starts = _documents(x, attention_mask, position_ids, cache)
        several = starts is not None and bool((starts.sum(1) > 1).any())
        if several and (use_cache or cache is not None):
            raise ValueError("several documents in a row leave no state to go on from; set use_cache=False")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not several
        if cache is None and use_cache:
            cache = TitansCache()
        if cache is None and starts is not None:
            grid = on_grid(real, starts, self.config.model_config().document_multiple)
            outs, _ = self._read(grid.place(x), None, every, positions=grid.positions)
            outs = [grid.take(out) for out in outs]
            outs = [out[:, -1:] for out in outs] if last_only else outs
        else:
            states = None if cache is None else cache.content.states
            together = not isinstance(states, list) and not (states and states.ragged and x.shape[1] > 1)
            if real is None and together:
                outs, states = self._read(x, states, every, last_only)
            else:
                real = x.new_ones(x.shape[:2], dtype=torch.bool) if real is None else real
                outs, states = self._read_rows(x, real, states, every, last_only)
            if cache is not None:
                cache.content.states = states
                cache.content.length += x.shape[1]
        return BaseModelOutputWithPast(
            outs[-1], hidden_states=tuple(outs) if every else None, **{CACHE_NAME: cache if use_cache else None}
        )

    def _read(
        self,
        x: Tensor,
        state: ModelState | None,
        every: bool,
        last_only: bool = False,
        positions: Tensor | None = None,
    ) -> tuple[list[Tensor], ModelState]:
        """x: tokens [B, T], or their embeddings. Returns the norm's output [B, T, dim] ([B, 1, dim] of the last token), before it
        the embedding's and the layers' if `every`; and the state."""
        whole = not last_only or torch.is_grad_enabled()
        for piece in (x,) if whole else x.split(PIECE, 1):
            embedded = piece if piece.is_floating_point() else self.embed_tokens(piece)
            seen: list[Tensor] | None = [] if every else None
            hidden, state = self.read(embedded, positions, state, seen)
        if last_only:
            hidden = hidden[:, -1:]
        return [hidden] if seen is None else [embedded, *seen[:-1], hidden], state

    def _read_rows(
        self, x: Tensor, real: Tensor, states: States, every: bool, last_only: bool
    ) -> tuple[list[Tensor], States]:
        """As `_read`, of rows with padding (real [B, T]) or with states of their own. Rows that stand at one place read together as
        far as the shortest goes, then without that one; the others each by itself."""
        grid = on_grid(real, document_starts(real, None), 1)
        x, lengths = grid.place(x), real.sum(1)
        groups, ended = [], []
        for rows, state in _at_one_place(states, len(x), x.device):
            for here, found in ((lengths[rows] > 0, groups), (lengths[rows] == 0, ended)):
                if here.any():
                    found.append((rows[here], state and state.select(here.nonzero().flatten())))
        outs: list[Tensor] = []
        for rows, state in groups:
            start = 0
            while len(rows):
                stop = int(lengths[rows].min())
                read, state = self._read(x[rows, start:stop], state, every, last_only)
                if not outs:
                    width = 1 if last_only else x.shape[1]
                    outs = [out.new_zeros(len(x), width, out.shape[-1]) for out in read]
                for out, part in zip(outs, read, strict=True):
                    out[rows, slice(None) if last_only else slice(start, stop)] = part
                stays = lengths[rows] > stop
                ended.append((rows[~stays], state.select((~stays).nonzero().flatten())))
                state = state.select(stays.nonzero().flatten()) if stays.any() else None
                rows, start = rows[stays], stop
        if not outs:
            raise ValueError("attention_mask is 0 everywhere: there is no token to read")
        outs = outs if last_only else [grid.take(out) for out in outs]
        if any(state is None for _, state in ended):
            return outs, [by_row for _, by_row in sorted(_single(ended), key=lambda pair: pair[0])]
        order = torch.cat([rows for rows, _ in ended]).argsort()
        found = [state for _, state in ended]
        return outs, (found[0] if len(found) == 1 else stack_rows(found)).select(order)


class TitansForCausalLM(TitansPreTrainedModel, GenerationMixin):
    """Reads and generates like any causal language model; its cache is a TitansCache."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.model = TitansModel(config)
        self.lm_head = Projection(config.dim, config.vocab_size, config.init_std)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        """generate() would make a key/value cache otherwise. A cache that was given stays, so does use_cache=False."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={kind!r} is a kind of key/value cache; a Titans model has its own")
        cache = _the_cache(**{name: model_kwargs.pop(name, None) for name in CACHE_NAMES})
        if cache is not None or generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = TitansCache() if cache is None else cache

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: TitansCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Arguments as of TitansModel.forward; labels [B, T], shifted in here, -100 for none: neither padding nor a document's first
        token is predicted. Logits [B, T, vocab_size]."""
        _refuse_unknown(kwargs, packed=position_ids is not None)
        if labels is not None:
            x = inputs_embeds if input_ids is None else input_ids
            real, starts = _documents(
                x, attention_mask, position_ids, _the_cache(cache=cache, past_key_values=past_key_values)
            )
            for unpredicted in (None if real is None else ~real, starts):
                labels = labels if unpredicted is None else labels.masked_fill(unpredicted, -100)
            use_cache = bool(use_cache)
        last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1 and labels is None
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states,
            cache=cache, last_only=last_only, return_dict=True,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._logits(out.last_hidden_state[:, kept if labels is None else slice(None)])
        loss = None
        if labels is not None:
            items = kwargs.get("num_items_in_batch")
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=items)
            logits = logits[:, kept]
        return CausalLMOutputWithPast(
            loss, logits, hidden_states=out.hidden_states, **{CACHE_NAME: getattr(out, CACHE_NAME)}
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        """An adapter on the embedding of a tied model changes the head too, as it will once merged; one on the head comes first."""
        embedding = self.model.embed_tokens
        adapted = type(embedding).forward is not nn.Embedding.forward
        if not (self.config.tie_embeddings and adapted) or type(self.lm_head) is not Projection:
            return self.lm_head(hidden)
        return nn.functional.linear(hidden, embedding(torch.arange(self.config.vocab_size, device=hidden.device)))


def _documents(
    x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: TitansCache | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which of x [B, T, ...] are tokens and which of these start a document, [B, T] bool each. Both None: all are tokens of one
    document a row. The second alone: behind a cache, where documents go on."""
    real = real_tokens(attention_mask, *x.shape[:2], 0 if cache is None else cache.get_seq_length())
    goes_on = cache is not None and cache.content.states is not None
    if goes_on or (real is None and position_ids is None):
        return real, None
    everywhere = x.new_ones(x.shape[:2], dtype=torch.bool) if real is None else real
    starts = document_starts(everywhere, position_ids)
    if real is None and not starts[:, 1:].any():
        return None, None
    return everywhere, starts


def _at_one_place(states: States, batch: int, device: torch.device) -> list[tuple[Tensor, ModelState | None]]:
    """(rows, their state) of rows that have read equally much."""
    everywhere = torch.arange(batch, device=device)
    if states is None or (isinstance(states, ModelState) and not states.ragged):
        return [(everywhere, states)]
    singles = states if isinstance(states, list) else rows_of(states)
    groups = [(everywhere[[i]], state) for i, state in enumerate(singles) if state is not None]
    fresh = [i for i, state in enumerate(singles) if state is None]
    return groups + ([(everywhere[fresh], None)] if fresh else [])


def _single(states: Sequence[tuple[Tensor, ModelState | None]]) -> list[tuple[int, ModelState | None]]:
    """(row, its state) of groups of rows."""
    return [
        (int(row), state and state.select(torch.tensor([i]))) for rows, state in states for i, row in enumerate(rows)
    ]


def _refuse_unknown(arguments: dict, packed: bool) -> None:
    """A state under a name that a later version invents must not be lost in **kwargs: the model would forget."""
    if arguments.get("output_attentions"):
        raise ValueError("output_attentions is not supported by a Titans model")
    known = LIBRARY_ARGUMENTS | {"output_attentions"} | (PACKED_ARGUMENTS if packed else set())
    unknown = [name for name, value in arguments.items() if value is not None and name not in known]
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
