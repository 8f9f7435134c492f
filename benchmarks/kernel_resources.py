"""What the memory scan's Triton kernels use of a GPU, compiled offline."""
import torch
from benchmarks.compiled import recorded
from titans_pretrain.kernels.memory_scan.chunked.walk import States
from titans_pretrain.kernels.memory_scan.triton.backward import backward
from titans_pretrain.kernels.memory_scan.triton.call import Call, Tokens
from titans_pretrain.kernels.memory_scan.triton.forward import forward

def launches(depth, dim, hidden, chunk, dtype, offset=0, to_initial=True, resets=True, norm=True, gates=1, row=None):
    """Every kernel of a call of the scan, forward and backward."""
    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")
    B, T, H = 2, 3 * chunk, 2
    sizes = [(dim, hidden), (hidden, dim)][-depth:]
    x = Tokens(*(empty(B, T, H, dim, dtype=dtype) for _ in range(3)), *(empty(B, T, H, gates) for _ in range(3)))
    weights = tuple(empty(B, H, *s) for s in sizes)
    anchor = weights if offset else None
    states = States(weights, weights, anchor, weights, weights)
    call = Call.of(x, weights, offset, chunk, norm, 0.5, to_initial, resets, None)
    if row is not None:
        import dataclasses
        call = dataclasses.replace(call, row=row)
    reset = empty(B, call.chunks, dtype=torch.bool)
    with recorded() as found:
        results = forward(call, x, states, reset, True)
        backward(call, x, states, reset, results, empty(B, T, H, dim, dtype=dtype), States(weights, weights, weights if call.ends_half else None, None, None))
    return found
