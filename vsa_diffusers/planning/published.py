"""Facts of published checkpoints, so that planning for them needs neither their weights nor a network.

Where each row is from stands in its `source`: `scripts/...` are conversion scripts in diffusers' repository, which hold
the configurations; "defaults" are those of the transformer's class; sizes, frames and steps are the defaults of the
pipeline's `__call__`, or those of the example in its docstring where there are none. Guidance is as the pipeline makes
it: both halves in one batch, or one call after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """One transformer as it was published.

    Args:
        ids: on the Hugging Face Hub.
        transformer: class name in diffusers.
        config: constructor arguments that differ from the defaults of the class.
        size: height and width in pixels, and frames.
        source: where these facts were read.
        vae: frames and pixels per latent cell, in time and in space.
        steps: of one video.
        batch: 2 where both halves of guidance are one call.
        calls: of the transformer in a step.
        text_tokens: that the transformer sees.
        gates: whether it has trained gates.
        unsure: what is inferred instead of read.
    """

    ids: tuple[str, ...]
    transformer: str
    config: dict[str, Any]
    size: tuple[int, int, int]
    source: str
    vae: tuple[int, int] = (4, 8)
    steps: int = 50
    batch: int = 1
    calls: int = 2
    text_tokens: int = 512
    gates: bool = False
    unsure: str = ""


_WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_COSMOS_2B = {"num_attention_heads": 16, "extra_pos_embed_type": None}
_COSMOS_14B = {"num_attention_heads": 40, "num_layers": 36, "extra_pos_embed_type": None}
_COSMOS_25 = {"in_channels": 17, "use_crossattn_projection": True, "crossattn_proj_in_channels": 100352}
_COGVIDEOX_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_SKYREELS_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_KANDINSKY = {"in_visual_dim": 16, "out_visual_dim": 16}
_KANDINSKY_LITE = _KANDINSKY | {"model_dim": 1792, "ff_dim": 7168}
_KANDINSKY_PRO = _KANDINSKY | {
    "model_dim": 4096, "ff_dim": 16384, "time_dim": 1024, "num_text_blocks": 4, "num_visual_blocks": 60,
    "axes_dims": (32, 48, 48),
}  # fmt: skip
_KANDINSKY_IMAGE = _KANDINSKY | {
    "model_dim": 2560, "ff_dim": 10240, "num_visual_blocks": 50, "axes_dims": (32, 48, 48)
}  # fmt: skip
_WAN, _LTX2 = "WanTransformer3DModel", "LTX2VideoTransformer3DModel"
_COSMOS, _SKYREELS = "CosmosTransformer3DModel", "SkyReelsV2Transformer3DModel"
_CONVERT_WAN = "scripts/convert_wan_to_diffusers.py"
_CONVERT_COSMOS = "scripts/convert_cosmos_to_diffusers.py"
_CONVERT_SKYREELS = "scripts/convert_skyreelsv2_to_diffusers.py"
_CONVERT_HUNYUAN = "scripts/convert_hunyuan_video_to_diffusers.py and defaults"

PUBLISHED = (
    Published(
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",), _WAN, _WAN_1_3B, (480, 832, 81), _CONVERT_WAN,
    ),
    Published(
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
        _WAN, {}, (480, 832, 81), _CONVERT_WAN,
    ),
    Published(
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"),
        _WAN, _WAN_IMAGE, (480, 832, 81), _CONVERT_WAN, text_tokens=769,
    ),
    Published(("Wan-AI/Wan2.2-I2V-A14B-Diffusers",), _WAN, {"in_channels": 36}, (480, 832, 81), _CONVERT_WAN),
    Published(
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers",), _WAN,
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
        (704, 1280, 121), f"{_CONVERT_WAN}; the size is the only one that its authors support", vae=(4, 16),
    ),
    Published(
        ("decart-ai/Lucy-Edit-Dev",), _WAN,
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 96, "out_channels": 48},
        (480, 832, 81), _CONVERT_WAN, vae=(4, 16),
        unsure="layers and heads are those of Wan 2.2 TI2V 5B, which it is fine-tuned from",
    ),
    Published(
        ("Wan-AI/Wan2.1-VACE-1.3B-diffusers",), "WanVACETransformer3DModel",
        _WAN_1_3B | {"vace_layers": list(range(0, 30, 2))}, (480, 832, 81), _CONVERT_WAN,
    ),
    Published(
        ("Wan-AI/Wan2.1-VACE-14B-diffusers",), "WanVACETransformer3DModel", {}, (480, 832, 81), _CONVERT_WAN,
    ),
    Published(
        ("Wan-AI/Wan2.2-Animate-14B-Diffusers",), "WanAnimateTransformer3DModel", {"added_kv_proj_dim": 5120},
        (720, 1280, 77), _CONVERT_WAN, steps=20, calls=1, text_tokens=769,
    ),
    Published(
        ("FastVideo/FastWan2.1-T2V-1.3B-Diffusers",), _WAN, _WAN_1_3B, (448, 832, 77),
        "FastVideo's card and recipe: three steps without guidance, trained at 77x448x832", steps=3, calls=1,
        gates=True,
    ),
    Published(
        ("FastVideo/FastWan2.1-T2V-14B-Diffusers",), _WAN, {}, (448, 832, 77),
        "FastVideo's card and recipe: three steps without guidance, trained at 77x448x832", steps=3, calls=1,
        gates=True,
    ),
    Published(
        ("FastVideo/Wan2.1-VSA-T2V-14B-720P-Diffusers",), _WAN, {}, (768, 1280, 77),
        "FastVideo's card: trained at 77x768x1280", gates=True,
    ),
    Published(
        ("Lightricks/LTX-Video", "Lightricks/LTX-Video-0.9.5"), "LTXVideoTransformer3DModel", {}, (512, 704, 161),
        "scripts/convert_ltx_to_diffusers.py (defaults)", vae=(8, 32), batch=2, calls=1, text_tokens=128,
    ),
    Published(
        ("Lightricks/LTX-2",), _LTX2, {"rope_type": "split"}, (512, 768, 121),
        "scripts/convert_ltx2_to_diffusers.py", vae=(8, 32), steps=30, batch=2, calls=1, text_tokens=1024,
    ),
    Published(
        ("diffusers/LTX-2.3-Diffusers", "Lightricks/LTX-2.5-Diffusers"), _LTX2, {"rope_type": "split"},
        (512, 768, 121),
        "scripts/convert_ltx2_to_diffusers.py", vae=(8, 32), steps=30, batch=2, calls=1, text_tokens=1024,
        unsure="layers, heads and widths are those of LTX-2",
    ),
    Published(
        ("hunyuanvideo-community/HunyuanVideo",), "HunyuanVideoTransformer3DModel", {}, (720, 1280, 129),
        _CONVERT_HUNYUAN, calls=1, text_tokens=256,
    ),
    Published(
        ("hunyuanvideo-community/HunyuanVideo-I2V",), "HunyuanVideoTransformer3DModel", {"in_channels": 33},
        (720, 1280, 129), _CONVERT_HUNYUAN, calls=1, text_tokens=256,
    ),
    Published(
        ("Skywork/SkyReels-V1-Hunyuan-I2V",), "HunyuanVideoTransformer3DModel", {"in_channels": 32}, (544, 960, 97),
        _CONVERT_HUNYUAN, text_tokens=256,
    ),
    Published(
        ("lllyasviel/FramePackI2V_HY",), "HunyuanVideoFramepackTransformer3DModel", {}, (720, 1280, 129),
        "defaults; HunyuanVideoFramepackPipeline", calls=1, text_tokens=256,
        unsure="tokens of the history, which attend densely, are not counted",
    ),
    Published(
        ("hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v", "hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v"),
        "HunyuanVideo15Transformer3DModel", {}, (480, 848, 121),
        "scripts/convert_hunyuan_video1_5_to_diffusers.py; the size is the pipeline's for its 640", vae=(4, 16),
        text_tokens=1000,
    ),
    Published(
        ("hunyuanvideo-community/HunyuanVideo-1.5-720p_t2v", "hunyuanvideo-community/HunyuanVideo-1.5-720p_i2v"),
        "HunyuanVideo15Transformer3DModel", {"target_size": 960}, (720, 1280, 121),
        "scripts/convert_hunyuan_video1_5_to_diffusers.py; the size is the pipeline's for its 960", vae=(4, 16),
        text_tokens=1000,
    ),
    Published(
        ("THUDM/CogVideoX-2b",), "CogVideoXTransformer3DModel", {}, (480, 720, 49),
        "scripts/convert_cogvideox_to_diffusers.py", batch=2, calls=1, text_tokens=226,
    ),
    Published(
        ("THUDM/CogVideoX-5b",), "CogVideoXTransformer3DModel", _COGVIDEOX_5B, (480, 720, 49),
        "scripts/convert_cogvideox_to_diffusers.py", batch=2, calls=1, text_tokens=226,
    ),
    Published(
        ("THUDM/CogVideoX-5b-I2V", "alibaba-pai/CogVideoX-Fun-V1.1-5b-Pose"), "CogVideoXTransformer3DModel",
        _COGVIDEOX_5B | {"in_channels": 32}, (480, 720, 49), "scripts/convert_cogvideox_to_diffusers.py", batch=2,
        calls=1, text_tokens=226,
    ),
    Published(
        ("THUDM/CogVideoX1.5-5B",), "CogVideoXTransformer3DModel",
        _COGVIDEOX_5B | {"patch_size_t": 2, "sample_width": 170, "sample_height": 96, "sample_frames": 81},
        (768, 1360, 81), "scripts/convert_cogvideox_to_diffusers.py; docs of CogVideoX: 1.5 is made for 1360x768",
        batch=2,
        calls=1, text_tokens=226,
    ),
    Published(
        ("BestWishYsh/ConsisID-preview",), "ConsisIDTransformer3DModel", _COGVIDEOX_5B | {"in_channels": 32},
        (480, 720, 49), "ConsisIDPipeline", batch=2, calls=1, text_tokens=226,
        unsure="layers and heads are those of CogVideoX-5b-I2V, which it is made from",
    ),
    Published(
        ("genmo/mochi-1-preview",), "MochiTransformer3DModel", {}, (480, 848, 19), "defaults; MochiPipeline",
        vae=(6, 8), steps=64, batch=2, calls=1, text_tokens=256,
    ),
    Published(
        ("nvidia/Cosmos-1.0-Diffusion-7B-Text2World", "nvidia/Cosmos-1.0-Diffusion-7B-Video2World"), _COSMOS, {},
        (704, 1280, 121), _CONVERT_COSMOS, vae=(8, 8), steps=36,
    ),
    Published(
        ("nvidia/Cosmos-Predict2-2B-Text2Image",), _COSMOS, _COSMOS_2B, (768, 1360, 1), _CONVERT_COSMOS, steps=35,
    ),
    Published(
        ("nvidia/Cosmos-Predict2-2B-Video2World",), _COSMOS, _COSMOS_2B | {"in_channels": 17}, (704, 1280, 93),
        _CONVERT_COSMOS, steps=35,
    ),
    Published(
        ("nvidia/Cosmos-Predict2-14B-Video2World",), _COSMOS, _COSMOS_14B | {"in_channels": 17}, (704, 1280, 93),
        _CONVERT_COSMOS, steps=35,
    ),
    Published(
        ("nvidia/Cosmos-Predict2.5-2B",), _COSMOS, _COSMOS_2B | _COSMOS_25, (704, 1280, 93), _CONVERT_COSMOS, steps=36,
    ),
    Published(
        ("nvidia/Cosmos-Predict2.5-14B",), _COSMOS, _COSMOS_14B | _COSMOS_25, (704, 1280, 93), _CONVERT_COSMOS,
        steps=36,
    ),
    Published(
        ("nvidia/Cosmos-Transfer2.5-2B",), _COSMOS, _COSMOS_2B | _COSMOS_25 | {"img_context_dim_in": 1152},
        (704, 1280, 93), f"{_CONVERT_COSMOS}; its ControlNet is not counted", steps=36,
    ),
    Published(
        ("nvidia/Cosmos3-Nano",), "Cosmos3OmniTransformer", {}, (720, 1280, 189),
        "defaults; Cosmos3OmniPipeline", vae=(4, 16), steps=35, text_tokens=512,
    ),
    Published(
        ("Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers",), _SKYREELS,
        _WAN_1_3B | {"inject_sample_info": True}, (544, 960, 97), _CONVERT_SKYREELS,
    ),
    Published(
        (
            "Skywork/SkyReels-V2-DF-14B-540P-Diffusers", "Skywork/SkyReels-V2-DF-14B-720P-Diffusers",
            "Skywork/SkyReels-V2-T2V-14B-540P-Diffusers", "Skywork/SkyReels-V2-T2V-14B-720P-Diffusers",
        ), _SKYREELS, _SKYREELS_14B, (544, 960, 97), _CONVERT_SKYREELS,
    ),
    Published(
        ("Skywork/SkyReels-V2-I2V-14B-540P-Diffusers", "Skywork/SkyReels-V2-I2V-14B-720P-Diffusers"), _SKYREELS,
        _SKYREELS_14B | _WAN_IMAGE, (544, 960, 97), _CONVERT_SKYREELS, text_tokens=769,
    ),
    Published(
        ("Skywork/SkyReels-V2-I2V-1.3B-540P-Diffusers",), _SKYREELS,
        _WAN_1_3B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 1536}, (544, 960, 97),
        _CONVERT_SKYREELS,
        text_tokens=769, unsure="layers and heads are those of SkyReels-V2-DF-1.3B-540P",
    ),
    Published(
        ("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",), "Kandinsky5Transformer3DModel",
        _KANDINSKY_LITE | {"visual_cond": True}, (512, 768, 121), "configurations of the authors' own code",
    ),
    Published(
        ("kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers", "kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers"),
        "Kandinsky5Transformer3DModel", _KANDINSKY_PRO | {"visual_cond": True}, (512, 768, 121),
        "configurations of the authors' own code",
    ),
    Published(
        ("kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers",), "Kandinsky5Transformer3DModel", _KANDINSKY_IMAGE,
        (1024, 1024, 1), "a port of the model that reads its transformer/config.json",
    ),
    Published(
        ("kandinskylab/Kandinsky-5.0-I2I-Lite-sft-Diffusers",), "Kandinsky5Transformer3DModel",
        _KANDINSKY_IMAGE | {"visual_cond": True}, (1024, 1024, 1),
        "a port of the model that reads the transformer/config.json of T2I-Lite",
        text_tokens=1024, unsure="layers and heads are those of T2I-Lite",
    ),
    Published(
        ("kandinskylab/Kandinsky-6.0-Pro-distill-5s-Diffusers",), "Kandinsky6Transformer3DModel", {}, (480, 864, 121),
        "defaults; the example of Kandinsky6TI2VAPipeline", steps=16, calls=1, text_tokens=1024,
    ),
    Published(
        ("rhymes-ai/Allegro",), "AllegroTransformer3DModel", {}, (720, 1280, 88), "defaults; AllegroPipeline",
        steps=100, batch=2, calls=1,
    ),
    Published(
        (
            "alibaba-pai/EasyAnimateV5.1-12b-zh", "alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers",
            "alibaba-pai/EasyAnimateV5.1-12b-zh-InP-diffusers", "alibaba-pai/EasyAnimateV5.1-12b-zh-Control-diffusers",
        ),
        "EasyAnimateTransformer3DModel", {"in_channels": 16, "out_channels": 16, "patch_size": 2}, (512, 512, 49),
        "defaults; EasyAnimatePipeline",
        batch=2, calls=1, text_tokens=256,
    ),
    Published(
        ("alibaba-pai/EasyAnimateV5.1-7b-zh-diffusers",), "EasyAnimateTransformer3DModel",
        {"in_channels": 16, "out_channels": 16, "patch_size": 2},
        (512, 512, 49), "defaults; EasyAnimatePipeline", batch=2, calls=1, text_tokens=256,
        unsure="layers and heads are those of the 12b model; a folder of the 7b gives its own",
    ),
    Published(
        ("nvidia/ChronoEdit-14B-Diffusers",), "ChronoEditTransformer3DModel", _WAN_IMAGE, (480, 832, 5),
        "defaults; ChronoEditPipeline without temporal reasoning, which makes five frames", text_tokens=769,
    ),
    Published(
        ("nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers",), "AnyFlowTransformer3DModel", _WAN_1_3B, (480, 832, 81),
        "scripts/convert_anyflow_to_diffusers.py; the example of AnyFlowPipeline for the steps", steps=4, calls=1,
    ),
    Published(
        ("nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers",), "AnyFlowTransformer3DModel", {}, (480, 832, 81),
        "scripts/convert_anyflow_to_diffusers.py; the example of AnyFlowPipeline for the steps", steps=4, calls=1,
    ),
    Published(
        ("BestWishYsh/Helios-Base",), "HeliosTransformer3DModel", {}, (384, 640, 132), "defaults; HeliosPipeline",
        unsure="tokens of the history, which attend densely, are not counted",
    ),
    Published(
        ("MiniMaxAI/MiniMax-H3",), "MiniMaxH3Transformer3DModel", {}, (768, 1344, 124),
        "scripts/convert_minimax_h3_to_diffusers.py; the canvas and frames of its blocks", vae=(4, 16), calls=1,
    ),
    Published(
        (
            "FastVideo/FastVideo-FastH3-8-Step-V2",
            "FastVideo/FastVideo-FastH3-4-step-Preview-v1-VSA-DataFree",
            "FastVideo/FastVideo-FastH3-4-step-Preview-v1-VSA-Synthetic-Step1300",
            "FastVideo/FastVideo-FastH3-4-step-Preview-v1-VSA-Synthetic-Step1900",
        ),
        "MiniMaxH3Transformer3DModel", {}, (768, 1344, 124), "FastVideo's cards: students of MiniMax-H3, same sizes",
        vae=(4, 16), calls=1, gates=True,
    ),
    Published(
        ("Motif-Technologies/Motif-Video-2B",), "MotifVideoTransformer3DModel",
        {"num_attention_heads": 12, "num_layers": 12, "num_single_layers": 24, "num_decoder_layers": 8},
        (736, 1280, 121), "docs of MotifVideoTransformer3DModel for the layers",
        unsure="the number of heads is inferred from its 1.9 billion parameters",
    ),
)  # fmt: skip

DEFAULTS = {
    "allegro": "rhymes-ai/Allegro",
    "anyflow": "nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers",
    "chronoedit": "nvidia/ChronoEdit-14B-Diffusers",
    "cogvideox": "THUDM/CogVideoX-5b",
    "cosmos": "nvidia/Cosmos-Predict2.5-2B",
    "cosmos3": "nvidia/Cosmos3-Nano",
    "easyanimate": "alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers",
    "framepack": "lllyasviel/FramePackI2V_HY",
    "helios": "BestWishYsh/Helios-Base",
    "hunyuan_video": "hunyuanvideo-community/HunyuanVideo",
    "hunyuan_video15": "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
    "kandinsky5": "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
    "kandinsky6": "kandinskylab/Kandinsky-6.0-Pro-distill-5s-Diffusers",
    "ltx": "Lightricks/LTX-Video",
    "ltx2": "Lightricks/LTX-2",
    "minimax_h3": "MiniMaxAI/MiniMax-H3",
    "mochi": "genmo/mochi-1-preview",
    "motif_video": "Motif-Technologies/Motif-Video-2B",
    "skyreels_v2": "Skywork/SkyReels-V2-DF-14B-540P-Diffusers",
    "wan": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan_animate": "Wan-AI/Wan2.2-Animate-14B-Diffusers",
}
"""The checkpoint that stands for each family when only the family is named."""
