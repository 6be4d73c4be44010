"""Fine-tune a video transformer of diffusers with Video Sparse Attention.

    accelerate launch examples/training/train_vsa.py \\
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --data_dir latents \\
        --output_dir training --mixed_precision bf16

Trains from the shards that `precompute_latents.py` writes. A call that was interrupted is repeated as it was, and goes
on from its last checkpoint; with more `--max_train_steps`, a finished training goes on, too. The result in
`<output_dir>/final` is for `vsa_diffusers.load_vsa`. See docs/training.md.
"""

from __future__ import annotations

from collections.abc import Callable

from vsa_training.command_line import run_script
from vsa_training.options import Options
from vsa_training.trainer import Trainer


def begin(options: Options) -> Callable[[], None]:
    """Get everything ready, and return what trains, and says where the result is."""
    trainer = Trainer(options)

    def train() -> None:
        result = trainer.train()
        trainer.accelerator.print(f'load_vsa(pipe, "{result}") brings the result back on the stock pipeline.')

    return train


if __name__ == "__main__":
    run_script(Options, begin, __doc__.splitlines()[0])
