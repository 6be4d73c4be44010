"""What is planned for: a family by name, a folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..files import MissingDirectoryError, local_directory, read_json
from ..models import REFUSED, supported_transformers
from .costs import Costs, count
from .latents import Extents
from .published import DEFAULTS, PUBLISHED, Published

_INDEX, _CONFIG = "model_index.json", "config.json"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Where VAEs of diffusers keep the frames and pixels of a latent cell.
_TEMPORAL = ("scale_factor_temporal", "temporal_compression_ratio")
_SPATIAL = ("scale_factor_spatial", "spatial_compression_ratio")


@dataclass(frozen=True)
class Model:
    """A transformer to plan for, without weights.

    Args:
        name: of the checkpoint or folder.
        transformer: class name in diffusers.
        config: constructor arguments of the class, as diffusers keeps them.
        costs: counted from the modules.
        vae: frames and pixels per latent cell, in time and in space.
        size: usual height, width and frames: those that its folder recommends, or else its family's.
        steps: usual, of one video, likewise.
        batch: 2 where both halves of guidance are one call.
        calls: of the transformer in a step.
        text_tokens: that the transformer sees.
        gates: whether it has trained gates.
        source: where the facts are from.
        unsure: what of them is inferred.
    """

    name: str
    transformer: str
    config: Any
    costs: Costs
    vae: tuple[int, int]
    size: Extents
    steps: int
    batch: int
    calls: int
    text_tokens: int
    gates: bool
    source: str
    unsure: str


def resolve(model: str) -> Model:
    """The model of this name: "wan", "Lightricks/LTX-2", or the path of a pipeline's or a transformer's folder.

    Published ids and families are known without a network; other ids are asked for their configurations alone.

    Raises:
        ValueError: there is none, it is no video transformer, or one that VSA does not fit; the message says which.
    """
    if Path(model).expanduser().is_dir():
        return _from_folder(Path(model).expanduser(), model)
    published = _published(model)
    if published is not None:
        name = model if "/" in model else published.ids[0]
        return _model(name, published.transformer, published.config, published, published.vae, published.source)
    if not _HUB_NAME.fullmatch(model):
        raise ValueError(
            f"MODEL={model!r} is neither a family, nor a folder, nor the id of a repository{_alike(model)}; families "
            f"are {', '.join(DEFAULTS)}."
        )
    try:
        folder = local_directory(model, [_INDEX, _CONFIG, f"*/{_CONFIG}"])
    except MissingDirectoryError as error:
        raise ValueError(
            f"MODEL={model!r} is not among the {len(published_ids())} checkpoints that are known without a network, "
            "and the Hugging Face Hub did not give its configuration; check the id and the connection, or name its "
            "family, such as wan."
        ) from error
    return _from_folder(folder, model)


def family_names() -> list[str]:
    """The names that stand for families."""
    return list(DEFAULTS)


def published_ids() -> list[str]:
    """The ids that are known without a network."""
    return [name for row in PUBLISHED for name in row.ids]


def _published(model: str) -> Published | None:
    wanted = _plain(model)
    named = next((checkpoint for name, checkpoint in DEFAULTS.items() if _plain(name) == wanted), model)
    return next((row for row in PUBLISHED if any(name.lower() == named.lower() for name in row.ids)), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", name.lower())


def _alike(model: str) -> str:
    names = difflib.get_close_matches(model, [*DEFAULTS, *published_ids()], n=2, cutoff=0.5)
    return f" (perhaps {' or '.join(names)} is meant)" if names else ""


def _from_folder(folder: Path, name: str) -> Model:
    """A pipeline's folder with `model_index.json`, or a transformer's with `config.json`."""
    vae = None
    if (folder / _INDEX).exists():
        index = read_json(folder / _INDEX)
        part = _video_part(index, folder)
        config = read_json(folder / part / _CONFIG)
        if (folder / "vae" / _CONFIG).exists():
            vae = compression(read_json(folder / "vae" / _CONFIG))
    elif (folder / _CONFIG).exists():
        config = read_json(folder / _CONFIG)
    else:
        raise ValueError(
            f"MODEL={name} holds neither {_INDEX} nor {_CONFIG}; pass the folder of a diffusers pipeline, or of its "
            "transformer."
        )
    cls = str(config.get("_class_name"))
    if cls in REFUSED:
        raise ValueError(f"MODEL={name}: {cls} cannot use Video Sparse Attention: {REFUSED[cls]}.")
    if cls not in supported_transformers():
        raise ValueError(
            f"MODEL={name} is a {cls}, which is no supported video transformer; supported are: "
            f"{', '.join(supported_transformers())}."
        )
    alike = next(row for row in PUBLISHED if row.transformer in (cls, _STANDS_FOR.get(cls)))
    unsure = (
        "" if vae else f"the VAE's compression, {alike.vae[0]} frames and {alike.vae[1]} pixels, is {alike.ids[0]}'s"
    )
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    known = _model(name, cls, arguments, alike, vae or alike.vae, f"{name}/{_CONFIG}", unsure)
    return _as_recommended(known, folder)


def _as_recommended(known: Model, folder: Path) -> Model:
    """With the size and steps that the folder recommends, which commands that make videos take, too."""
    from ..generation.loading import recommended_call  # diffusers takes seconds to import

    call, _ = recommended_call(folder)
    height, width, frames = known.size
    size = (call.get("height", height), call.get("width", width), call.get("num_frames", frames))
    return replace(known, size=size, steps=call.get("num_inference_steps", known.steps))


# Parts of pipelines that have no published row of their own.
_STANDS_FOR = {"CosmosControlNetModel": "CosmosTransformer3DModel"}


def _video_part(index: Mapping[str, Any], folder: Path) -> str:
    """The name of the first video transformer in a pipeline's index."""
    classes = {part: entry[1] for part, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    known = [part for part, cls in classes.items() if cls in supported_transformers() or cls in REFUSED]
    found = [part for part in known if (folder / part / _CONFIG).exists()]
    if not found:
        raise ValueError(
            f"MODEL={folder} has no supported video transformer (found: {', '.join(map(str, classes.values()))})."
        )
    return "transformer" if "transformer" in found else found[0]


def compression(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Frames and pixels per latent cell, as pipelines read them off a VAE of this configuration; `None` if they do not.

    Its weights stay on the meta device.
    """
    diffusers = importlib.import_module("diffusers")
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None:
        return None
    with torch.device("meta"):
        vae = cls.from_config(dict(config))
    known = {**vae.config, **vars(vae)}
    stages = known.get("block_out_channels")
    temporal = next((known[key] for key in _TEMPORAL if isinstance(known.get(key), int)), None)
    spatial = next((known[key] for key in _SPATIAL if isinstance(known.get(key), int)), None)
    if spatial is None and stages:
        spatial = 2 ** (len(stages) - 1)
    return None if temporal is None or spatial is None else (temporal, spatial)


def _model(
    name: str, cls: str, config: Mapping[str, Any], row: Published, vae: tuple[int, int], source: str, unsure: str = ""
) -> Model:
    diffusers = importlib.import_module("diffusers")
    if not hasattr(diffusers, cls):
        raise ValueError(f"MODEL={name} needs {cls}, which diffusers {diffusers.__version__} lacks; upgrade diffusers.")
    with torch.device("meta"):
        transformer = getattr(diffusers, cls).from_config(dict(config))
    unsure = unsure if config is not row.config else row.unsure
    return Model(
        name, cls, transformer.config, count(transformer), vae, row.size, row.steps, row.batch, row.calls,
        row.text_tokens, row.gates and config is row.config, source, unsure,
    )  # fmt: skip
