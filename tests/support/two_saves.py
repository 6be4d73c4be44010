"""Saves of two models that share nothing, and which of them a directory holds."""

from tiny_fine_tuned import WAN
from vsa_diffusers import VSAConfig, load_gates, load_vsa, save_vsa
from vsa_diffusers.pipeline import enabled_config

KINDS = {"full": {}, "shards": dict(max_shard_size="60KB"), "lora": {}, "gates": dict(contents="gates")}
RATIOS = (0.25, 0.75)


def save(folder, models, which, kind):
    save_vsa(models[which], folder, config=VSAConfig(RATIOS[which], combine="gate"), **KINDS[kind])


def values(model):
    return {key.replace(".default.", ".vsa."): value for key, value in model.state_dict().items()}


def number_of(found, models, keys):
    """Number of the model that has these values."""
    [which] = [n for n, model in enumerate(models) if all(found[key].equal(values(model)[key]) for key in keys)]
    return which


def came_back(folder, models):
    """Number of the model that `load_vsa` brings back, every value and the config."""
    loaded = load_vsa(WAN.build(), folder)
    saved = [key for key in values(loaded) if "to_gate" in key or "lora_" in key] or list(values(loaded))
    which = number_of(values(loaded), models, saved)
    assert enabled_config(loaded).top_k_ratio == RATIOS[which]
    return which


def gates_that_came_back(path, models):
    """Number of the model whose gates `load_gates` brings back."""
    loaded = WAN.build()
    load_gates(loaded, path)
    return number_of(values(loaded), models, [key for key in values(loaded) if "to_gate" in key])
