"""Fine-tune a video transformer of diffusers with Video Sparse Attention.

    accelerate launch examples/train_vsa.py --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
        --data_dir latents --output_dir training --top_k_ratio 0.125 --ramp_steps 300 --mixed_precision bf16

Trains from the shards that `precompute_latents.py` writes. A call that was interrupted is repeated as it was, and goes
on from its last checkpoint. The result in `<output_dir>/final` is for `vsa_diffusers.load_vsa`. See docs/training.md.
"""

from __future__ import annotations

from transformers import HfArgumentParser
from vsa_training.options import Options
from vsa_training.trainer import Trainer


def main(options: Options) -> None:
    """Train, and say where the result is."""
    trainer = Trainer(options)
    result = trainer.train()
    trainer.accelerator.print(f'load_vsa(pipe, "{result}") brings the result back on the stock pipeline.')


if __name__ == "__main__":
    main(*HfArgumentParser(Options, description=__doc__.splitlines()[0]).parse_args_into_dataclasses())
