"""Promises of the causal video autoencoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from soratrain.errors import ConfigError
from soratrain.models import weights
from soratrain.models.layers import Front
from soratrain.models.vae import VAE

NARROW = dict(latent_channels=4, encoder_blocks=[0, 1], decoder_blocks=[1, 1], time_kernels=[1, 3])
THREE = dict(latent_channels=4, channels=[8, 8, 16], encoder_blocks=[1, 1, 1], decoder_blocks=[1, 1, 1])
VARIANTS = {
    "time in the front": dict(
        NARROW, channels=[8, 16], time_strides=[2], space_strides=[2], front="space_to_depth", front_strides=[2, 4]
    ),
    "wavelet front": dict(
        NARROW, channels=[8, 16], time_strides=[2], space_strides=[2], front="haar", front_strides=[2, 4]
    ),
    "time in the levels": dict(
        THREE, time_strides=[2, 2], space_strides=[2, 2], time_kernels=[3, 3, 3], front="haar", front_strides=[1, 2]
    ),
    "no front": dict(
        latent_channels=4,
        channels=[8, 8, 16, 16],
        encoder_blocks=[0, 0, 0, 1],
        decoder_blocks=[1, 0, 0, 0],
        time_strides=[1, 2, 2],
        space_strides=[2, 2, 2],
        time_kernels=[1, 3, 3, 3],
        front="none",
        front_strides=[1, 1],
    ),
}


def make(name: str = "time in the levels") -> VAE:
    """Return a small VAE whose every weight counts: nothing is left at zero, statistics are not trivial."""
    torch.manual_seed(0)
    vae = VAE(**VARIANTS[name])  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        vae.latent_mean.uniform_(-1, 1)
        vae.latent_std.uniform_(0.5, 2)
    return vae.eval()


def clip(frames: int = 17, height: int = 16, width: int = 24, seed: int = 1) -> Tensor:
    return torch.rand((1, 3, frames, height, width), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def cut(x: Tensor, size: int) -> list[Tensor]:
    return list(x.split(size, dim=2))


@pytest.fixture(params=VARIANTS)
def vae(request: pytest.FixtureRequest) -> VAE:
    return make(request.param)


@torch.no_grad()
def test_stride_and_shapes(vae: VAE) -> None:
    assert vae.stride == (4, 8, 8)
    for frames, latents in ((1, 1), (5, 2), (17, 5)):
        latent = vae.encode(clip(frames))
        assert latent.shape == (1, 4, latents, 2, 3)
        assert vae.decode(latent).shape == (1, 3, frames, 16, 24)


@torch.no_grad()
def test_later_frames_leave_earlier_latents_bit_identical(vae: VAE) -> None:
    x = clip()
    for k in range(4):
        changed = x.clone()
        changed[:, :, 4 * k + 1 :] = clip(seed=2)[:, :, 4 * k + 1 :]
        before, after = vae.encode(x), vae.encode(changed)
        assert torch.equal(before[:, :, : k + 1], after[:, :, : k + 1])
        assert not torch.equal(before[:, :, k + 1], after[:, :, k + 1])


@torch.no_grad()
def test_later_latents_leave_earlier_frames_bit_identical(vae: VAE) -> None:
    latent = vae.encode(clip())
    changed = latent.clone()
    changed[:, :, 2:] += 1
    before, after = vae.decode(latent), vae.decode(changed)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5:9], after[:, :, 5:9])


@torch.no_grad()
def test_an_image_is_a_video_of_one_frame(vae: VAE) -> None:
    x = clip()
    torch.testing.assert_close(vae.encode(x[:, :, :1]), vae.encode(x)[:, :, :1], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 16, 17, 33])
@pytest.mark.parametrize("step", [4, 6, 16])
def test_any_chunking_encodes_like_the_whole(vae: VAE, size: int, step: int) -> None:
    x = clip(frames=33)
    pieces = list(vae.encode_stream(cut(x, size), frames_per_step=step))
    assert len(pieces) > 2
    torch.testing.assert_close(torch.cat(pieces, dim=2), vae.encode(x), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("step", [1, 3, 4])
def test_any_chunking_decodes_like_the_whole(vae: VAE, size: int, step: int) -> None:
    latent = torch.randn((1, 4, 9, 2, 3), generator=torch.Generator().manual_seed(3))
    pieces = list(vae.decode_stream(cut(latent, size), latents_per_step=step))
    torch.testing.assert_close(torch.cat(pieces, dim=2), vae.decode(latent), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_far_pixel_changes_nothing() -> None:
    vae = make("wavelet front")
    x = clip(frames=5, height=16, width=400)
    changed = x.clone()
    changed[..., -8:] *= -1
    before, after = vae.encode(x), vae.encode(changed)
    assert torch.equal(before[..., :30], after[..., :30])
    assert not torch.equal(before[..., -1], after[..., -1])
    assert torch.equal(vae.decode(before)[..., :100], vae.decode(after)[..., :100])


@torch.no_grad()
def test_tiles_with_a_halo_equal_the_whole() -> None:
    vae, halo = make("time in the front"), 8  # latent positions, more than encoder or decoder reach
    x = clip(frames=5, height=16, width=8 * 48)
    latent = vae.encode(x)
    tile = vae.encode(x[..., 8 * (16 - halo) : 8 * (32 + halo)])[..., halo:-halo]
    torch.testing.assert_close(tile, latent[..., 16:32], rtol=0, atol=1e-5)
    pixels = vae.decode(latent[..., 16 - halo : 32 + halo])[..., 8 * halo : -8 * halo]
    torch.testing.assert_close(pixels, vae.decode(latent)[..., 8 * 16 : 8 * 32], rtol=0, atol=1e-5)


@torch.no_grad()
def test_normalised_latents_have_mean_zero_deviation_one_and_no_correlation() -> None:
    vae = make()
    x = torch.cat([clip(seed=seed) for seed in range(8)])
    mean = vae.posterior(x)[0].transpose(0, 1).flatten(1)
    vae.set_statistics(mean.mean(1), torch.cov(mean))
    encoded = vae.encode(x)
    latent = encoded.transpose(0, 1).flatten(1)
    torch.testing.assert_close(latent.mean(1), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cov(latent), torch.eye(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(vae.denormalise(encoded), vae.posterior(x)[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_decode_undoes_the_normalisation_of_encode() -> None:
    vae = make()
    x = clip()
    torch.testing.assert_close(vae.decode(vae.encode(x)), vae.decode_chunk(vae.posterior(x)[0])[0], rtol=0, atol=1e-4)


def test_what_is_no_convolution_stays_fp32_under_autocast() -> None:
    vae, x = make("wavelet front"), clip()
    with torch.no_grad():
        vae.set_statistics(torch.zeros(4), torch.cov(torch.randn(4, 40, generator=torch.Generator().manual_seed(2))))
        latent = vae.encode(x)
        normalised, plain, bands = vae.normalise(latent), vae.denormalise(latent), vae.front(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(vae.normalise(latent), normalised) and torch.equal(vae.denormalise(latent), plain)
            assert torch.equal(vae.front(x), bands)
            assert vae.encode(x).dtype == torch.float32
            torch.testing.assert_close(vae.front.inverse(bands), x)


@pytest.mark.parametrize(("kind", "time", "space"), [("space_to_depth", 2, 4), ("haar", 2, 4), ("haar", 4, 2)])
def test_a_front_is_orthogonal_and_exactly_undone(kind: str, time: int, space: int) -> None:
    front, x = Front(kind=kind, time=time, space=space), clip()
    torch.testing.assert_close(front.inverse(front(x)), x)
    later = x[:, :, 1:]
    torch.testing.assert_close(front(later, first=False).norm(), later.norm())
    torch.testing.assert_close(front.inverse(front(later, first=False), first=False), later)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((6, 16, 16), "5 or extend to 9"), ((5, 12, 16), "height 12 .* 8 or 16"), ((5, 16, 70), "width 70 .* 64 or 72")],
)
def test_a_size_that_does_not_fit_names_the_nearest(size: tuple[int, int, int], nearest: str) -> None:
    with pytest.raises(ConfigError, match=nearest):
        make().encode(clip(*size))


def test_a_stream_whose_length_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="7 frames are not 1 \\+ 4k; trim to 5 or extend to 9"):
        list(make().encode_stream(cut(clip(7), 3), frames_per_step=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": [8, 24, 16]}, "divisor"),
        ({"time_strides": [2]}, "time_strides"),
        ({"front": "dct"}, "front"),
        ({"front_strides": [1, 3]}, "front_strides"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VAE(**{**VARIANTS["time in the levels"], **change})  # type: ignore[arg-type]


@torch.no_grad()
def test_weights_round_trip_with_their_statistics(tmp_path: Path) -> None:
    vae = make()
    weights.save(tmp_path, "vae", vae, partial(VAE, **VARIANTS["time in the levels"]), {})
    loaded, _ = weights.load(tmp_path, "vae")
    assert torch.equal(loaded.encode(clip()), vae.encode(clip()))


def test_every_parameter_receives_a_finite_gradient_after_one_step(vae: VAE) -> None:
    x = clip(9)
    mean, logvar = vae.posterior(x)
    loss = (vae.decode_chunk(mean + logvar.exp())[0] - x).square().mean()
    loss.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
