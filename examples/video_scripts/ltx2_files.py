"""LTX-2 from a folder, from the Hub, or from the single file in which it is published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, LTX2Pipeline
from diffusers.loaders import single_file_utils
from diffusers.pipelines import ltx2
from transformers import AutoModelForImageTextToText, AutoTokenizer

from vsa_diffusers.files import MissingDirectoryError, local_directory, opened_tensors, read_json
from vsa_diffusers.generation.loading import DTYPES, load_pipeline

_SINGLE_FILES = (".safetensors", ".sft")
_CONFIG_FILES = ["*.json", "*/*.json"]
_CONNECTORS = "model.diffusion_model.video_embeddings_connector.", "model.diffusion_model.audio_embeddings_connector."
_TEXT = {
    _CONNECTORS[0]: "video_connector.",
    _CONNECTORS[1]: "audio_connector.",
    "text_embedding_projection.aggregate_embed.": "text_proj_in.",
    "transformer_1d_blocks.": "transformer_blocks.",
    "q_norm.": "norm_q.",
    "k_norm.": "norm_k.",
}
_VOCODER = {
    "vocoder.": "", "ups.": "upsamplers.", "resblocks.": "resnets.", "conv_pre.": "conv_in.", "conv_post.": "conv_out.",
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


def _renaming(names: Mapping[str, str]) -> Callable[[Tensors], Tensors]:
    def rename(tensors: Tensors) -> Tensors:
        return {_replaced(key, names): tensor for key, tensor in tensors.items()}

    return rename


def _replaced(key: str, names: Mapping[str, str]) -> str:
    for theirs, ours in names.items():
        key = key.replace(theirs, ours)
    return key


# By component: how its keys begin in the published file, and what gives them diffusers' names. The pipeline's own
# from_single_file cannot: its first component takes the weights of all, and of connectors and vocoder it knows none.
_LAYOUT: dict[str, tuple[tuple[str, ...], Callable[[Tensors], Tensors]]] = {
    "transformer": (("model.diffusion_model.",), single_file_utils.convert_ltx2_transformer_to_diffusers),
    "vae": (("vae.",), single_file_utils.convert_ltx2_vae_to_diffusers),
    "audio_vae": (("audio_vae.",), single_file_utils.convert_ltx2_audio_vae_to_diffusers),
    "connectors": ((*_CONNECTORS, "text_embedding_projection."), _renaming(_TEXT)),
    "vocoder": (("vocoder.",), _renaming(_VOCODER)),
}


def load_ltx2(checkpoint: str, *, text_encoder: str | None, config: str, dtype: str) -> DiffusionPipeline:
    """An LTX-2 pipeline, in main memory.

    Args:
        checkpoint: a folder in diffusers' layout, a repository on the Hub, or a file with all of LTX-2 but its text
            encoder, under the names of Lightricks' own release.
        text_encoder: a folder or repository with Gemma and its tokenizer, instead of the pipeline's own.
        config: for a single file, the folder or repository that has the configs of its parts, and the text encoder, if
            that is not given.
        dtype: one of `DTYPES`.

    Raises:
        ValueError, OSError: something is missing, is not LTX-2, or does not fit the config.
    """
    if Path(checkpoint).suffix in _SINGLE_FILES:
        if not Path(checkpoint).is_file():
            raise MissingDirectoryError(f"checkpoint={checkpoint!r}: no such file; check the path.")
        text = _load_text(text_encoder, dtype) if text_encoder else _load_text(config, dtype, own=True)
        return LTX2Pipeline(**text, **_load_parts(Path(checkpoint), config, DTYPES[dtype]))
    pipe = load_pipeline(checkpoint, dtype=dtype)
    if not type(pipe).__name__.startswith("LTX2"):
        raise ValueError(f"checkpoint={checkpoint!r} is a {type(pipe).__name__}; this script is for LTX-2.")
    if text_encoder:
        pipe.register_modules(**_load_text(text_encoder, dtype))
    return pipe


def _load_text(source: str, dtype: str, own: bool = False) -> dict[str, Any]:
    """Text encoder and tokenizer, of a folder for themselves, or of a pipeline."""
    if not Path(source).is_dir() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        name = "config" if own else "text_encoder_path"
        raise MissingDirectoryError(f"{name}={source!r}: no such directory; check the path.")
    model, tokenizer = ({"subfolder": name} if own else {} for name in ("text_encoder", "tokenizer"))
    return {
        "text_encoder": AutoModelForImageTextToText.from_pretrained(source, dtype=DTYPES[dtype], **model),
        "tokenizer": AutoTokenizer.from_pretrained(source, **tokenizer),
    }


def _load_parts(path: Path, config: str, dtype: torch.dtype) -> dict[str, Any]:
    """Everything but the text encoder, from the single file."""
    folder = local_directory(config, _CONFIG_FILES)
    index = read_json(folder / "model_index.json")
    parts: dict[str, Any] = {
        "scheduler": getattr(diffusers, index["scheduler"][1]).from_pretrained(folder, subfolder="scheduler")
    }
    for name, (begins, rename) in _LAYOUT.items():
        with opened_tensors(path) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys() if key.startswith(begins)}  # noqa: SIM118 (no dict)
        if not tensors:
            raise ValueError(f"checkpoint={str(path)!r} holds no {name}; it is not all of LTX-2 in one file.")
        library, class_name = index[name]
        cls = getattr(ltx2 if library == "ltx2" else diffusers, class_name)
        with init_empty_weights():
            model = cls.from_config(cls.load_config(folder, subfolder=name))
        try:
            model.load_state_dict({key: each.to(dtype) for key, each in rename(tensors).items()}, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"checkpoint={str(path)!r} does not fit the {name} of config={config!r} "
                f"({' '.join(str(error).split())[:300]}); name the repository that it belongs to with --config, or "
                "pass a folder in diffusers' layout."
            ) from error
        parts[name] = model.eval()
    return parts
