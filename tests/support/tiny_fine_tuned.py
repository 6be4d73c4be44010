"""A tiny Wan transformer as training leaves it, and all there is to compare of one."""

import torch
from peft import LoraConfig

from tiny_models import RECIPES, run
from vsa_diffusers import add_gate_compress, enable_vsa

WAN = RECIPES[0]
GRID = (5, 10, 12)


def fine_tuned(model, lora=False, gates=True, seed=3):
    """As training would leave it: every parameter that learns is another one."""
    torch.manual_seed(seed)
    if gates:
        add_gate_compress(model)
    if lora:
        model.add_adapter(LoraConfig(r=2, target_modules=["attn1.to_q", "attn1.to_out.0"], lora_alpha=6))
    for name, parameter in model.named_parameters():
        if not lora or "lora_" in name or "to_gate_compress" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return enable_vsa(model, 0.3, block_size=(2, 2, 2), combine="gate" if gates else "merge", dense_layers=(0,))


def everything(model, video=True):
    """Values, modules, processors, hooks, adapters and what learns."""
    return {
        "values": {key: tensor.clone() for key, tensor in model.state_dict().items()},
        "modules": {name: id(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "processors": {
            name: id(module.processor) for name, module in model.named_modules() if hasattr(module, "processor")
        },
        "hooks": [*model._forward_pre_hooks.values(), *model._forward_hooks.values()],
        "adapters": {name: repr(config) for name, config in getattr(model, "peft_config", {}).items()},
        "active": getattr(model, "active_adapters", list)() if getattr(model, "peft_config", None) else [],
        "learns": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "video": run(model, WAN, GRID) if video else None,
    }


def differences(before, after):
    """Names of what is not the same."""

    def same(one, other):
        if isinstance(one, torch.Tensor):
            return one.equal(other)
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        return one == other

    return [name for name in before if not same(before[name], after[name])]
