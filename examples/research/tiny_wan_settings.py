"""How much of everything: one row of numbers for a CPU, one for a GPU."""

from dataclasses import dataclass

import torch

from tiny_wan_transformer import Clips, Phase


@dataclass(frozen=True)
class Settings:
    device: torch.device
    vae_minutes: float
    vae_batch_size: int
    vae_crop: int
    vae_frames: int
    vae_lr: float
    transformer_minutes: float
    transformer_lr: float
    phases: list[Phase]

    @property
    def clips(self) -> list[Clips]:
        """Every set of clips that some phase needs, smallest first."""
        return sorted({phase.clips for phase in self.phases}, key=lambda clips: clips.side**2 * clips.frames)

    @classmethod
    def for_device(cls, name: str) -> "Settings":
        """`name` is a torch device, or "auto"."""
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        return (_gpu if device.type == "cuda" else _cpu)(device)


def _cpu(device: torch.device) -> Settings:
    """For two cores and about two hours: mostly few tokens, the full grid at the end. Too little for good videos."""
    tiny, full = Clips(64, 29, 1536), Clips(256, 61, 64)
    return Settings(
        device=device,
        vae_minutes=32,
        vae_batch_size=4,
        vae_crop=64,
        vae_frames=13,
        vae_lr=5e-3,
        transformer_minutes=46,
        transformer_lr=2e-3,
        phases=[
            Phase(until=0.25, clips=tiny, batch_size=16, shift=1.0),
            Phase(until=0.70, clips=full, batch_size=6, shift=3.0, latent_frames=2),
            Phase(until=0.95, clips=full, batch_size=3, shift=3.0, latent_frames=4),
            Phase(until=1.00, clips=full, batch_size=1, shift=3.0),
        ],
    )


def _gpu(device: torch.device) -> Settings:
    """For one large GPU and about twenty minutes: the same path, with most of the time on full frames."""
    tiny, small, full = Clips(64, 29, 8192), Clips(128, 29, 8192), Clips(256, 61, 4096)
    return Settings(
        device=device,
        vae_minutes=6,
        vae_batch_size=64,
        vae_crop=64,
        vae_frames=17,
        vae_lr=3e-3,
        transformer_minutes=9.5,
        transformer_lr=2e-3,
        phases=[
            Phase(until=0.10, clips=tiny, batch_size=128, shift=1.0),
            Phase(until=0.25, clips=small, batch_size=64, shift=1.7),
            Phase(until=0.55, clips=full, batch_size=32, shift=3.0, latent_frames=4),
            Phase(until=1.00, clips=full, batch_size=16, shift=3.0),
        ],
    )
