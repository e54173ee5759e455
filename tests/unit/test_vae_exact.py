"""Promises of the autoencoder's every size: chunks in time, tiles in space and recomputing change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from soratrain.errors import ConfigError
from soratrain.models.layers import through
from soratrain.models.tiles import Tiles
from soratrain.models.vae import VAE

CONF = Path(__file__).parents[2] / "conf" / "vae"
SIZES = sorted(
    path.stem for path in CONF.glob("*.yaml") if "soratrain.models.vae.VAE" in path.read_text()
)  # not of others
FRONTS = {"none": [1, 1], "space_to_depth": [1, 2], "haar": [2, 4]}


def narrow(size: str, **changes: object) -> VAE:
    """Return a published size with a few channels only, none of its weights at zero."""
    spec = {key: value for key, value in yaml.safe_load((CONF / f"{size}.yaml").read_text()).items() if key[0] != "_"}
    spec["channels"] = [4 * width // spec["channels"][0] for width in spec["channels"]]
    torch.manual_seed(0)
    vae = VAE(**{**spec, **changes})  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        vae.latent_mean.uniform_(-1, 1)
        vae.latent_std.uniform_(0.5, 2)
    return vae.eval()


@pytest.fixture(scope="module", params=[*SIZES, *(f"tiny {front}" for front in FRONTS)])
def vae(request: pytest.FixtureRequest) -> VAE:
    size, _, front = request.param.partition(" ")
    return narrow(size, front=front, front_strides=FRONTS[front]) if front else narrow(size)


def clip(vae: VAE, frames: int = 33, rows: int = 2, columns: int = 3) -> Tensor:
    side, random = vae.stride[1], torch.Generator().manual_seed(1)
    return torch.rand((1, 3, frames, rows * side, columns * side), generator=random) * 2 - 1


def latent_of(vae: VAE, frames: int = 9, rows: int = 2, columns: int = 3) -> Tensor:
    shape = (1, vae.latent_channels, frames, rows, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def ragged(x: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """Yield the frames of `x` in pieces of these sizes, over and over, and at the end what is left."""
    start = 0
    for size in cycle(sizes):
        if start >= x.shape[2]:
            return
        yield x[:, :, start : start + size]
        start += size


def whole(pieces: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(pieces), dim=2)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_a_high_compression_size_and_three_others_are_published() -> None:
    assert SIZES == ["base", "hc", "s", "tiny"]
    strides = {size: (narrow(size).stride, narrow(size).latent_channels) for size in SIZES}
    assert strides.pop("hc") == ((4, 16, 16), 48)
    assert set(strides.values()) == {((4, 8, 8), 16)}


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1], [2], [3], [5], [8], [17], [7, 1, 2, 11]], ids=str)
def test_any_chunks_of_every_size_and_front_equal_the_whole(vae: VAE, sizes: list[int]) -> None:
    x, step = clip(vae), sizes[0]
    close(whole(vae.encode_stream(ragged(x, sizes), frames_per_step=step)), vae.encode(x))
    latent = latent_of(vae)
    close(whole(vae.decode_stream(ragged(latent, sizes), latents_per_step=step)), vae.decode(latent))


@torch.no_grad()
def test_chunks_equal_the_whole_in_bfloat16_as_far_as_it_counts(vae: VAE) -> None:
    x, latent = clip(vae), latent_of(vae)
    with torch.autocast("cpu", torch.bfloat16):
        pairs = (
            (whole(vae.encode_stream(ragged(x, [3]), frames_per_step=4)), vae.encode(x)),
            (whole(vae.decode_stream(ragged(latent, [2]), latents_per_step=1)), vae.decode(latent)),
        )
    for found, expected in pairs:
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_without_a_gradient_the_numbers_are_those_that_training_saw(vae: VAE) -> None:
    x, latent = clip(vae, frames=9), latent_of(vae, frames=3)
    with torch.no_grad():
        encoded, decoded = vae.encode(x), vae.decode(latent)
    close(encoded, vae.encode(x))
    close(decoded, vae.decode(latent))


@pytest.mark.parametrize("size", SIZES)
def test_a_window_is_what_an_output_depends_on_no_more_and_no_less(size: str) -> None:
    """Gradients of one output, and of a pair, fill the window to both of its ends."""
    vae = narrow(size)
    for chain, channels in ((vae.encoder, 3 * vae.front.space**2 * vae.front.time), (vae.decoder, vae.latent_channels)):
        for layers in (chain, *chain.segments()):
            if layers is not chain:
                channels = next(p for p in layers.parameters() if p.dim() == 5).shape[1]
            scale = 1.0
            for layer in layers:
                scale *= float(layer.scale)  # type: ignore[arg-type]
            inputs = 256 if scale < 1 else 64
            x = torch.randn(1, channels, 1, 8, inputs, requires_grad=True)
            y, _ = layers(x)
            middle = y.shape[-1] // 2
            for start, stop in ((middle, middle + 1), (middle + 1, middle + 3)):
                (gradient,) = torch.autograd.grad(y[..., start:stop].square().sum(), x, retain_graph=True)
                reached = gradient.abs().amax(dim=(0, 1, 2, 3)).nonzero().flatten()
                assert (int(reached[0]), int(reached[-1]) + 1) == through(layers, start, stop)


def parts(vae: VAE, of: Callable[[VAE], object]) -> int:
    """Return into how many tiles `of` cut its finest level."""
    seen = []
    original = Tiles.__init__

    def watched(self: Tiles, *args: object, **options: object) -> None:
        original(self, *args, **options)  # type: ignore[arg-type]
        seen.append(max(len(segment.cuts[0]) * len(segment.cuts[1]) for segment in self.segments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tiles, "__init__", watched)
        of(vae)
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("budget", [0.7, 0.3], ids=str)
def test_tiles_equal_the_whole_with_chunks_in_time_and_without(vae: VAE, budget: float) -> None:
    rows, columns = max(9, 72 // vae.stride[1]), max(13, 104 // vae.stride[1])
    x, latent = clip(vae, 9, rows, columns), latent_of(vae, 3, rows, columns)
    pixels = int(vae.stride[0] * budget * x.shape[3] * x.shape[4])
    found: list[Tensor] = []

    def both(vae: VAE) -> None:
        found.append(whole(vae.encode_stream(ragged(x, [3]), pixels_per_step=pixels)))

    assert parts(vae, both) > 1
    close(found[0], vae.encode(x))
    try:
        close(whole(vae.decode_stream(ragged(latent, [2]), pixels_per_step=pixels)), vae.decode(latent))
    except ConfigError as error:  # so small a budget holds no tile of this size: what it names does
        pixels = int(str(error).split()[-3])
        close(whole(vae.decode_stream(ragged(latent, [2]), pixels_per_step=pixels)), vae.decode(latent))
        with pytest.raises(ConfigError, match="use"):
            whole(vae.decode_stream([latent], pixels_per_step=pixels - 1))


@torch.no_grad()
def test_a_tile_one_position_short_of_its_window_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The halo is not wider than it must be: one position less and the numbers differ."""
    vae = narrow("base")
    x = clip(vae, 5, 8, 12)
    pixels = 2 * x.shape[3] * x.shape[4]

    def short(*asked: Any) -> tuple[int, int]:
        low, high = through(*asked)
        return low + 1, high - 1

    monkeypatch.setattr("soratrain.models.tiles.through", short)
    latent = latent_of(vae, 2, 8, 12)
    assert (whole(vae.decode_stream([latent], pixels_per_step=pixels)) - vae.decode(latent)).abs().max() > 1e-4


