"""Names of weights in published checkpoints, as diffusers' models have them, and layouts that cannot be served."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PREFIX = re.compile(r"^(?:(?:model\.diffusion_model|diffusion_model|transformer|module|_orig_mod|model)\.)+")
_WRAPPED = re.compile(r"\.(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_BLOCK = r"^((?:vace_)?blocks\.\d+\.)"
_WAN = (
    # Wan's own names.
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"(\.attn[12]\.)([qkv])\.(?=weight|bias)", r"\1to_\2."),
    (r"(\.attn[12]\.)o\.(?=weight|bias)", r"\1to_out.0."),
    (r"(\.attn2\.)([kv])_img\.", r"\1add_\2_proj."),
    (r"(\.attn2\.)norm_k_img\.", r"\1norm_added_k."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (_BLOCK + r"norm3\.", r"\1norm2."),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
    (r"^(time|text)_embedding\.0\.", r"condition_embedder.\1_embedder.linear_1."),
    (r"^(time|text)_embedding\.2\.", r"condition_embedder.\1_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    # FastVideo's, which its exports mix with diffusers'.
    (_BLOCK + r"(to_[qkv]|to_gate_compress|norm_[qk])\.", r"\1attn1.\2."),
    (_BLOCK + r"to_out\.", r"\1attn1.to_out."),
    (r"(\.attn[12]\.to_out)\.(?=weight|bias)", r"\1.0."),
    (r"\.ffn\.fc_in\.", ".ffn.net.0.proj."),
    (r"\.ffn\.fc_out\.", ".ffn.net.2."),
    (r"\.self_attn_residual_norm\.norm\.", ".norm2."),
    (r"^(condition_embedder\.(?:time|text)_embedder)\.(?:mlp\.)?fc_in\.", r"\1.linear_1."),
    (r"^(condition_embedder\.(?:time|text)_embedder)\.(?:mlp\.)?fc_out\.", r"\1.linear_2."),
    (r"^condition_embedder\.time_modulation\.linear\.", "condition_embedder.time_proj."),
)
_RENAMES = {"Wan": tuple((re.compile(pattern), new) for pattern, new in _WAN)}

_FOREIGN = (
    (r"\.proj_l\.", "sparse-linear attention (SLA), whose tiles and linear branch are not VSA's"),
    (
        r"\.(qkv_proj|mlp\.fc1)\.",
        "ComfyUI's or the native release's names, with fused projections and halves swapped; take the repository "
        "with diffusers' names",
    ),
    (
        r"\.(weight_scale(_\d)?|scale_weight|weight_scale_inv|input_scale|absmax|quant_state\b.*|weight_packed)$",
        "weights quantised in a format of their own; take the repository in bf16",
    ),
    (r"\.diff_m$|\.lora_(up|down)\.|\.alpha$", "a LoRA of another format than fastvideo-lora-v2"),
)


def plain_name(key: str, family: str = "") -> str:
    """A weight's name in diffusers' model of this family, for the one in a published file."""
    name = _WRAPPED.sub("", _PREFIX.sub("", key))
    for pattern, new in _RENAMES.get(family, ()):
        name = pattern.sub(new, name)
    return name


def why_foreign(keys: Iterable[str]) -> str | None:
    """What these names say about a layout that cannot be served, with one of them; `None` if nothing."""
    for key in keys:
        for pattern, what in _FOREIGN:
            if re.search(pattern, key):
                return f"{key} belongs to {what}"
    return None
