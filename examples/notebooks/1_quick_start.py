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
# # Quick start
#
# One video, made twice with the same model and the same noise: densely, and with Video Sparse Attention. Nothing is
# trained, and nothing in the pipeline's code changes.
#
# It uses the tiny Wan model of this repository, so that it runs anywhere, without a GPU and without a download. With a
# model of your own, only the path and the sizes differ:
#
# ```python
# pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16).to("cuda")
# ```

# %% tags=["parameters"]
MODEL = "../tiny_wan"
CALL = dict(height=256, width=256, num_frames=29, num_inference_steps=6, guidance_scale=4.0)
RATIO = 0.5

# %% [markdown]
# The model is at its best with 61 frames and 20 steps. These are fewer, so that the notebook is done in some minutes on
# two CPU cores.

# %%
import logging

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from diffusers import WanPipeline

from vsa_diffusers import disable_vsa, enable_vsa, set_top_k_ratio, vsa_status

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("vsa_diffusers").setLevel(logging.WARNING)  # a notebook shows what it wants to show

pipe = WanPipeline.from_pretrained(MODEL)
pipe.set_progress_bar_config(disable=True)
prompt = "a large yellow square moves down over purple stripes"


def make_video():
    """Frames [frames, height, width, 3] in 0 to 1."""
    return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="np", **CALL).frames[0]


dense = make_video()
dense.shape

# %% [markdown]
# ## One line
#
# `top_k_ratio` is the share of the key tiles that every query tile attends to exactly. What is left out is not lost:
# an average of each tile stands for it. The ratio is the mean over the run: early steps, which settle what the video
# shows, keep more. The first layer stays dense, which costs little and keeps the video close.

# %%
enable_vsa(pipe, top_k_ratio=RATIO, dense_layers=(0,))
sparse = make_video()


def psnr(video, reference):
    """How close two videos are, in decibels; above about 30 they are hard to tell apart."""
    return 10 * np.log10(1 / np.mean((video - reference) ** 2))


print(f"{psnr(sparse, dense):.1f} dB to the dense video")

# %% [markdown]
# What became sparse, what ran, and what stayed dense:

# %%
vsa_status(pipe)

# %% [markdown]
# ## Sparser
#
# The ratio may change between calls.

# %%
set_top_k_ratio(pipe, RATIO / 2)
sparser = make_video()
print(f"{psnr(sparser, dense):.1f} dB to the dense video")


# %%
def show(videos, columns=6):
    """Frames of several videos below each other."""
    picks = np.linspace(0, len(dense) - 1, columns).round().astype(int)
    figure, axes = plt.subplots(len(videos), columns, figsize=(9, 1.62 * len(videos)), squeeze=False, dpi=80)
    for row, (name, video) in zip(axes, videos.items(), strict=True):
        row[0].set_ylabel(name, fontsize=9)
        for axis, pick in zip(row, picks, strict=True):
            axis.imshow(video[pick].clip(0, 1))
            axis.set(xticks=[], yticks=[])
            if row is axes[0]:
                axis.set_title(f"frame {pick}", fontsize=8)
    figure.tight_layout()
    plt.show()


show({"dense": dense, f"VSA {RATIO:g}": sparse, f"VSA {RATIO / 2:g}": sparser})

# %% [markdown]
# How much faster is it? 32 tiles are too few to gain much. The longer the video and the larger its frames,
# the more there is to skip; the README has measurements. `vsa-diffusers compare MODEL PROMPT` measures your own model
# and size, dense and sparse, each warmed up, and shows the videos side by side.

# %% [markdown]
# ## And back
#
# `disable_vsa` restores what was there before. The same noise gives the same video again, bit for bit.

# %%
disable_vsa(pipe)
again = make_video()
bool((again == dense).all())

# %% [markdown]
# ## Keep the video
#
# ```python
# from diffusers.utils import export_to_video
#
# export_to_video(list(sparse), "video.mp4", fps=16)
# ```
#
# Next: [how it works](2_how_vsa_works.ipynb), and [how to choose the settings](3_choosing_settings.ipynb) for a model
# of your own.
