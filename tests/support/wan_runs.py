"""Short runs of a tiny Wan pipeline, and of those made like it, for what counts steps."""

import diffusers

from tiny_pipelines_video import TINY, PipelineRecipe, embeddings, video, wan

FOUR = dict(num_inference_steps=4, guidance_scale=1.0, output_type="latent")
FORCING_INPUTS = {
    "": dict,
    "ImageToVideo": lambda: dict(image=video(1)[0]),
    "VideoToVideo": lambda: dict(video=video(5), overlap_history=5, num_frames=21),
}


def build(scheduler=None, cls="WanPipeline", parts=None):
    return PipelineRecipe(cls, parts or wan(scheduler=scheduler or diffusers.UniPCMultistepScheduler), dict).build()


def call(pipe, **changes):
    return pipe(**embeddings(), **TINY | FOUR | changes)
