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
# # Choosing ratio, blocks and dense layers
#
# Every setting trades time for closeness to the dense video. This notebook finds out, for one model and one size,
# what a ratio would keep, which layers ask to stay dense, and what that does to the video.

# %% tags=["parameters"]
MODEL = "../tiny_wan"
CALL = dict(height=256, width=256, num_frames=29, num_inference_steps=6, guidance_scale=4.0)
RATIO = 0.2

# %%
import logging

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from diffusers import WanPipeline

from vsa_diffusers import disable_vsa, enable_vsa
from vsa_diffusers.inspection import inspect_attention
from vsa_diffusers.inspection.figures import draw_curves, draw_sharpness, draw_table
from vsa_diffusers.tiles import TileGrid, fitting_block_size

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("vsa_diffusers").setLevel(logging.WARNING)  # a notebook shows what it wants to show

pipe = WanPipeline.from_pretrained(MODEL)
pipe.set_progress_bar_config(disable=True)
prompt = "a small green ring moves left over blue dots"

# %% [markdown]
# ## Blocks: do the tiles fit the grid?
#
# A grid that is no multiple of the block has partial tiles at its edges, which cost as much as whole ones. `"auto"`
# takes the block that costs least on the grid. These are grids of common models and sizes, after patchification:

# %%
grids = {
    "Wan 2.1, 480x832, 81 frames": (21, 30, 52),
    "Wan 2.1, 720x1280, 81 frames": (21, 45, 80),
    "LTX-2, 512x768, 121 frames": (16, 16, 24),
    "HunyuanVideo, 720x1280, 129 frames": (33, 45, 80),
}
print(f"{'':36}{'tokens':>8}  {'(4, 4, 4) wastes':>17}  {'auto':>9}  wastes")
for name, shape in grids.items():
    usual, fitting = TileGrid(shape, (4, 4, 4)), TileGrid(shape, fitting_block_size(shape))
    block = "x".join(map(str, fitting.block_size))
    print(f"{name:36}{usual.num_tokens:8}  {usual.padding:17.0%}  {block:>9}  {fitting.padding:6.0%}")

# %% [markdown]
# Trained gates are bound to the block they were trained with; everything else may take `block_size="auto"`.
#
# ## What would a ratio keep?
#
# One dense video tells what sparse attention would do in every layer. Of some query tiles the whole softmax is
# computed, so the share of it that kept tiles hold, the *mass*, is exact.

# %%
inspection = inspect_attention(pipe, prompt, RATIO, steps=3, **CALL)
draw_curves(inspection)

# %% [markdown]
# Lines that rise early are sharp layers, in which few tiles hold most of the mass. Tiles that are not kept are still
# there by their means, so 60 % of the mass does not mean 40 % of error. Which share would each layer need for 90 %?

# %%
draw_sharpness(inspection)

# %% [markdown]
# ## Which layers ask to stay dense?
#
# The error of a layer's output says more than its mass, since it counts what the means make up for.

# %%
draw_table(inspection, "error")

# %%
print(inspection.advice)

# %% [markdown]
# The rule is simple: a layer asks if its worst error is more than 1.5 times that of the median layer. Keeping one
# layer dense costs the same whichever it is, so it should be one that is much worse than the others. If all are bad
# alike, no layer asks, and the ratio is what should change.
#
# Errors are largest in the first steps, where the video takes its shape. That is why the first steps are worth more
# than any layer, and why a ratio is spent at the front unless `schedule="constant"` says otherwise.
#
# ## What it does to the video
#
# The same noise, made densely and with three settings:

# %%
settings = {
    f"{RATIO:g} in every step": dict(schedule="constant"),
    f"a mean of {RATIO:g}, spent at the front": dict(),
    "and the first layer dense": dict(dense_layers=(0,)),
}


def make_video():
    return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="np", **CALL).frames[0]


dense = make_video()
videos = {"dense": dense}
for name, options in settings.items():
    enable_vsa(pipe, RATIO, **options)
    videos[name] = make_video()
pipe = disable_vsa(pipe)

# %%
picks = np.linspace(0, len(dense) - 1, 6).round().astype(int)
figure, axes = plt.subplots(len(videos), len(picks), figsize=(9, 1.72 * len(videos)), dpi=80)
for row, (name, video) in zip(axes, videos.items(), strict=True):
    closeness = 10 * np.log10(1 / max(np.mean((video - dense) ** 2), 1e-12))
    title = name if video is dense else f"{name}: {closeness:.1f} dB to dense"
    row[0].set_title(title, fontsize=9, loc="left")
    for axis, pick in zip(row, picks, strict=True):
        axis.imshow(video[pick].clip(0, 1))
        axis.set(xticks=[], yticks=[])
figure.tight_layout()
plt.show()

# %% [markdown]
# ## A way through
#
# 1. Start with `enable_vsa(pipe, 0.5, block_size="auto")` and look at the video.
# 2. Keep the layers dense that ask for it. Early steps get more tiles already, and `dense_steps=0.2` gives them all.
# 3. Lower the ratio while you like what you see. Curves that flatten out late mean that there is little to gain.
# 4. Still not close enough at the speed you need? [Fine-tune](4_fine_tuning.ipynb): a model that was trained with
#    sparse attention bears a lower ratio.
#
# On the command line, `vsa-diffusers inspect MODEL PROMPT` writes all of these figures and numbers for any model, as
# a page to read.
