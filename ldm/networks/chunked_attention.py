"""Attention, a few heads at a time: two matrix products and a softmax, computed again in the backward pass."""

from typing import Any

import torch
from torch import Tensor

CHUNK_entries = 1 << 21  # of the weights that exist at a time: 4 MB in bfloat16, which stays in a core's cache


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v [B, heads, N, d]; q [B, heads, N, d]; k, v [B, heads, L, d]; mask [B, 1, 1, L] bool.

    At most CHUNK_entries attention weights (or one head's) are in memory, in both passes.
    """
    result: Tensor = _forward(q, k, v, mask)
    return result


# Operators of torch.library, so that torch.compile takes each as a whole instead of unrolling the loop.
SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor"
BACKWARD_SCHEMA = "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask) -> (Tensor, Tensor, Tensor)"


@torch.library.custom_op("ldm::chunked_attention", mutates_args=(), schema=SCHEMA)
def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    queries, keys, values = _scaled(q), _flat(k), _flat(v)
    hidden = _hidden(mask, q)
    out = torch.empty_like(queries)
    for part in _chunks(queries, keys):
        torch.bmm(_weights(queries[part], keys[part], _of(hidden, part)), values[part], out=out[part])
    return out.view(q.shape)


@torch.library.custom_op("ldm::chunked_attention_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """With P the weights and S the scores: dV = P^T G, dP = G V^T, dS = P (dP - sum(P dP)), dQ = dS K, dK = dS^T Q."""
    queries, keys, values, grads = _scaled(q), _flat(k), _flat(v), _flat(grad)
    hidden = _hidden(mask, q)
    dq, dk, dv = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
    for part in _chunks(queries, keys):
        weights = _weights(queries[part], keys[part], _of(hidden, part))
        torch.bmm(weights.transpose(1, 2), grads[part], out=dv[part])
        d_weights = torch.bmm(grads[part], values[part].transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        torch.bmm(d_scores, keys[part], out=dq[part])
        torch.bmm(d_scores.transpose(1, 2), queries[part], out=dk[part])
    return dq.mul_(q.shape[-1] ** -0.5).view(q.shape), dk.view(k.shape), dv.view(v.shape)


def _chunks(queries: Tensor, keys: Tensor) -> list[slice]:
    """Slices of the heads of all samples, as many in each as CHUNK_entries has room for."""
    size = max(1, CHUNK_entries // (queries.shape[1] * keys.shape[1]))
    return [slice(start, start + size) for start in range(0, len(queries), size)]


def _flat(x: Tensor) -> Tensor:
    """[B, heads, N, d] to [B heads, N, d], contiguous."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


def _scaled(q: Tensor) -> Tensor:
    scaled: Tensor = _flat(q) * q.shape[-1] ** -0.5
    return scaled


def _hidden(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """What is not attended to, for each head of each sample: [B heads, 1, L]."""
    return None if mask is None else _flat(~mask.expand(len(q), q.shape[1], -1, -1))


def _of(hidden: Tensor | None, part: slice) -> Tensor | None:
    return None if hidden is None else hidden[part]


def _weights(queries: Tensor, keys: Tensor, hidden: Tensor | None) -> Tensor:
    """The attention weights [heads, N, L]; zero, as torch's attention has it, where nothing may be attended to."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    if hidden is None:
        return torch.softmax(scores, dim=-1)
    return torch.softmax(scores.masked_fill_(hidden, -torch.inf), dim=-1).masked_fill_(hidden, 0.0)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return (*_backward(grad, *ctx.saved_tensors), None)


_forward.register_autograd(_differentiate, setup_context=_remember)
