"""Attention functions. They take no keyword that one of the two programs does not know."""

from __future__ import annotations

from backend import operations


def attention_pytorch(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, transformer_options=None):
    """q, k, v [B, L, H * d], or [B, H, L, d] with skip_reshape -> [B, L, H * d]."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = operations.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def attention_sage(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, transformer_options=None):
    """One that knows a few sizes of heads alone."""
    width = q.shape[-1] if skip_reshape else q.shape[-1] // heads
    assert width in (16, 64, 96, 128), f"heads of {width} channels"
    return attention_pytorch(q, k, v, heads, mask, None, skip_reshape)


attention_function = attention_pytorch
