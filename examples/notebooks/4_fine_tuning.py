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
# # Fine-tuning, and bringing it back
#
# A model that was trained with sparse attention bears a lower ratio. We take the training code of `examples/`, train
# the tiny Wan model for a few steps on videos that we draw ourselves, and bring the result back onto the stock
# pipeline.

# %% tags=["parameters"]
MODEL = "../tiny_wan"
SIZE = dict(height=128, width=128, num_frames=29)
CLIPS, TRAIN_STEPS, BATCH, SIGMAS = 18, 24, 2, 4
RATIO = 0.125
VIDEO = dict(height=256, width=256, num_frames=29, num_inference_steps=6, guidance_scale=4.0)
FINE_TUNED = "../tiny_wan_vsa"
WORK = "fine_tuning"  # a folder for videos, latents and checkpoints

# %% [markdown]
# This is enough to see the loss fall, on two CPU cores in some minutes, and not enough for a good model. The
# repository's own fine-tuned weights, `examples/tiny_wan_vsa`, took 600 steps of 8 full-size clips, which is a minute
# and a half on a GPU.

# %%
import contextlib
import io
import json
import logging
import shutil
import sys
from pathlib import Path

import diffusers
import imageio.v3 as imageio
import matplotlib.pyplot as plt
import torch
import transformers
from diffusers import WanPipeline

sys.path += ["..", "../training", "../research"]  # the scripts, and what draws videos
import precompute_latents
from procedural_video import render, sample_scene
from vsa_training.options import Options
from vsa_training.trainer import Trainer

from vsa_diffusers import disable_vsa, enable_vsa, load_vsa, vsa_status

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("vsa_diffusers").setLevel(logging.WARNING)  # a notebook shows what it wants to show
work = Path(WORK)

# %% [markdown]
# ## 1. Videos with captions
#
# Any folder of videos will do, with a text file beside each, or a `metadata.jsonl`.

# %%
(work / "videos").mkdir(parents=True)
for seed in range(CLIPS):
    scene = sample_scene(seed)
    frames = ((render(scene, SIZE["height"], SIZE["width"], SIZE["num_frames"]) + 1) * 127.5).round().byte()
    imageio.imwrite(work / "videos" / f"{seed:03}.mp4", frames.permute(1, 2, 3, 0).numpy(), plugin="FFMPEG", fps=16)
    (work / "videos" / f"{seed:03}.txt").write_text(scene.caption)
scene.caption

# %% [markdown]
# ## 2. Encode them once
#
# Training needs neither VAE nor text encoder, so both do their work beforehand. On the command line:
#
# ```sh
# accelerate launch precompute_latents.py --pretrained_model_name_or_path MODEL \
#     --data_dir videos --output_dir latents --height 480 --width 832 --num_frames 81 --fps 16
# ```

# %%
options = precompute_latents.Options(
    MODEL,
    str(work / "videos"),
    str(work / "latents"),
    **SIZE,
    fps=16,
    samples_per_shard=max(2, CLIPS // 6),
    dtype="fp32",
    pipeline_arguments='{"max_sequence_length": 32}',
)
with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
    precompute_latents.main(options)
sorted(path.name for path in (work / "latents").iterdir())[:3]

# %% [markdown]
# ## 3. Train
#
# On the command line `accelerate launch train_vsa.py` with options of the same names. The defaults are the recipe
# that did best: merge, tiles ranked by quarters, first and last layer dense, all weights. The last shard is held out;
# its loss always has the same noise, so its values compare.

# %%
training = Options(
    MODEL,
    str(work / "latents"),
    str(work / "training"),
    top_k_ratio=RATIO,
    block_size=[2, 2, 2],
    max_train_steps=TRAIN_STEPS,
    train_batch_size=BATCH,
    gradient_accumulation_steps=1,
    validation_steps=max(1, TRAIN_STEPS // 4),
    validation_sigmas=SIGMAS,
    dataloader_num_workers=0,
)
with contextlib.redirect_stderr(io.StringIO()):
    trainer = Trainer(training)
    result = trainer.train()

# %%
curve = [json.loads(line) for line in (work / "training" / "metrics.jsonl").read_text().splitlines()]
validation = [(line["step"], line["validation_loss"]) for line in curve if "validation_loss" in line]
figure, axis = plt.subplots(figsize=(6, 3), dpi=80)
axis.plot([line["step"] for line in curve], [line["loss"] for line in curve], color="#9ca3af", label="training")
axis.plot(*zip(*validation, strict=True), "o-", color="#1d4ed8", label="held out")
axis.set(xlabel="step", ylabel="loss", ylim=(0, None))
axis.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 4. Bring it back
#
# What training leaves is a directory: weights, and the settings that they were trained with. `load_vsa` puts both onto
# the stock pipeline.

# %%
pipe = WanPipeline.from_pretrained(MODEL)
pipe.set_progress_bar_config(disable=True)
load_vsa(pipe, result)
vsa_status(pipe)


# %% [markdown]
# ## What more training does
#
# A few steps on small clips make no better videos yet. `examples/tiny_wan_vsa` holds what 600 steps on full-size clips
# left. Here is the stock model, densely and at the same ratio, and then with these weights, all from the same noise:


# %%
def make_video():
    """Frames [frames, height, width, 3] in 0 to 1."""
    return stock(prompt, generator=torch.Generator().manual_seed(0), output_type="np", **VIDEO).frames[0]


prompt = "a large red ring moves left over blue waves"
stock = WanPipeline.from_pretrained(MODEL)
stock.set_progress_bar_config(disable=True)
videos = {"dense": make_video()}
enable_vsa(stock, RATIO, dense_layers=(0,), block_size=(4, 4, 4), schedule="constant")
videos["stock weights"] = make_video()
disable_vsa(stock)
load_vsa(stock, FINE_TUNED)
videos["fine-tuned"] = make_video()

# %%
figure, axes = plt.subplots(3, 5, figsize=(7.5, 4.8), dpi=80)
for row, (name, video) in zip(axes, videos.items(), strict=True):
    row[0].set_ylabel(name)
    for axis, pick in zip(row, range(0, len(video), max(1, len(video) // 5)), strict=False):
        axis.imshow(video[pick].clip(0, 1))
    for axis in row:
        axis.set(xticks=[], yticks=[])
figure.tight_layout()
plt.show()

# %% [markdown]
# The directory can be shared like any model's, and `save_vsa(pipe, directory)` writes one of your own training loop.
# The documentation's page on training has gates, LoRA, several GPUs, and what was measured.

# %%
shutil.rmtree(work)
