"""Promises of the memory that is foretold: it is near what is measured."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_dit import build, clips, texts
from test_dit import run as forward

from soratrain.diffusion.segments import Segment
from soratrain.distributed.memory import dit_activations, measured_activations, most_tokens
from soratrain.models.vae import VAE
from soratrain.stages.plan_scale import Reconstruction


class Called:
    """A net by its forward pass alone."""

    def __init__(self, run, patch) -> None:
        self.run, self.patch = run, patch

    def __call__(self, *arguments: object) -> torch.Tensor:
        return self.run(*arguments)


@pytest.mark.parametrize(("dim", "depth"), [(64, 4), (128, 6)])
def test_the_dits_activations_are_near_what_a_forward_pass_keeps(dim: int, depth: int) -> None:
    net, segments, tokens = build(dim=dim, depth=depth, mlp_ratio=4.0), clips([(4, 5, 16, 16)] * 2), 2 * 5 * 8 * 8
    net.forward = lambda _, run=net.forward: forward(Called(run, net.patch), segments, *texts(2))  # type: ignore[method-assign, misc, assignment]
    measured = measured_activations(net, torch.zeros(1))
    guess = dit_activations(tokens=tokens, dim=dim, depth=depth, mlp_ratio=4.0, itemsize=4)
    assert guess == pytest.approx(measured, rel=0.25)


RATIO = 3.0  # of the MLP


def peak(path: str, recompute: str, depth: int, training: bool, rows: bool, half: bool) -> None:
    """Write how many bytes a process of its own adds while a DiT works on one pack."""
    torch.set_num_threads(1)
    net = build(dim=192, depth=depth, num_heads=3, mlp_ratio=RATIO, recompute=recompute)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    segments, (text, packing) = clips([(4, 5, 48, 48)] * 2), texts(2)
    if rows:
        levels = torch.arange(5 * 24 * 24) % 2 / 2
        segments = [replace(segment, sigma=levels) for segment in segments]

    def work(segments: list[Segment]) -> None:
        with torch.set_grad_enabled(training):
            with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
                out = forward(net, segments, text, packing)
            if training:
                out.float().square().mean().backward()

    work(clips([(4, 1, 8, 8)] * 2))  # what a process sets up once is none of a pack's
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    work(segments)
    Path(path).write_text(str(high_water() - before))


def high_water() -> int:
    """Return the most bytes that this process has held since the kernel was told to forget."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak")
@pytest.mark.parametrize(
    ("depth", "rows", "half"), [(2, False, False), (6, False, False), (6, True, False), (6, True, True)]
)
@pytest.mark.parametrize(
    ("recompute", "training"), [("none", True), ("selective", True), ("full", True), ("none", False)]
)
def test_the_memory_a_dit_adds_at_its_peak_is_near_what_is_foretold(
    recompute: str, training: bool, depth: int, rows: bool, half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rows`: tokens of a clip are at two noise levels in turn, so that nothing of a row stands together."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")  # what is freed is gone, and not kept in the heap's holes
    file = tmp_path / "bytes"
    arguments = (str(file), recompute, depth, training, rows, half)
    process = multiprocessing.get_context("spawn").Process(target=peak, args=arguments)
    process.start()
    process.join()
    sizes = {"dim": 192, "depth": depth, "mlp_ratio": RATIO, "itemsize": 2 if half else 4, "recompute": recompute}
    guess = dit_activations(tokens=2 * 5 * 24 * 24, training=training, **sizes)
    assert guess == pytest.approx(int(file.read_text()), rel=0.15)


def test_the_most_tokens_that_fit_are_those_that_fill_the_budget() -> None:
    sizes = {"dim": 192, "depth": 6, "mlp_ratio": 3.0, "itemsize": 2, "recompute": "full"}
    most = most_tokens(1 << 30, **sizes)
    assert dit_activations(tokens=most, **sizes) <= 1 << 30 < dit_activations(tokens=most + 2, **sizes)
    assert most_tokens(1 << 30, **{**sizes, "recompute": "none"}) < most < most_tokens(1 << 30, training=False, **sizes)


def test_the_vaes_activations_grow_with_its_pixels() -> None:
    vae = partial(
        VAE,
        latent_channels=4,
        channels=[16, 32],
        time_strides=[2],
        space_strides=[2],
        encoder_blocks=[1, 1],
        decoder_blocks=[1, 1],
        time_kernels=[1, 3],
        front_strides=[2, 4],
    )
    small = measured_activations(Reconstruction(vae()), torch.zeros(1, 3, 9, 64, 64))
    large = measured_activations(Reconstruction(vae()), torch.zeros(2, 3, 17, 96, 128))
    assert small == pytest.approx(large, rel=0.15)
