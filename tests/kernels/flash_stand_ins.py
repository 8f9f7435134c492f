"""What each library of flash kernels documents, in float64 on a CPU, under the library's own names.

Raw passes over sequences of variable length: masks aligned at the bottom right, the lse [H, N], and a backward pass that takes the
O and the lse that it is given and knows no gradient of the lse.
"""

import contextlib
import sys
import types

import torch


def _visible(queries, keys, causal, left, right, longest_keys):
    if causal:
        right = 0
    place = torch.arange(queries)[:, None] + keys - queries
    back = place - torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if 0 <= left < longest_keys:
        seen &= back <= left
    if right >= 0:
        seen &= back >= -right
    return seen


def _sequences(q, k, cu_q, cu_k, longest_q, longest_k):
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape and cu_q.is_contiguous()
    assert isinstance(longest_q, int) and isinstance(longest_k, int)
    assert all(x.dim() == 3 and x.stride(-1) == 1 for x in (q, k))
    starts, stops = zip(*[(c[:-1].tolist(), c[1:].tolist()) for c in (cu_q, cu_k)], strict=True)
    assert cu_q[0] == cu_k[0] == 0 and cu_q[-1] == len(q) and cu_k[-1] == len(k)
    for a, b, c, d in zip(starts[0], stops[0], starts[1], stops[1], strict=True):
        assert 0 <= b - a <= longest_q and 0 <= d - c <= longest_k
        yield slice(a, b), slice(c, d)


def forward(q, k, v, cu_q, cu_k, longest_q, longest_k, scale, causal, left, right):
    """Sums are wide, in half precision as well; out has q's dtype, the lse float32 at least."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[1], len(q), dtype=torch.promote_types(q.dtype, torch.float32))
    q, k, v = q.double(), k.double(), v.double()
    for i, j in _sequences(q, k, cu_q, cu_k, longest_q, longest_k):
        seen = _visible(i.stop - i.start, j.stop - j.start, causal, left, right, longest_k)
        scores = (torch.einsum("ihd,jhd->hij", q[i], k[j]) * scale).masked_fill(~seen, float("-inf"))
        lse[:, i] = scores.logsumexp(-1).to(lse.dtype)
        out[i] = torch.einsum("hij,jhd->ihd", scores.softmax(-1).nan_to_num(0), v[j]).to(out.dtype)
    return out, lse


def backward(grad, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, longest_q, longest_k, scale, causal, left, right):
    """Writes what its sequences cover; keys of a sequence without queries it leaves alone."""
    assert {x.dtype for x in (grad, k, v, out, dq, dk, dv)} == {q.dtype} and lse.is_contiguous()
    grad, q, k, v, out = (x.double() for x in (grad, q, k, v, out))
    for i, j in _sequences(q, k, cu_q, cu_k, longest_q, longest_k):
        if i.stop == i.start:
            continue
        seen = _visible(i.stop - i.start, j.stop - j.start, causal, left, right, longest_k)
        p = (torch.einsum("ihd,jhd->hij", q[i], k[j]) * scale - lse[:, i, None]).exp() * seen
        dp = torch.einsum("ihd,jhd->hij", grad[i], v[j])
        ds = p * (dp - (grad[i] * out[i]).sum(-1).t()[..., None]) * scale
        dv[j] = torch.einsum("hij,ihd->jhd", p, grad[i]).to(dv.dtype)
        dq[i] = torch.einsum("hij,jhd->ihd", ds, k[j]).to(dq.dtype)
        dk[j] = torch.einsum("hij,ihd->jhd", ds, q[i]).to(dk.dtype)


def _aten_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert dropout_p == 0 and not return_debug_mask
    out, lse = forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, scale, is_causal, window_size_left, window_size_right
    )
    empty = query.new_empty(0)
    return out, lse, torch.zeros(2, dtype=torch.uint64), empty, empty


def _aten_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused,
    *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    assert dropout_p == 0 and rng_state.dtype == torch.uint64
    grads = [torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)]  # its kernel writes those zeros
    backward(
        grad_out, query, key, value, out, logsumexp, *grads, cum_seq_q, cum_seq_k, max_q, max_k, scale, is_causal,
        window_size_left, window_size_right,
    )  # fmt: skip
    return tuple(grads)


def _flash_2():
    """flash-attn 2.8.3"""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p: float, softmax_scale: float,
        causal: bool, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0, alibi_slopes=None,
        return_softmax: bool = False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors: bool = False,
    ):  # fmt: skip
        out, lse = forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size_left,
            window_size_right,
        )  # fmt: skip
        return out, lse, q.new_empty(0), torch.zeros(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
        alibi_slopes, deterministic: bool, rng_state=None, zero_tensors: bool = False,
    ):  # fmt: skip
        assert dropout_p == softcap == 0
        backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            softmax_scale, causal, window_size_left, window_size_right,
        )  # fmt: skip
        return q.new_empty(0)

    return locals()


def _flash_3():
    """hopper/flash_attn_interface.py as of 2026"""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None,
        seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None,
        leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None,
        v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0,
        softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        out, lse = forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size_left,
            window_size_right,
        )  # fmt: skip
        return out, lse, q.new_empty(0), q.new_empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            softmax_scale, is_causal, window_size_left, window_size_right,
        )  # fmt: skip
        return q.new_empty(0)

    return locals()


def _flash_4():
    """flash_attn/cute/interface.py as of August 2026; a window without bound is None, and -1 is one of minus one."""

    def bounds(left, right):
        assert all(x is None or x >= 0 for x in (left, right))
        return (-1 if x is None else x for x in (left, right))

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, return_lse=False, out=None, lse=None,
    ):  # fmt: skip
        assert return_lse
        found = forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
            *bounds(window_size_left, window_size_right),
        )  # fmt: skip
        return *found, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, dlse=None,
    ):  # fmt: skip
        backward(
            dout, q, k, v, out, lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
            causal, *bounds(window_size_left, window_size_right),
        )  # fmt: skip
        return dq, dk, dv

    return locals()


# name of the backend: (name of the module, its functions)
_MODULES = {
    "flash_attn_2": ("flash_attn.flash_attn_interface", _flash_2),
    "flash_attn_3": ("flash_attn_interface", _flash_3),
    "flash_attn_4": ("flash_attn.cute.interface", _flash_4),
}


@contextlib.contextmanager
def installed(name, monkeypatch):
    """Within it the library of the backend `name` stands on this machine."""
    from titans_pretrain.kernels.attention import libraries

    if name == "aten":  # torch's own operators, which have no kernel for CPUs
        library = torch.library.Library("aten", "IMPL", "CPU")
        library.impl("_flash_attention_forward", _aten_forward)
        library.impl("_flash_attention_backward", _aten_backward)
        yield
        library._destroy()
        return
    module, functions = _MODULES[name]
    with monkeypatch.context() as patch:
        parts = module.split(".")
        for n in range(1, len(parts) + 1):
            path = ".".join(parts[:n])
            patch.setitem(sys.modules, path, types.ModuleType(path))
        stand_in = sys.modules[module]
        for key, function in functions().items():
            setattr(stand_in, key, function)
        libraries._import.cache_clear()
        yield
    libraries._import.cache_clear()
