"""Memory as context (Titans section 4.1, eq. 21-25), one segment at a time.

    h = M(q; memory at the segment's start)        retrieve
    y = attention over [persistent | h | segment]  causal within the segment; segments do not see each other
    m = scan(x + y)                                write token by token, reading after each write
    o = y o sigmoid(m)                             gate

The equations write y alone. The paper has residual connections in every block and prints none of them; without this one the memory
sees of its token what attention lets through, which at first is next to nothing, and recall is not learned (docs/stability.md).
`mac.residual: false` leaves it out.

Taken literally the paper leaks the future: h comes from queries of the whole segment and every row sees all of it. Here row t
sees h_j for j <= t, and reads the memory as it stands after its own write. With `mac.memory_tokens` = N the queries are N
learned vectors instead, which every row may see.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.config.model import LayerConfig
from titans_pretrain.kernels.attention import segment_attention
from titans_pretrain.models.blocks import Block, Gate, build_attention, build_memory
from titans_pretrain.models.linear import Projection
from titans_pretrain.models.norm import RMSNorm
from titans_pretrain.models.state import LayerState, MemoryLayerState, SegmentState


class MacBlock(Block):
    def __init__(self, config: LayerConfig):
        super().__init__(config)
        self.segment = config.mac.segment
        self.memory = build_memory(config)
        self.attention = build_attention(config)
        self.write_norm = RMSNorm(config.dim, config.norm_eps)  # of what the memory writes
        self.gate = Gate(config.dim, config.norm_eps)
        self.retrieve_proj, self.memory_queries = None, None
        if config.mac.memory_tokens:
            shape = (config.mac.memory_tokens, config.memory.heads, config.dim // config.memory.heads)
            self.memory_queries = nn.Parameter(torch.randn(shape))
        else:
            self.retrieve_proj = Projection(config.dim, config.dim, config.init_std)

    def init_weights(self) -> None:
        super().init_weights()
        if self.memory_queries is not None:
            nn.init.normal_(self.memory_queries)

    def mix(self, x, state, by, positions):
        by = by[self.attention.rotary_dim]
        queries = self.attention.queries(x, by)
        k, v = self.attention.keys_values(x, by)
        retrieval = None
        if self.retrieve_proj is not None:
            retrieval = F.silu(self.retrieve_proj(x)).unflatten(-1, (self.memory.heads, -1))
        spread = self.attention.spread
        persistent = spread(self.attention.positionless(self.persistent))
        memory, segment = state.memory, state.segment
        if memory is None:
            memory = self.memory.opened(self.memory.initial(None), x.shape[0])
        if segment is not None and segment.read is not None:
            segment = self._next_of_rows(segment, memory)
        outputs, reads = [], []
        start = 0
        while start < x.shape[1]:
            before = 0 if segment is None or segment.kv is None else segment.kv[0].shape[1]
            stop = min(x.shape[1], start + self.segment - before)
            here = slice(start, stop)
            if segment is None:
                first = None if positions is None else positions[:, start] == 0
                segment = self._open(memory, first)
            segment = self._extend(
                segment, (k[:, here], v[:, here]), None if retrieval is None else retrieval[:, here],
                (by[0][:, here], by[1][:, here]),
            )  # fmt: skip
            y = segment_attention(
                queries[:, here], *spread(segment.kv), *(spread(segment.retrieved) or (None, None)),
                persistent=persistent, context=spread(self._context(segment)), lengths=segment.read,
                backend=self.attention.backend,
            )  # fmt: skip
            y = self.attention.merge(y)
            at = None if positions is None else positions[:, here].contiguous()
            m, memory = self.memory(self.written(x[:, here], y), memory, at)
            outputs.append(y)
            reads.append(m)
            if segment.read is not None:
                segment = replace(segment, read=segment.read % self.segment)
            elif segment.kv[0].shape[1] == self.segment:
                segment = None
            start = stop
        return self.gate(torch.cat(outputs, 1), torch.cat(reads, 1)), LayerState(memory=memory, segment=segment)

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        """What the memory writes of tokens x, of which attention makes y."""
        return self.write_norm(x + y if self.config.mac.residual else y)

    def _open(self, memory: MemoryLayerState, first: Tensor | None) -> SegmentState:
        """A segment without tokens, retrieving from the memory as it stands; first [B]: rows where a document starts."""
        weights = memory.memory.weights
        if first is not None:
            fresh = self.memory.initial(None, memory).memory.weights
            weights = tuple(torch.where(first.view(-1, 1, 1, 1), f, w) for f, w in zip(fresh, weights, strict=True))
        return SegmentState(weights, None, None)

    def _next_of_rows(self, segment: SegmentState, memory: MemoryLayerState) -> SegmentState:
        """With one more token of each row counted, and a segment opened in those rows whose last one is full."""
        opens = (segment.read == 0).view(-1, 1, 1, 1)
        weights = tuple(torch.where(opens, m, w) for m, w in zip(memory.memory.weights, segment.weights, strict=True))
        return SegmentState(
            weights, _last(segment.kv, self.segment - 1), _last(segment.retrieved, self.segment - 1), segment.read + 1
        )

    def _extend(self, segment, kv, retrieval, by) -> SegmentState:
        """The segment with more tokens: their keys and values, and those of what is retrieved for them."""
        retrieved = None
        if retrieval is not None:
            h = self.memory.retrieve(retrieval, segment.weights).to(kv[0].dtype)
            retrieved = _append(segment.retrieved, self.attention.keys_values(h, by))
        return SegmentState(segment.weights, _append(segment.kv, kv), retrieved, segment.read)

    def _context(self, segment: SegmentState) -> tuple[Tensor, Tensor] | None:
        if self.memory_queries is None:
            return None
        q = self.memory_queries.expand(segment.weights[0].shape[0], -1, -1, -1)
        return self.attention.positionless(self.memory.retrieve(q, segment.weights).to(self.memory_queries.dtype))


def _last(kv: tuple[Tensor, Tensor] | None, count: int) -> tuple[Tensor, Tensor] | None:
    """Keys and values [B, n, ...] of the last `count` tokens."""
    return None if kv is None else tuple(x[:, max(x.shape[1] - count, 0) :] for x in kv)


def _append(old: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return new if old is None else tuple(torch.cat(pair, 1) for pair in zip(old, new, strict=True))
