"""Running a part of a model without data, to count bytes: every operation gives shapes and nothing is computed."""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titans_pretrain.kernels.memory_scan.chunked.walk import SpanSums, Walk
from titans_pretrain.kernels.memory_scan.chunked.walk_back import WalkBack


class LiveBytes(TorchDispatchMode):
    """Inside `with`: the bytes of the tensors that were made there and are still alive (`now`), and the most there were
    (`peak`). A storage counts once and whole, whoever views it. Real tensors and fake ones; one thread."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:  # a fake tensor is asked where it is: often
            return function(*args, **kwargs)
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.meet(x, made_here=False)
        out = function(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.meet(x, made_here=True)
        return out

    def meet(self, x: Tensor, made_here: bool) -> None:
        """Of every tensor that an operation reads or returns."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made_here else 0
        self._known.add(key)
        weakref.finalize(storage, self._forget, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Tensors made inside have shapes and no values, and the memory scan walks through one span of each shape: the others keep
    what it kept and need what it needed."""
    from torch._subclasses import FakeTensorMode

    walked = set()

    def first(way: str, span) -> bool:
        shape = (way, span.length, span.stretches, span.tile, span.opens_chunk)
        return not (shape in walked or walked.add(shape))

    def forward(walk: Walk, span, state, anchor, y, run: Callable = Walk.forward):
        if anchor is None or first("forward", span):
            return run(walk, span, state, anchor, y)
        z = torch.empty(y.shape[0] * y.shape[2], span.stop - span.start, y.shape[3], dtype=walk.dtype)
        return anchor, SpanSums(z, z.clone()) if walk.network.split.ranks > 1 else None

    def backward(back: WalkBack, span, state, anchor, sums, run: Callable = WalkBack.span):
        if first("backward", span):
            run(back, span, state, anchor, sums)

    with (
        FakeTensorMode(),
        warnings.catch_warnings(action="ignore", category=FutureWarning),  # torch's, of calls that libraries make
        mock.patch.object(Walk, "forward", forward),
        mock.patch.object(WalkBack, "span", backward),
    ):
        yield
