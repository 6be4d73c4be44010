"""The transformer to train: loaded, with gates or a LoRA, sparse, and the right parameters learning."""

from __future__ import annotations

import diffusers
import torch

from vsa_diffusers import VSAConfig, add_gate_compress, enable_vsa
from vsa_diffusers.models import require_family

from .command_line import check_pretrained
from .description import Description
from .options import Options
from .parameters import block_prefixes, choose_trainable, is_gate, is_lora


def load_transformer(options: Options, description: Description) -> torch.nn.Module:
    """The pretrained transformer, in fp32."""
    check_pretrained(options.pretrained_model_name_or_path, options.subfolder)
    return getattr(diffusers, description.transformer).from_pretrained(
        options.pretrained_model_name_or_path, subfolder=options.subfolder, dtype=torch.float32
    )


def vsa_config(options: Options) -> VSAConfig:
    """The attention that is trained for."""
    return VSAConfig(
        top_k_ratio=options.top_k_ratio,
        combine=options.combine,
        selection=options.selection,
        block_size=tuple(options.block_size),
        dense_layers=tuple(options.dense_layers),
        schedule="constant",
    )


def prepare_transformer(transformer: torch.nn.Module, options: Options) -> None:
    """Add gates and a LoRA as the options say, make attention sparse, and choose what learns."""
    if options.combine == "gate":
        add_gate_compress(transformer)
    if options.rank:
        add_lora(transformer, options)
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(is_lora(name) or is_gate(name))
    else:
        choose_trainable(transformer, options.trainable)
    modules = require_family(transformer).video_modules(transformer)
    enable_vsa(transformer, config=vsa_config(options))
    # Gates of dense layers take no part, which distributed training does not allow of trainable parameters.
    names = list(modules)
    if len({layer % len(names) for layer in options.dense_layers}) == len(names):
        raise ValueError(
            f"dense_layers={options.dense_layers} leaves none of the {len(names)} video self-attention layers of "
            f"{type(transformer).__name__} sparse; name fewer, or none."
        )
    for layer in options.dense_layers:
        for name, parameter in modules[names[layer]].named_parameters():
            if is_gate(f"{names[layer]}.{name}"):
                parameter.requires_grad_(False)
    if options.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()


def add_lora(transformer: torch.nn.Module, options: Options) -> None:
    """Add a LoRA of the options' rank to the layers that they name."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.lora_alpha or options.rank,
        lora_dropout=options.lora_dropout,
        target_modules=lora_targets(transformer, options.lora_target),
        init_lora_weights=True,
    )
    if hasattr(transformer, "add_adapter"):
        transformer.add_adapter(config)
    else:
        inject_adapter_in_model(config, transformer, "default")


def lora_targets(transformer: torch.nn.Module, target: str) -> list[str]:
    """Names for peft.

    Raises:
        ValueError: there is no such layer.
    """
    if target not in ("attention", "linear"):
        names = target.split(",")
        known = [name for name, _ in transformer.named_modules()]
        missing = [name for name in names if not any(f".{each}".endswith(f".{name}") for each in known)]
        if missing:
            raise ValueError(
                f"lora_target={target!r} names {missing}, but {type(transformer).__name__} has no such layer."
            )
        return names
    modules = require_family(transformer).video_modules(transformer)
    prefixes = tuple(f"{name}." for name in modules) if target == "attention" else block_prefixes(transformer)
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and not is_gate(f"{name}.weight") and name.startswith(prefixes)
    ]


def shrink_frozen(transformer: torch.nn.Module, dtype: torch.dtype, but: torch.nn.Module | None = None) -> None:
    """Store parameters that do not learn in `dtype`, but for those that diffusers keeps in fp32, or `but` has, too."""
    precise = tuple(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    shared = set() if but is None else {id(parameter) for parameter in but.parameters()}
    for name, parameter in transformer.named_parameters():
        kept = parameter.requires_grad or id(parameter) in shared or any(part in name for part in precise)
        if not kept:
            parameter.data = parameter.data.to(dtype)
