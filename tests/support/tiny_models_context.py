"""Recipes of the families with other tokens beside the video's: history, conditions, references, sound."""

import torch

from tiny_models_joint import recipe


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
COSMOS3 = dict(
    head_dim=32, hidden_size=48, intermediate_size=32, latent_channel=4, num_attention_heads=4, num_hidden_layers=2,
    num_key_value_heads=2, patch_latent_dim=16, rope_axes_dim=(6, 5, 5), vocab_size=20, sound_gen=True, sound_dim=6,
)  # fmt: skip


CONTEXT_RECIPES = [
    recipe(
        "ltx-condition", "LTXVideoTransformer3DModel", LTX, ltx_condition_inputs, patch=(1, 1, 1), dense=2, tags=()
    ),
    recipe("ltx-long", "LTXVideoTransformer3DModel", LTX, ltx_long_inputs, patch=(1, 1, 1), dense=2, tags=()),
    recipe("helios", "HeliosTransformer3DModel", HELIOS, helios_inputs, dense=2, tags=("surplus",)),
    recipe(
        "helios-amplified", "HeliosTransformer3DModel",
        HELIOS | dict(is_amplify_history=True, guidance_cross_attn=False, zero_history_timestep=False), helios_inputs,
        dense=2, tags=("surplus",),
    ),
    recipe("minimax-h3", "MiniMaxH3Transformer3DModel", MINIMAX_H3, minimax_h3_inputs, dense=1, tags=("surplus",)),
    recipe("cosmos3", "Cosmos3OmniTransformer", COSMOS3, cosmos3_inputs, tags=("surplus",),
        projections=("add_q_proj", "add_k_proj", "add_v_proj")),
    recipe(
        "cosmos3-nemotron", "Cosmos3OmniTransformer",
        COSMOS3 | dict(hidden_act="relu2", qk_norm_for_text=False, use_und_k_norm_for_gen=True), cosmos3_inputs,
        tags=("surplus",),
        projections=("add_q_proj", "add_k_proj", "add_v_proj"),
    ),
]  # fmt: skip
