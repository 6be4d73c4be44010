"""Stand-ins for packages that the benchmark measures, with their signatures, computing what their sources say."""

import math
import types

import torch
import torch.nn.functional as F


def fastvideo_kernel() -> types.ModuleType:
    """Of 0.3.1: the tokens of a padded tile come first."""

    def video_sparse_attn(
        q, k, v, variable_block_sizes, q_variable_block_sizes, topk, block_size=64, compress_attn_weight=None
    ):
        slots = math.prod(block_size)
        sizes = variable_block_sizes
        q_mean, k_mean, v_mean = (x.unflatten(2, (-1, slots)).sum(3) / sizes[:, None] for x in (q, k, v))
        scores = q_mean @ k_mean.transpose(-1, -2) / q.shape[-1] ** 0.5
        coarse = (scores.softmax(-1) @ v_mean).repeat_interleave(slots, 2)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(topk).indices, True)
        held = (torch.arange(slots) < sizes[:, None]).flatten()
        mask = kept.repeat_interleave(slots, 2).repeat_interleave(slots, 3) & held
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask) + coarse * compress_attn_weight

    module = types.ModuleType("fastvideo_kernel")
    module.video_sparse_attn = video_sparse_attn
    return module


def sageattention() -> types.ModuleType:
    """Of 1.0.6: it takes the mean from the caller's keys."""

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
        assert tensor_layout in ("HND", "NHD")
        if smooth_k:
            k -= k.mean(1 if tensor_layout == "NHD" else 2, keepdim=True)
        if tensor_layout == "NHD":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=sm_scale)
        return out.transpose(1, 2) if tensor_layout == "NHD" else out

    module = types.ModuleType("sageattention")
    module.sageattn = sageattn
    return module
