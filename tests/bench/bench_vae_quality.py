"""Quality for compute: our VAE and diffusers' AutoencoderKLWan of the same parameter count, trained by the same loop.

The loop, the batches (same seed, same order, same crops and noise), the loss, the optimizer and its schedule are one
piece of code; each net is trained at each of `RATES` and its better run counts, as each has a rate of its own. PSNR is
of clips that are not trained on, after each sixth of the steps. Data: the embedded world, and the real clips of
../shared/media where they are.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from soratrain.batch import VideoBatch, random_crop, to_pixels
from soratrain.data.buckets import Native
from soratrain.data.datamodule import VideoData
from soratrain.models.vae import VAE
from soratrain.stages.vae_losses import kl

ROOT = Path(__file__).parents[2]
MEDIA = ROOT.parent / "shared" / "media"
TITLE = "PSNR of clips not trained on, dB, after steps of the same training; parameters alike"
STEPS, BATCH, CROP, POINTS = 300, 8, 48, 6
RATES = (5e-4, 1e-3, 2e-3)
HELD_OUT = 12  # clips that only measure
NARROW: dict[str, Any] = dict(  # vae=s and vae=base at the width that has as many parameters
    channels=[14, 28, 56],
    time_strides=[2, 2],
    space_strides=[2, 2],
    encoder_blocks=[1, 2, 2],
    decoder_blocks=[2, 2, 3],
    time_kernels=[1, 3, 3],
    front="haar",
    front_strides=[1, 2],
)


class Peer(nn.Module):
    """AutoencoderKLWan, with the two calls that the loop makes; nothing is clamped, so that gradients reach all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from diffusers import AutoencoderKLWan

        self.net = AutoencoderKLWan(base_dim=width, z_dim=16)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance."""
        found = self.net.encode(x).latent_dist
        return found.mean, found.logvar

    def decode_chunk(self, latent: Tensor) -> tuple[Tensor, None]:
        """Return pixels, frame by frame with the cache, as `AutoencoderKLWan._decode` does."""
        net = self.net
        net.clear_cache()
        latent, parts = net.post_quant_conv(latent), []
        for step in range(latent.shape[2]):
            net._conv_idx = [0]
            piece = latent[:, :, step : step + 1]
            more = {"feat_cache": net._feat_map, "feat_idx": net._conv_idx, "first_chunk": step == 0}
            parts.append(net.decoder(piece, **more))
        net.clear_cache()
        return torch.cat(parts, dim=2), None


def ours(values: dict[str, Any]) -> Callable[[], nn.Module]:
    """Return a factory of our VAE."""
    return lambda: VAE(latent_channels=16, **values)


def tiny() -> dict[str, Any]:
    """Return the values of vae=tiny."""
    values = yaml.safe_load((ROOT / "conf" / "vae" / "tiny.yaml").read_text())
    return {key: value for key, value in values.items() if not key.startswith("_") and key != "latent_channels"}


def count(net: nn.Module) -> float:
    """Return millions of parameters."""
    return sum(item.numel() for item in net.parameters()) / 1e6


def train(make: Callable[[], nn.Module], data: VideoData, held: Sequence[Tensor], rate: float) -> list[float]:
    """Train from scratch and return the PSNR at each point."""
    torch.manual_seed(0)
    net = make()
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 30, 1.0) * min(1.0, 2 * (1 - step / STEPS))
    )
    points = []
    for step, batch in enumerate(data.loader(0, STEPS), 1):
        assert isinstance(batch, VideoBatch)
        x = to_pixels(random_crop(batch, CROP))
        mean, logvar = net.posterior(x)
        noise = torch.stack(batch.normal("posterior", [mean.shape[1:]] * len(mean), mean.device))
        error = net.decode_chunk(mean + torch.exp(0.5 * logvar) * noise)[0] - x
        loss = (error.abs() + 2 * error.square()).mean() + 1e-4 * kl(mean, logvar, x[0].numel()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % (STEPS // POINTS) == 0:
            points.append(psnr(net, held))
    return points


@torch.no_grad()
def psnr(net: nn.Module, held: Sequence[Tensor]) -> float:
    """Return the mean PSNR over clips."""
    found = []
    for clip in held:
        x = to_pixels(clip)
        error = (net.decode_chunk(net.posterior(x)[0])[0].clamp(-1, 1) - x).square().flatten(1).mean(1)
        found.append(-10 * torch.log10(error / 4 + 1e-10))
    return float(torch.cat(found).mean())


def prepared(place: Path) -> dict[str, tuple[VideoData, list[Tensor]]]:
    """Return the data to train on, and other clips that measure, of each source."""
    words = {"world": (["input=world", "world.clips=1200"], ["input=world", "world.clips=120", "world.seed=1"])}
    if MEDIA.is_dir():
        files = sorted(path for path in MEDIA.iterdir() if path.suffix != ".md")
        for name, some in (("train", [f for i, f in enumerate(files) if i % 4]), ("held", files[::4])):
            (place / f"{name}.txt").write_text("".join(f"{path}\n" for path in some))
        words["real clips"] = ([f"input={place}/train.txt"], [f"input={place}/held.txt"])
    found = {}
    for name, both in words.items():
        parts = []
        for part, more in zip(("train", "held"), both, strict=True):
            folder = place / f"{name} {part}"
            command = [sys.executable, "-m", "data_prep", *more, f"output={folder}"]
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
            buckets = Native(max_size="64x48" if name == "world" else "192x108", max_frames=9)
            common: dict[str, Any] = dict(shards=str(folder), buckets=buckets, seed=0, max_steps=10**6)
            parts.append(VideoData(**common, batch_size=BATCH, durations=[1, 5, 9], cache=1 << 30))
        held = [random_crop(batch, CROP) for batch in parts[1].loader(0, HELD_OUT)]
        found[name] = (parts[0], [clip for clip in held if clip.shape[1] == 9])
    return found


def measure() -> list[dict[str, str]]:
    """Return a row for each source and net."""
    nets: dict[str, Callable[[], nn.Module]] = {"ours, tiny": ours(tiny()), "ours, narrow base": ours(NARROW)}
    nets["diffusers' AutoencoderKLWan"] = lambda: Peer(10)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for source, (data, held) in prepared(Path(place)).items():
            for name, make in nets.items():
                runs = {rate: train(make, data, held, rate) for rate in RATES}
                rate, best = max(runs.items(), key=lambda item: item[1][-1])
                row = {"clips": source, "net": name, "million parameters": f"{count(make()):.2f}"}
                row["lr"] = f"{rate:g}"
                row |= {
                    str(step): f"{value:.2f}"
                    for step, value in zip(range(STEPS // POINTS, STEPS + 1, STEPS // POINTS), best, strict=True)
                }
                rows.append(row)
                sys.stderr.write(json.dumps(row | {"all": {str(key): value for key, value in runs.items()}}) + "\n")
    return rows


if __name__ == "__main__":
    import pprint

    pprint.pp(measure(), width=200)
