"""What people stack on a transformer besides VSA, each as a function that applies it, for tests of one and of pairs."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from diffusers import hooks
from diffusers.hooks import apply_layer_skip

from tiny_models import Recipe
from vsa_diffusers import enable_vsa, set_top_k_ratio
from vsa_diffusers.pipeline import unwrap

STEPS = 3
CPU = torch.device("cpu")


@dataclass
class Stack:
    """A transformer with things stacked on it.

    Args:
        model: what is called.
        recipe: what it was built by.
        folder: for files.
        contexts: makers of the contexts in which it is called.
        step: the denoising step that is running, for what asks for it.
    """

    model: Any
    recipe: Recipe
    folder: Path
    contexts: list[Callable[[], Any]] = field(default_factory=list)
    step: int = 0

    @property
    def base(self) -> Any:
        """The transformer itself, without what was put around it."""
        return unwrap(self.model)

    @property
    def blocks(self) -> str:
        """Where the transformer's blocks are."""
        return "blocks" if hasattr(self.base, "blocks") else "transformer_blocks"

    def denoise(self, grid: tuple[int, int, int], steps: int = STEPS) -> torch.Tensor:
        """The outputs of a short denoising loop, which begins anew at every call."""
        if self.base.is_cache_enabled:
            self.base._reset_stateful_cache()
        torch.manual_seed(1)
        inputs = self.recipe.inputs(grid)
        timesteps = torch.linspace(700, 100, steps).long()
        outputs = []
        for i, t in enumerate(timesteps):
            self.step = i
            inputs["timestep"] = torch.full_like(inputs["timestep"], int(t))
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                place = dict(step_index=i, num_inference_steps=steps, sigma=int(t) / 1000)
                stack.enter_context(self.base.cache_context("cond", **place))
                for context in self.contexts:
                    stack.enter_context(context())
                output = self.model(**inputs, return_dict=False)[0]
            outputs.append(output.float())
            inputs["hidden_states"] = inputs["hidden_states"] - 0.1 * output.float().to(inputs["hidden_states"].dtype)
        return torch.stack(outputs)

    def enable(self, top_k_ratio: float) -> None:
        enable_vsa(self.model, top_k_ratio)

    def set_ratio(self, top_k_ratio: float) -> None:
        set_top_k_ratio(self.model, top_k_ratio)


@dataclass(frozen=True)
class Feature:
    """One thing that is stacked.

    Args:
        apply: does it to a stack.
        kind: which things are alternatives of one another.
        tolerance: relative error against dense with the same things, at ratio 1.0.
        needs: packages that are not always installed.
    """

    apply: Callable[[Stack], None]
    kind: str
    tolerance: float = 1e-4
    needs: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return [name for name in self.needs if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def compiled(stack: Stack) -> None:
    stack.model = torch.compile(stack.model, backend="eager")


def compiled_in_place(stack: Stack) -> None:
    stack.base.compile(backend="eager")


def compiled_blocks(stack: Stack) -> None:
    stack.base.compile_repeated_blocks(backend="eager")


def model_offload(stack: Stack) -> None:
    _, stack.hook = accelerate.cpu_offload_with_hook(stack.base, execution_device=CPU)


def sequential_offload(stack: Stack) -> None:
    accelerate.cpu_offload(stack.base, execution_device=CPU)


def disk_offload(stack: Stack) -> None:
    accelerate.disk_offload(stack.base, str(stack.folder / "offload"), execution_device=CPU)


def group_offload(offload_type: str, to_disk: bool = False, **options: Any) -> Callable[[Stack], None]:
    def apply(stack: Stack) -> None:
        path = {"offload_to_disk_path": str(stack.folder / "groups")} if to_disk else {}
        stack.base.enable_group_offload(CPU, CPU, offload_type, **options, **path)

    return apply


def layerwise_casting(stack: Stack) -> None:
    stack.base.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _adapter(stack: Stack, name: str) -> None:
    from peft import LoraConfig

    torch.manual_seed(len(name))
    stack.base.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), name)


def lora(stack: Stack) -> None:
    _adapter(stack, "default")


def two_loras(stack: Stack) -> None:
    _adapter(stack, "one")
    _adapter(stack, "second")
    stack.base.set_adapters(["one", "second"], [0.7, 0.4])


