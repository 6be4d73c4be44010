"""Video Sparse Attention for diffusers: `enable_vsa(pipe, top_k_ratio=0.2)`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .logs import show_messages
from .version import __version__

if TYPE_CHECKING:
    from .attention import video_sparse_attention as video_sparse_attention
    from .attn_processor import VSAAttnProcessor as VSAAttnProcessor
    from .config import VSA_DEFAULT as VSA_DEFAULT
    from .config import VSAConfig as VSAConfig
    from .context_parallel import cp_plan as cp_plan
    from .context_parallel import spread_over_gpus as spread_over_gpus
    from .gates import add_gate_compress as add_gate_compress
    from .gates import load_gates as load_gates
    from .gates import save_gates as save_gates
    from .guidance_parallel import disable_guidance_parallel as disable_guidance_parallel
    from .guidance_parallel import enable_guidance_parallel as enable_guidance_parallel
    from .models import register_transformer as register_transformer
    from .pipeline import disable_vsa as disable_vsa
    from .pipeline import enable_vsa as enable_vsa
    from .pipeline import set_top_k_ratio as set_top_k_ratio
    from .pretrained import load_vsa as load_vsa
    from .pretrained import save_vsa as save_vsa
    from .schedule import RatioSchedule as RatioSchedule
    from .status import vsa_status as vsa_status

_HOMES = {
    "RatioSchedule": "schedule",
    "VSAAttnProcessor": "attn_processor",
    "VSAConfig": "config",
    "VSA_DEFAULT": "config",
    "add_gate_compress": "gates",
    "cp_plan": "context_parallel",
    "disable_guidance_parallel": "guidance_parallel",
    "disable_vsa": "pipeline",
    "enable_guidance_parallel": "guidance_parallel",
    "enable_vsa": "pipeline",
    "load_gates": "gates",
    "load_vsa": "pretrained",
    "register_transformer": "models",
    "save_gates": "gates",
    "save_vsa": "pretrained",
    "set_top_k_ratio": "pipeline",
    "spread_over_gpus": "context_parallel",
    "video_sparse_attention": "attention",
    "vsa_status": "status",
}
__all__ = [
    "VSA_DEFAULT",
    "RatioSchedule",
    "VSAAttnProcessor",
    "VSAConfig",
    "__version__",
    "add_gate_compress",
    "cp_plan",
    "disable_guidance_parallel",
    "disable_vsa",
    "enable_guidance_parallel",
    "enable_vsa",
    "load_gates",
    "load_vsa",
    "register_transformer",
    "save_gates",
    "save_vsa",
    "set_top_k_ratio",
    "spread_over_gpus",
    "video_sparse_attention",
    "vsa_status",
]

show_messages()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
