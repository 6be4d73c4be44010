# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own transformer
#
# `enable_vsa` knows the video transformers of diffusers. One call teaches it yours: which modules are video
# self-attention, and how the inputs tell the grid of tokens. Nothing in your code has to change.

# %% tags=["parameters"]
LATENTS = (1, 4, 16, 32, 32)  # batch, channels, frames, height, width

# %% [markdown]
# ## A model
#
# Its attention has the usual projections, and rotary embeddings, which make it a little less usual.

# %%
import logging

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from vsa_diffusers import add_gate_compress, disable_vsa, enable_vsa, register_transformer
from vsa_diffusers.inspection import observed_attention

logging.getLogger("vsa_diffusers").setLevel(logging.WARNING)  # a notebook shows what it wants to show


class VideoAttention(nn.Module):
    def __init__(self, hidden_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(hidden_dim, hidden_dim)
        self.to_k = nn.Linear(hidden_dim, hidden_dim)
        self.to_v = nn.Linear(hidden_dim, hidden_dim)
        self.to_out = nn.Linear(hidden_dim, hidden_dim)

    def project(self, hidden_states, angles):
        """Query, key and value [batch, tokens, heads, head_dim], ready to attend."""
        projected = (self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states))
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)) for x in projected)
        return rotate(query, angles), rotate(key, angles), value

    def forward(self, hidden_states, angles):
        query, key, value = (x.transpose(1, 2) for x in self.project(hidden_states, angles))
        return self.to_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def rotate(x, angles):
    real, imaginary = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)


class VideoTransformer(nn.Module):
    def __init__(self, channels=4, hidden_dim=96, num_heads=2, num_layers=3):
        super().__init__()
        self.patchify = nn.Conv3d(channels, hidden_dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.layers = nn.ModuleList(VideoAttention(hidden_dim, num_heads) for _ in range(num_layers))

    def forward(self, latents):
        hidden_states = self.patchify(latents)
        angles = self.angles(hidden_states.shape[2:])
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
        for layer in self.layers:
            hidden_states = hidden_states + layer(hidden_states, angles)
        return hidden_states

    def angles(self, grid):
        """A third of the channels turns with each of time, height and width: [tokens, head_dim / 2]."""
        frequencies = 0.5 ** torch.arange(8)
        positions = torch.meshgrid(*(torch.arange(extent) for extent in grid), indexing="ij")
        return torch.cat([axis.flatten()[:, None] * frequencies for axis in positions], 1)


torch.manual_seed(0)
model = VideoTransformer().eval()
latents = torch.randn(LATENTS)
with torch.no_grad():
    dense = model(latents)
dense.shape


# %% [markdown]
# ## One registration
#
# `video_shape` gets the transformer and the arguments of its `forward` by name, and returns `(T, H, W)` after
# patchification. It is asked at every forward, so sizes may change. `project` is needed because this attention takes
# more than hidden states.


# %%
def video_shape(transformer, inputs):
    frames, height, width = inputs["latents"].shape[-3:]
    return frames, height // 2, width // 2


register_transformer(VideoTransformer, "layers.*", video_shape, project=VideoAttention.project)

# %% [markdown]
# ## Check it: at ratio 1 nothing is left out
#
# The result must be the dense one. A wrong grid, norm or projection shows at once. This is how the package tests the
# families that it supports.

# %%
enable_vsa(model, top_k_ratio=1.0)
with torch.no_grad():
    torch.testing.assert_close(model(latents), dense, atol=1e-4, rtol=0)

enable_vsa(model, top_k_ratio=0.25)
with torch.no_grad():
    sparse = model(latents)
print(f"relative error at 0.25: {((sparse - dense).norm() / dense.norm()).item():.1%}")

# %% [markdown]
# ## Look inside
#
# The inspection works for your model as for any other. Weights are random here, so attention is nearly even: a quarter
# of the tiles holds a quarter of the mass. In a trained model it holds far more.

# %%
with observed_attention(model, 0.25) as inspection, torch.no_grad():
    model(latents)
for layer, mass, error in zip(
    inspection.layers, inspection.by_layer("mass"), inspection.by_layer("error"), strict=True
):
    print(f"{layer.name}: kept tiles hold {mass:.0%} of the mass, error {error:.1%}")

# %% [markdown]
# ## Gates and training
#
# `add_gate_compress` gives every video self-attention a gate that begins at zero, the learned weight of the coarse
# branch. The operation is differentiable, so any training loop will do.

# %%
disable_vsa(model)
add_gate_compress(model)
enable_vsa(model, top_k_ratio=0.25, combine="gate")
target = 1.5 * dense  # something to learn
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for _ in range(20):
    loss = F.mse_loss(model(latents), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

figure, axis = plt.subplots(figsize=(5, 2.4), dpi=80)
axis.plot(losses, "o-", ms=4)
axis.set(xlabel="step", ylabel="loss", ylim=(0, None))
figure.tight_layout()
plt.show()

# %% [markdown]
# The documentation's page on custom transformers has more: attention that finishes in another way, subclasses, and
# what is logged when a call has to run dense.
