import math

import torch

from tiny_models import RECIPES
from vsa_diffusers import enable_vsa, video_sparse_attention

GRID = (5, 10, 12)


def test_unmasked_text_as_long_as_the_video_stays_text(monkeypatch):
    recipe = next(recipe for recipe in RECIPES if recipe.name == "motif-video")
    model = recipe.build()
    enable_vsa(model, 0.3)
    calls = []

    def spy(query, key, value, video_shape, **options):
        calls.append((video_shape, options["context_tokens"]))
        return video_sparse_attention(query, key, value, video_shape, **options)

    monkeypatch.setattr("vsa_diffusers.processor.video_sparse_attention", spy)
    frames, height, width = shape = recipe.video_shape(GRID)
    text = torch.randn(2, math.prod(shape), 16)
    inputs = recipe.inputs(GRID) | dict(encoder_hidden_states=text, encoder_attention_mask=None, image_embeds=None)
    with torch.no_grad():
        model(**inputs)
    encoder, decoder = (shape, (0, math.prod(shape))), ((2 * frames, height, width), (0, 0))
    assert calls == [encoder, encoder, decoder]
