"""Recipes of the families with joint attention, and of those with tokens before or after the video's."""

import torch

TEXT = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])


def rotary(tokens, dim):
    """Cosines and sines `[tokens, dim]` of random angles, each repeated for its pair of channels."""
    angles = torch.rand(tokens, dim // 2).mul(6).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def hunyuan_inputs(grid, channels=4):
    return dict(
        hidden_states=torch.randn(2, channels, *grid),
        timestep=torch.tensor([700, 700]),
        encoder_hidden_states=torch.randn(2, 9, 16),
        encoder_attention_mask=TEXT,
        pooled_projections=torch.randn(2, 8),
        guidance=torch.tensor([6000.0, 6000.0]),
    )


def hunyuan_concat_inputs(grid):
    return hunyuan_inputs(grid, channels=9) | dict(guidance=None)


def framepack_inputs(grid, batch=2):
    frames, height, width = grid
    history = {"clean": 2, "history_2x": 2, "history_4x": 5}
    inputs = {name: value[:batch] for name, value in hunyuan_inputs(grid).items()}
    inputs |= {f"latents_{name}": torch.randn(batch, 4, count, height, width) for name, count in history.items()}
    inputs |= {f"indices_latents_{name}": torch.arange(count) for name, count in history.items()}
    mask = TEXT[2 - batch :]
    return inputs | dict(
        indices_latents=torch.arange(9, 9 + frames),
        image_embeds=torch.randn(batch, 3, 20),
        encoder_attention_mask=mask,
    )


def framepack_one_inputs(grid):
    """One batch item: the model trims the padded text and passes no mask."""
    return framepack_inputs(grid, batch=1)


def hunyuan15_inputs(grid):
    return dict(
        hidden_states=torch.randn(2, 9, *grid),
        timestep=torch.tensor([700.0, 700.0]),
        encoder_hidden_states=torch.randn(2, 9, 16),
        encoder_attention_mask=TEXT,
        encoder_hidden_states_2=torch.randn(2, 6, 12),
        encoder_attention_mask_2=torch.tensor([[1] * 3 + [0] * 3, [0] * 6]),
        image_embeds=torch.randn(2, 5, 20),
    )


def hunyuan15_text_inputs(grid):
    """Text-to-video: the image embeddings are all zeros, and masked."""
    return hunyuan15_inputs(grid) | dict(image_embeds=torch.zeros(2, 5, 20), timestep_r=torch.tensor([500.0, 500.0]))


def cogvideox_inputs(grid, frames=None, channels=4):
    frames = frames or grid[0]
    return dict(
        hidden_states=torch.randn(2, frames, channels, *grid[1:]),
        encoder_hidden_states=torch.randn(2, 9, 16),
        timestep=torch.tensor([700, 700]),
    )


def cogvideox_5b_inputs(grid, channels=4):
    tokens = grid[0] * (grid[1] // 2) * (grid[2] // 2)
    return cogvideox_inputs(grid, channels=channels) | dict(image_rotary_emb=rotary(tokens, 32))


def cogvideox15_inputs(grid):
    """The pipelines of 1.5 pad the latent frames to whole patches."""
    tokens = grid[0] // 2 * (grid[1] // 2) * (grid[2] // 2)
    return cogvideox_inputs(grid, frames=grid[0] // 2 * 2, channels=8) | dict(
        image_rotary_emb=rotary(tokens, 32), ofs=torch.tensor([2.0])
    )


def consisid_inputs(grid):
    return cogvideox_5b_inputs(grid, channels=8) | dict(id_cond=torch.randn(2, 2), id_vit_hidden=[torch.randn(2, 2, 2)])


def mochi_inputs(grid):
    return dict(
        hidden_states=torch.randn(2, 4, *grid),
        encoder_hidden_states=torch.randn(2, 9, 16),
        timestep=torch.tensor([700, 700]),
        encoder_attention_mask=TEXT.bool(),
    )


def mochi_empty_prompt_inputs(grid):
    """The pipeline zeroes the mask of an empty negative prompt."""
    return mochi_inputs(grid) | dict(encoder_attention_mask=TEXT.bool() & torch.tensor([[False], [True]]))


def easyanimate_inputs(grid):
    return dict(
        hidden_states=torch.randn(2, 4, *grid),
        timestep=torch.tensor([700, 700]),
        encoder_hidden_states=torch.randn(2, 9, 16),
        encoder_hidden_states_t5=torch.randn(2, 6, 12),
        inpaint_latents=torch.randn(2, 5, *grid),
        control_latents=torch.randn(2, 3, *grid),
    )


def ltx_condition_inputs(grid):
    """One latent frame of a condition before the video; the pipeline passes coordinates instead of sizes."""
    frames, height, width = grid
    coords = torch.meshgrid(
        torch.tensor([9.0] + [max(0.0, 8 * t - 7) for t in range(frames - 1)]),
        torch.arange(height) * 32.0,
        torch.arange(width) * 32.0,
        indexing="ij",
    )
    tokens = frames * height * width
    return dict(
        hidden_states=torch.randn(2, tokens, 8),
        encoder_hidden_states=torch.randn(2, 6, 16),
        timestep=torch.rand(2, tokens) * 1000,
        encoder_attention_mask=torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
        video_coords=torch.stack(coords).reshape(1, 3, tokens).expand(2, 3, tokens),
    )


def ltx_long_inputs(grid):
    """The long multi-prompt pipeline passes extents of 1 beside the coordinates."""
    return ltx_condition_inputs(grid) | dict(num_frames=1, height=1, width=1, rope_interpolation_scale=(8, 32, 32))


def helios_inputs(grid):
    """History at three resolutions before the video, as the pipelines pass it."""
    frames, height, width = grid
    history = {"long": 6, "mid": 2, "short": 2}
    inputs = dict(
        hidden_states=torch.randn(2, 4, *grid),
        timestep=torch.tensor([700, 700]),
        encoder_hidden_states=torch.randn(2, 9, 16),
        indices_hidden_states=torch.arange(10, 10 + frames).expand(2, -1),
    )
    for name, count in history.items():
        inputs[f"latents_history_{name}"] = torch.randn(2, 4, count, height, width)
        inputs[f"indices_latents_history_{name}"] = torch.arange(count).expand(2, -1)
    return inputs


def minimax_h3_inputs(grid, reference=(2, 3, 4), text=7, audio=5):
    """Packed rows: text, a reference block of another size, audio, and the video."""
    frames, height, width = grid[0], grid[1] // 2, grid[2] // 2
    blocks = [
        torch.stack(torch.meshgrid(*(torch.arange(n) * 0.5 for n in size), indexing="ij"), -1).reshape(-1, 3)
        for size in (reference, (frames, height, width))
    ]
    lengths = [text, len(blocks[0]), audio, len(blocks[1])]
    tags = torch.repeat_interleave(torch.tensor([1, 0, 2, 0]), torch.tensor(lengths))
    rows = [(tags == tag).nonzero().flatten() for tag in range(3)]
    return dict(
        hidden_states=torch.randn(1, len(rows[0]), 16),
        audio_hidden_states=torch.randn(1, audio, 6),
        encoder_hidden_states=torch.randn(1, text, 16),
        timestep=torch.tensor([0.0, 0.7]),
        timestep_indices=(torch.arange(len(tags)) >= lengths[0] + lengths[1]).long(),
        token_tags=tags,
        position_ids=torch.cat([torch.rand(text, 3), blocks[0], torch.rand(audio, 3), blocks[1] + 7]),
        video_indices=rows[0],
        text_indices=rows[1],
        audio_indices=rows[2],
    )


def motif_inputs(grid):
    return dict(
        hidden_states=torch.randn(2, 9, *grid),
        timestep=torch.tensor([700, 700]),
        encoder_hidden_states=torch.randn(2, 9, 16),
        encoder_attention_mask=TEXT,
        image_embeds=torch.randn(2, 5, 20),
    )


def cosmos3_inputs(grid, text=7, sound=5):
    """One video whose first frame is given, after the text and before the sound."""
    frames, height, width = grid[0], grid[1] // 2, grid[2] // 2
    area, video = height * width, frames * height * width
    places = torch.arange(text + video + sound)
    return dict(
        input_ids=torch.randint(0, 20, (text,)),
        text_indexes=places[:text],
        position_ids=torch.randint(0, 30, (3, len(places))),
        und_len=text,
        sequence_length=len(places),
        vision_tokens=[torch.randn(1, 4, *grid)],
        vision_token_shapes=[(frames, height, width)],
        vision_sequence_indexes=places[text : text + video],
        vision_mse_loss_indexes=places[text + area : text + video],
        vision_timesteps=torch.full((video - area,), 700.0),
        vision_noisy_frame_indexes=[torch.arange(1, frames)],
        sound_tokens=[torch.randn(6, sound)],
        sound_token_shapes=[(sound, 1, 1)],
        sound_sequence_indexes=places[text + video :],
        sound_mse_loss_indexes=places[text + video :],
        sound_timesteps=torch.full((sound,), 700.0),
        sound_noisy_frame_indexes=[torch.arange(sound)],
    )


HUNYUAN = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=1, num_single_layers=1,
    num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(8, 12, 12),
)  # fmt: skip
FRAMEPACK = HUNYUAN | dict(has_image_proj=True, image_proj_dim=20, has_clean_x_embedder=True)
HUNYUAN15 = dict(
    in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2, num_refiner_layers=1,
    text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=20, rope_axes_dim=(8, 12, 12),
)  # fmt: skip
COGVIDEOX = dict(
    num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
    num_layers=2, sample_width=12, sample_height=10, sample_frames=17, max_text_seq_length=9,
)  # fmt: skip
COGVIDEOX_5B = COGVIDEOX | dict(use_rotary_positional_embeddings=True)
COGVIDEOX15 = COGVIDEOX_5B | dict(in_channels=8, patch_size_t=2, patch_bias=False, ofs_embed_dim=8)
CONSISID = COGVIDEOX_5B | dict(
    in_channels=8, is_train_face=True, cross_attn_interval=1, cross_attn_dim_head=1, cross_attn_num_heads=1,
    LFE_id_dim=2, LFE_vit_dim=2, LFE_depth=5, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=1,
    LFE_output_dim=42, LFE_ff_mult=1, LFE_num_scale=1,
)  # fmt: skip
MOCHI = dict(
    num_attention_heads=2, attention_head_dim=32, num_layers=2, pooled_projection_dim=24, in_channels=4,
    text_embed_dim=16, time_embed_dim=8, max_sequence_length=9,
)  # fmt: skip
EASYANIMATE = dict(
    num_attention_heads=2, attention_head_dim=32, in_channels=12, out_channels=4, patch_size=2, num_layers=2,
    mmdit_layers=1, time_embed_dim=8, text_embed_dim=16, text_embed_dim_t5=12,
)  # fmt: skip
LTX = dict(
    in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=32, cross_attention_dim=64, num_layers=2,
    caption_channels=16,
)  # fmt: skip
HELIOS = dict(
    num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=2, rope_dim=(8, 12, 12),
)  # fmt: skip
MINIMAX_H3 = dict(
    num_attention_heads=2, attention_head_dim=32, hidden_size=48, num_layers=2, num_refiner_layers=1, ffn_dim=32,
    in_channels=4, audio_in_channels=6, text_dim=16, freq_dim=16, time_embed_hidden_dim=16, time_embed_dim=16,
    rope_freq_dim=4,
)  # fmt: skip
MOTIF = dict(
    in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=1, num_single_layers=2,
    num_decoder_layers=1, text_embed_dim=16, image_embed_dim=20, rope_axes_dim=(8, 12, 12),
    enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
)  # fmt: skip
COSMOS3 = dict(
    head_dim=32, hidden_size=48, intermediate_size=32, latent_channel=4, num_attention_heads=4, num_hidden_layers=2,
    num_key_value_heads=2, patch_latent_dim=16, rope_axes_dim=(6, 5, 5), vocab_size=20, sound_gen=True, sound_dim=6,
)  # fmt: skip


def _recipe(name, cls, config, inputs, *, patch=(1, 2, 2), sparse=2, dense=0, tags=("legacy",), **rest):
    return rest | dict(
        name=name, cls=cls, config=config, inputs=inputs, patch=patch, sparse=sparse, dense=dense, tags=tags
    )  # fmt: skip


JOINT_RECIPES = [
    _recipe("hunyuan-video", "HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan_inputs, dense=1),
    _recipe(
        "hunyuan-video-concat", "HunyuanVideoTransformer3DModel",
        HUNYUAN | dict(in_channels=9, guidance_embeds=False, image_condition_type="latent_concat"),
        hunyuan_concat_inputs, dense=1,
    ),
    _recipe(
        "hunyuan-video-replace", "HunyuanVideoTransformer3DModel",
        HUNYUAN | dict(image_condition_type="token_replace"), hunyuan_inputs, dense=1,
    ),
    _recipe("framepack", "HunyuanVideoFramepackTransformer3DModel", FRAMEPACK, framepack_inputs, dense=1),
    _recipe("framepack-one", "HunyuanVideoFramepackTransformer3DModel", FRAMEPACK, framepack_one_inputs, dense=1),
    _recipe(
        "hunyuan-video-1.5", "HunyuanVideo15Transformer3DModel", HUNYUAN15, hunyuan15_inputs, patch=(1, 1, 1), dense=1
    ),
    _recipe(
        "hunyuan-video-1.5-text", "HunyuanVideo15Transformer3DModel", HUNYUAN15 | dict(use_meanflow=True),
        hunyuan15_text_inputs, patch=(1, 1, 1), dense=1,
    ),
    _recipe("cogvideox-2b", "CogVideoXTransformer3DModel", COGVIDEOX, cogvideox_inputs),
    _recipe("cogvideox-5b", "CogVideoXTransformer3DModel", COGVIDEOX_5B, cogvideox_5b_inputs),
    _recipe("cogvideox-1.5", "CogVideoXTransformer3DModel", COGVIDEOX15, cogvideox15_inputs, patch=(2, 2, 2)),
    _recipe("consisid", "ConsisIDTransformer3DModel", CONSISID, consisid_inputs),
    _recipe("mochi", "MochiTransformer3DModel", MOCHI, mochi_inputs, tags=()),
    _recipe("mochi-empty-prompt", "MochiTransformer3DModel", MOCHI, mochi_empty_prompt_inputs, tags=()),
    _recipe("easyanimate", "EasyAnimateTransformer3DModel", EASYANIMATE, easyanimate_inputs),
    _recipe(
        "ltx-condition", "LTXVideoTransformer3DModel", LTX, ltx_condition_inputs, patch=(1, 1, 1), dense=2, tags=()
    ),
    _recipe("ltx-long", "LTXVideoTransformer3DModel", LTX, ltx_long_inputs, patch=(1, 1, 1), dense=2, tags=()),
    _recipe("helios", "HeliosTransformer3DModel", HELIOS, helios_inputs, dense=2, tags=("surplus",)),
    _recipe(
        "helios-amplified", "HeliosTransformer3DModel",
        HELIOS | dict(is_amplify_history=True, guidance_cross_attn=False, zero_history_timestep=False), helios_inputs,
        dense=2, tags=("surplus",),
    ),
    _recipe("minimax-h3", "MiniMaxH3Transformer3DModel", MINIMAX_H3, minimax_h3_inputs, dense=1, tags=("surplus",)),
    _recipe(
        "motif-video", "MotifVideoTransformer3DModel", MOTIF, motif_inputs, sparse=3, dense=2,
        tags=("decoder",),
    ),
    _recipe("cosmos3", "Cosmos3OmniTransformer", COSMOS3, cosmos3_inputs, tags=("surplus",),
        projections=("add_q_proj", "add_k_proj", "add_v_proj")),
    _recipe(
        "cosmos3-nemotron", "Cosmos3OmniTransformer",
        COSMOS3 | dict(hidden_act="relu2", qk_norm_for_text=False, use_und_k_norm_for_gen=True), cosmos3_inputs,
        tags=("surplus",),
        projections=("add_q_proj", "add_k_proj", "add_v_proj"),
    ),
]  # fmt: skip
