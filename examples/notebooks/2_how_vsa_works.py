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
# # How Video Sparse Attention works
#
# We take query, key and value of a real layer, in the middle of making a video, and follow them through the
# operation: tiles, coarse scores, kept tiles, and what stands for the rest.

# %% tags=["parameters"]
MODEL = "../tiny_wan"
CALL = dict(height=256, width=256, num_frames=29, num_inference_steps=6, guidance_scale=4.0)
LAYER, STEP = 4, 3
RATIO = 0.2

# %%
import logging

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from diffusers import WanPipeline

from vsa_diffusers import VSAConfig, disable_vsa, enable_vsa, video_sparse_attention
from vsa_diffusers.inspection import inspect_attention
from vsa_diffusers.inspection.figures import draw_query
from vsa_diffusers.pipeline import sparse_processors
from vsa_diffusers.steps import position_in_run
from vsa_diffusers.tiles import num_selected_tiles

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("vsa_diffusers").setLevel(logging.WARNING)  # a notebook shows what it wants to show

pipe = WanPipeline.from_pretrained(MODEL)
pipe.set_progress_bar_config(disable=True)
prompt = "a large yellow square moves down over purple stripes"

# %% [markdown]
# ## A grid of tokens, cut into tiles
#
# The transformer sees the video as a grid of tokens `(T, H, W)`. Attention compares each of them with all others, in
# every layer and every step. VSA cuts the grid into tiles of `(4, 4, 4)` tokens, which are cubes in space *and* time.
# `inspect_attention` makes the video densely and keeps an eye on the layers on the way; here it tells us the grid and
# leaves us the frames.

# %%
config = VSAConfig(RATIO, block_size=(4, 4, 4))
inspection = inspect_attention(pipe, prompt, config=config, layers=[LAYER], steps=[STEP], **CALL)
grid = inspection.observations[0].grid
print(f"{grid.num_tokens} tokens {grid.video_shape} make {grid.num_tiles} tiles {grid.tiles_per_axis}")


# %%
def show_tiles(columns=4):
    """Frames with the edges of the tiles and their numbers."""
    frames, (_, n_h, n_w) = inspection.frames, grid.tiles_per_axis
    slabs = np.unique(np.linspace(0, grid.tiles_per_axis[0] - 1, columns).round().astype(int))
    figure, axes = plt.subplots(1, len(slabs), figsize=(9, 2.6), dpi=80, squeeze=False)
    for axis, slab in zip(axes[0], slabs, strict=True):
        frame = frames[min(len(frames) - 1, round((slab + 0.5) / grid.tiles_per_axis[0] * len(frames)))]
        height, width, _ = frame.shape
        axis.imshow(frame)
        for tile in range(n_h * n_w):
            y, x = divmod(tile, n_w)
            axis.text((x + 0.5) * width / n_w, (y + 0.5) * height / n_h, slab * n_h * n_w + tile, color="white",
                      ha="center", va="center", fontsize=8, bbox=dict(color="black", alpha=0.5, pad=1))  # fmt: skip
        axis.set(xticks=np.arange(1, n_w) * width / n_w, yticks=np.arange(1, n_h) * height / n_h)
        axis.set(xticklabels=[], yticklabels=[], title=f"tiles of time {slab}")
        axis.grid(color="white", lw=0.8)
    figure.tight_layout()
    plt.show()


show_tiles()

# %% [markdown]
# ## Query, key and value of one layer
#
# We stop by at one call of the layer and take its tensors along, `[batch, tokens, heads, head_dim]`.

# %%
taken = {}


def take(query, key, value, video_shape, **options):
    """What the layer calls instead of the operation: keep its tensors, and do as before."""
    if position_in_run().step == STEP and not taken:
        taken.update(query=query, key=key, value=value)
    return video_sparse_attention(query, key, value, video_shape, **options)


enable_vsa(pipe, top_k_ratio=1.0)  # nothing is left out: the video stays the dense one
list(sparse_processors(pipe.transformer).values())[LAYER].operation = take
pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="latent", **CALL)
disable_vsa(pipe)
query, key, value = taken["query"], taken["key"], taken["value"]
query.shape

# %% [markdown]
# ## Coarse scores: what a tile's mean says about its tokens
#
# Average query and key inside each tile; the product of two means is the *coarse score* of a pair of tiles. That is a
# table of tiles times tiles instead of tokens times tokens, 4 096 times smaller. Does it know where dense attention
# looks? On the left are the scores (after a softmax) of one head, on the right what a dense softmax over all tokens
# really gives to each tile, summed up.