@torch.no_grad()
def test_a_budget_bounds_what_a_step_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = narrow("base")
    x, most = clip(vae, 17, 9, 13), 20_000
    seen: list[int] = []
    for conv in (module for module in vae.encoder.modules() if isinstance(module, torch.nn.Conv3d)):
        conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    whole(vae.encode_stream([x], pixels_per_step=most))
    tiled = max(seen)
    seen.clear()
    vae.encode(x)
    assert tiled <= (1 + 2 / 4) * most * vae.encoder[0].conv.out_channels / 4 < max(seen) / 3  # type: ignore[union-attr]


def test_a_budget_below_the_smallest_tile_names_what_it_takes() -> None:
    vae = narrow("s")
    with pytest.raises(ConfigError, match=r"pixels_per_step=100 is less .* use \d+ or more"):
        next(vae.encode_stream([clip(vae)], pixels_per_step=100))


def gradients(vae: VAE, x: Tensor) -> list[Tensor]:
    mean, logvar = vae.posterior(x)
    y = vae.decode_chunk(mean + logvar.exp())[0]
    vae.zero_grad()
    ((y - x).square().mean() + 0.1 * mean.square().mean()).backward()
    return [parameter.grad.clone() for parameter in vae.parameters()]  # type: ignore[union-attr]


@pytest.mark.parametrize("size", SIZES)
def test_recomputing_gives_the_same_gradients_bit_for_bit(size: str) -> None:
    x = clip(narrow(size), 9)
    expected = gradients(narrow(size), x)
    for recompute in ("blocks", "levels"):
        found = gradients(narrow(size, recompute=recompute), x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("frames", "recompute"), [(4, "none"), (8, "levels")])
def test_a_long_clip_trained_chunk_by_chunk_has_the_whole_s_gradients(size: str, frames: int, recompute: str) -> None:
    x = clip(narrow(size), 33)
    expected = gradients(narrow(size), x)
    found = gradients(narrow(size, chunk_frames=frames, recompute=recompute), x)
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-6 * max(1.0, float(b.abs().max())))


def kept(vae: VAE, x: Tensor) -> int:
    """Return the bytes that the forward pass leaves for the backward pass."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mean, _ = vae.posterior(x)
        vae.decode_chunk(mean)[0].square().mean()
    return sum(held.values())


def test_recomputing_keeps_less_and_chunks_keep_a_fraction_of_what_a_frame_costs() -> None:
    x = clip(narrow("base"), 65, 4, 4)
    plain, blocks, levels, chunks = (
        kept(narrow("base", **options), x)
        for options in ({}, {"recompute": "blocks"}, {"recompute": "levels"}, {"chunk_frames": 16})
    )
    assert plain > 2.5 * blocks > 2.5 * levels
    assert plain > 5 * chunks


@pytest.mark.parametrize(
    ("change", "message"),
    [({"recompute": "all"}, "none, blocks or levels"), ({"chunk_frames": 6}, "multiple of 4; use 8")],
)
def test_unknown_ways_to_save_memory_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        narrow("base", **change)
