"""What is known of an attention module's `to_gate_compress`: whether it is trained, and whether it has changed."""

from __future__ import annotations

import torch

GATE = "to_gate_compress"
_TRAINED = "_vsa_trained"


def is_trained(attn: torch.nn.Module) -> bool | None:
    """Whether an attention module's gate is anything but all zeros; `None` if there is no gate.

    Looks at its values, so call it outside of the loop. Where they cannot be looked at, as after offloading or
    quantising, the gate is asked for an output instead; and where it has no values at all, it is what it was when it
    was added, loaded or looked at.

    Raises:
        ValueError: it has no values, and nobody knows where it comes from.
    """
    gate = getattr(attn, GATE, None)
    if gate is None:
        return None
    parameters = dict(gate.named_parameters())
    whole = any(name.endswith("weight") for name in parameters)  # quantised ones may be buffers, or packed
    if whole and all(map(_is_readable, parameters.values())):
        trained = any(bool(parameter.detach().any()) for parameter in parameters.values())
    elif (output := _output(gate)) is not None:
        trained = bool(output.any())
    elif hasattr(gate, _TRAINED):
        return bool(getattr(gate, _TRAINED))
    else:
        raise ValueError(
            f"{type(attn).__name__} has a {GATE} without values, so that nothing tells whether it is trained; load the "
            'weights before, or choose combine="gate" or combine="merge".'
        )
    mark_trained(gate, trained)
    return trained


def gate_version(attn: torch.nn.Module) -> tuple[int, ...] | None:
    """Another value after the gate was loaded, replaced or trained; `None` if there is no gate.

    Costs no synchronisation, so every forward can compare it, outside of what `torch.compile` sees. It tells what
    PyTorch counts: optimisers, `load_state_dict`, writing in place; not writing through `.data`. Offloaded gates do not
    change.
    """
    gate = getattr(attn, GATE, None)
    if gate is None:
        return None
    parameters = list(gate.parameters())
    if any(parameter.is_meta for parameter in parameters):
        return ()
    return tuple(
        number
        for parameter in parameters
        for number in (id(parameter), -1 if parameter.is_inference() else parameter._version)
    )


def mark_trained(gate: torch.nn.Module, trained: bool) -> None:
    """Keep with the gate what was known of it when it was added, loaded or looked at."""
    setattr(gate, _TRAINED, trained)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether this is a tensor of floating-point numbers that are here: not offloaded, quantised or sharded."""
    ordinary = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return ordinary and not tensor.is_meta and tensor.is_floating_point()


def _is_readable(parameter: torch.Tensor) -> bool:
    return is_plain(parameter) or hasattr(parameter, "full_tensor")


def _output(gate: torch.nn.Module) -> torch.Tensor | None:
    """What the gate makes of a fixed input, or `None` if it has no values; hooks bring those that are offloaded."""
    features = getattr(gate, "in_features", None)
    if features is None:
        return None
    held = [*gate.parameters(), *gate.buffers()]
    dtype = next((t.dtype for t in reversed(held) if t.is_floating_point() and t.dtype.itemsize > 1), None)
    device = torch.device("cpu") if not held or hasattr(gate, "_hf_hook") else held[0].device
    hidden = torch.rand(1, features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = gate(hidden.to(device, dtype or torch.get_default_dtype()))
    return None if output.is_meta else output