# %%
order = grid.token_index().flatten()  # tokens, tile by tile
order = order[order >= 0]
head, scale = 0, query.shape[-1] ** -0.5
q, k = (x[0, :, head].float()[order].unflatten(0, (grid.num_tiles, -1)) for x in (query, key))  # [tiles, tokens, dim]

coarse = (q.mean(1) @ k.mean(1).T * scale).softmax(-1)
weights = (q.flatten(0, 1) @ k.flatten(0, 1).T * scale).softmax(-1)
exact = weights.unflatten(0, q.shape[:2]).mean(1).unflatten(1, q.shape[:2]).sum(2)  # [query tile, key tile]

figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), dpi=80)
for axis, table, title in zip(axes, (coarse, exact), ("coarse scores", "exact attention mass"), strict=True):
    axis.imshow(table.sqrt(), cmap="magma")
    axis.set(title=title, xlabel="key tile", ylabel="query tile")
figure.tight_layout()
plt.show()

# %% [markdown]
# The bright diagonal is a tile that looks at itself, the lines beside it are its neighbours above and below, and the
# fainter ones farther off the same place at another time. The two tables need not agree in their values: it is only the
# *order* of a row that counts.
#
# ## Kept tiles
#
# Each query tile keeps the `top_k` key tiles of highest score, and attends to their tokens exactly. How much of the
# exact mass do they hold, and how much could the same number hold at best?

# %%
kept = num_selected_tiles(grid.num_tiles, RATIO)


def held(scores):
    """The exact mass in the `kept` tiles of highest score, mean over query tiles."""
    return exact.gather(1, scores.topk(kept, dim=1).indices).sum(1).mean().item()


print(f"{kept} of {grid.num_tiles} tiles are kept: {kept / grid.num_tiles:.1%} of the work")
print(f"by chance they would hold  {kept / grid.num_tiles:6.1%} of the mass")
print(f"by coarse scores they hold {held(coarse):6.1%}")
print(f"at best they could hold    {held(exact):6.1%}")

# %% [markdown]
# The package has a second kind of score, `selection="quarters"`: the highest product between the means of quarters of
# two tiles. It ranks better, costs a little more, and is the default for models that were not trained with VSA.
#
# Here is what one query in the middle of the video keeps. Brightness is the share of the heads that keep a tile.

# %%
draw_query(inspection)

# %% [markdown]
# And this is where its exact mass lies:

# %%
draw_query(inspection, what="mass")

# %% [markdown]
# ## What stands for the rest
#
# What is done with the tiles that are not kept makes the difference. `"sparse"` drops them. `"merge"`, the default
# without trained gates, lets the mean of each tile stand for it in the same softmax, weighed by its number of tokens.
# `"sum"` adds attention between the means on top, which models must have been trained for. The relative error of this
# layer's output against dense attention:

# %%
dense = video_sparse_attention(query, key, value, grid.video_shape, top_k_ratio=1.0, combine="sparse")
ratios = (0.05, 0.125, 0.25, 0.5, 0.75, 1.0)
figure, axis = plt.subplots(figsize=(6, 3.4), dpi=80)
for combine, selection in (("sum", "mean"), ("sparse", "mean"), ("merge", "mean"), ("merge", "quarters")):
    errors = []
    for ratio in ratios:
        options = dict(top_k_ratio=ratio, combine=combine, selection=selection)
        output = video_sparse_attention(query, key, value, grid.video_shape, **options)
        errors.append(((output - dense).norm() / dense.norm()).item())
    axis.plot(ratios, errors, "o-", ms=4, label=f"{combine}, {selection}")
axis.set(xlabel="top_k_ratio", ylabel="relative error", ylim=(-0.02, 1.05), xlim=(0, 1.02))
axis.grid(alpha=0.3)
axis.legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# At a ratio of 1 `"sparse"` and `"merge"` are dense attention, up to rounding. This is the contract by which the
# package tests every model that it supports, and by which you can test your own.
#
# ## Gates
#
# In a model that was trained with VSA, the sum has a weight: `sparse + gate * coarse`, where the gate is a learned
# projection of the layer's input. [Fine-tuning](4_fine_tuning.ipynb) shows how a model is trained with sparse
# attention. [Choosing settings](3_choosing_settings.ipynb) shows what to do without training.