def fused_lora(stack: Stack) -> None:
    _adapter(stack, "fused")
    stack.base.fuse_lora(adapter_names=["fused"])


def torchao(stack: Stack) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(stack.base, Int8WeightOnlyConfig())


def quanto(stack: Stack) -> None:
    from optimum.quanto import freeze, qint8, quantize

    quantize(stack.base, weights=qint8)
    freeze(stack.base)


def cache(make: Callable[[Stack], Any]) -> Callable[[Stack], None]:
    return lambda stack: stack.base.enable_cache(make(stack))


# Not lambdas: what holds them may be pickled.
def _timestep() -> int:
    return 500


def _weight(_: torch.nn.Module) -> float:
    return 0.5


def pyramid(stack: Stack) -> Any:
    return hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=_timestep,
    )  # fmt: skip


def faster(stack: Stack) -> Any:
    return hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000),
        unconditional_batch_skip_range=2, unconditional_batch_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=(rf"{stack.blocks}.*attn",), attention_weight_callback=_weight,
        current_timestep_callback=_timestep, tensor_format="BCFHW",
    )  # fmt: skip


def mag(stack: Stack) -> Any:
    return hooks.MagCacheConfig(
        num_inference_steps=STEPS, retention_ratio=0.3, max_skip_steps=1, mag_ratios=torch.ones(STEPS)
    )


def taylor(stack: Stack) -> Any:
    return hooks.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32,
        cache_identifiers=[rf"{stack.blocks}\.\d+\.attn1?"],
    )  # fmt: skip


def attention_backend(name: str) -> Callable[[Stack], None]:
    return lambda stack: stack.base.set_attention_backend(name)


def in_context(make: Callable[[], Any]) -> Callable[[Stack], None]:
    return lambda stack: stack.contexts.append(make)


def copied(copy_of: Callable[[Any], Any]) -> Callable[[Stack], None]:
    def apply(stack: Stack) -> None:
        stack.model = copy_of(stack.model)

    return apply


def layer_skip(stack: Stack) -> None:
    last = len(getattr(stack.base, stack.blocks)) - 1
    apply_layer_skip(stack.base, hooks.LayerSkipConfig(indices=[last], fqn=stack.blocks))


def half(stack: Stack) -> None:
    stack.base.to(torch.bfloat16)
    stack.contexts.append(lambda: torch.autocast("cpu", torch.bfloat16))


def ema(stack: Stack) -> None:
    model = diffusers.training_utils.EMAModel(stack.base.parameters(), decay=0.5)
    model.step(stack.base.parameters())
    with torch.no_grad():
        for parameter in stack.base.parameters():
            parameter.mul_(1.05)
    model.step(stack.base.parameters())
    model.copy_to(stack.base.parameters())


