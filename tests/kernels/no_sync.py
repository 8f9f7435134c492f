"""What would make the host wait for a device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {  # sizes or values that the host would need
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2", "argwhere", "bincount",
    "repeat_interleave", "is_pinned", "allclose", "count_nonzero_host",
}  # fmt: skip


class NoSync(TorchDispatchMode):
    """Refuses what reads a value, indexing by masks, and copies between the host and the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS and not (name == "repeat_interleave" and "self_int" in func._overloadname):
            raise AssertionError(f"{name} waits for the device")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            raise AssertionError(f"{name}: a list is copied to the device, a mask counted there")
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in (*inputs, *tree_leaves(out)) if isinstance(x, torch.Tensor) and x.dim()}
        if len(devices) > 1:
            raise AssertionError(f"{name} copies between {' and '.join(sorted(devices))}")
        return out