FEATURES = {
    "torch.compile": Feature(compiled, "compile"),
    "compile": Feature(compiled_in_place, "compile"),
    "compile_repeated_blocks": Feature(compiled_blocks, "compile"),
    "model offload": Feature(model_offload, "offload"),
    "sequential offload": Feature(sequential_offload, "offload"),
    "disk offload": Feature(disk_offload, "offload"),
    "group offload of blocks": Feature(group_offload("block_level", num_blocks_per_group=1), "offload"),
    "group offload of leaves": Feature(group_offload("leaf_level"), "offload"),
    "group offload to disk": Feature(group_offload("leaf_level", to_disk=True), "offload"),
    "layerwise casting": Feature(layerwise_casting, "cast"),
    "bf16": Feature(half, "precision", 0.05),
    "autocast": Feature(in_context(lambda: torch.autocast("cpu", torch.bfloat16)), "precision", 0.05),
    "inference mode": Feature(in_context(torch.inference_mode), "context"),
    "LoRA": Feature(lora, "adapter"),
    "two LoRAs": Feature(two_loras, "adapter"),
    "fused LoRA": Feature(fused_lora, "adapter"),
    "EMA": Feature(ema, "weights"),
    "torchao": Feature(torchao, "quantised", needs=("torchao",)),
    "quanto": Feature(quanto, "quantised", needs=("optimum.quanto",)),
    "PyramidAttentionBroadcast": Feature(cache(pyramid), "cache"),
    "FasterCache": Feature(cache(faster), "cache"),
    "FirstBlockCache": Feature(cache(lambda _: hooks.FirstBlockCacheConfig(threshold=10.0)), "cache"),
    "MagCache": Feature(cache(mag), "cache"),
    "SeaCache": Feature(cache(lambda _: hooks.SeaCacheConfig(threshold=100.0)), "cache"),
    "TaylorSeerCache": Feature(cache(taylor), "cache"),
    "LayerSkip": Feature(layer_skip, "skip"),
    "native backend": Feature(attention_backend("native"), "backend"),
    "math backend": Feature(attention_backend("_native_math"), "backend"),
    "fused projections": Feature(lambda stack: stack.base.fuse_qkv_projections(), "fused"),
    "DataParallel": Feature(lambda stack: setattr(stack, "model", torch.nn.DataParallel(stack.model)), "wrapper"),
    "deepcopy": Feature(copied(copy.deepcopy), "copy"),
    "pickle": Feature(copied(lambda model: pickle.loads(pickle.dumps(model))), "copy"),
}  # fmt: skip
# Whether what is stacked changes what the dense model computes, by more than rounding in fp32.
EFFECTS = {
    "compile": False, "offload": False, "cast": True, "precision": True, "context": False, "adapter": True,
    "weights": True, "quantised": True, "cache": True, "skip": True, "backend": False, "fused": False,
    "wrapper": False, "copy": False,
}  # fmt: skip


def _of(*kinds: str) -> set[str]:
    return {name for name, feature in FEATURES.items() if feature.kind in kinds}


_GROUPS = {name for name in _of("offload") if name.startswith("group")}
_ON_DISK = {"disk offload", "group offload to disk"}

# Pairs that fail without VSA, too: what comes first, what comes then, and why.
EXCLUDED = [
    (_of("offload"), _of("offload"), "a transformer is offloaded in one way"),
    (_of("cache"), _of("cache"), "diffusers: caching has already been enabled"),
    (_of("quantised"), _of("quantised"), "weights are quantised in one way"),
    (
        {"sequential offload", "group offload to disk", "disk offload"}, _of("adapter", "quantised", "fused"),
        "the weights are not in memory any more",
    ),
    (_of("offload") - _GROUPS, {"pickle"}, "accelerate's hooks are local functions"),
    (_GROUPS, _of("copy"), "the hooks of group offloading hold a module of Python's"),
    ({"group offload to disk"}, {"bf16"} | _of("copy"), "weights come back from disk as they were, or undefined"),
    (
        {"layerwise casting"}, _of("adapter", "weights", "quantised", "fused", "copy"),
        "the weights are in fp8 by then, which has no arithmetic",
    ),
    ({"torchao"}, _ON_DISK, "safetensors cannot hold torchao's tensors"),
    ({"torchao"}, {"fused LoRA", "EMA", "fused projections", "pickle"}, "torchao's tensors lack the operators"),
    ({"quanto"}, _ON_DISK | {"sequential offload"}, "quanto's tensors cannot be moved to disk or to meta"),
    ({"quanto"}, {"layerwise casting", "bf16", "autocast", "deepcopy"}, "quanto's tensors keep their dtype"),
    ({"autocast"}, {"quanto"}, "quanto's tensors keep their dtype"),
    (_of("cache", "skip"), {"pickle"}, "the hooks of diffusers are local functions"),
    ({"FirstBlockCache"}, {"LayerSkip"}, "the cache takes its residual from the block that is skipped"),
    ({"FirstBlockCache", "TaylorSeerCache"}, {"deepcopy"}, "the copied hooks lose the context of the cache"),
]  # fmt: skip
# Pairs after which a copy is none: nothing that is set on it has an effect.
UNCOPIED = [({"MagCache", "SeaCache"}, {"deepcopy"}, "the copied hooks call the blocks of the original")]


def why_excluded(first: str, second: str) -> str | None:
    """Why diffusers, or another library, does not do both in this order; `None` if it does."""
    rules = (*EXCLUDED, *UNCOPIED)
    return next((reason for before, then, reason in rules if first in before and second in then), None)
