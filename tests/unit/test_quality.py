"""Promises of the metrics: each equals a computation by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from soratrain.errors import ConfigError, DataError
from soratrain.frechet import ClipFeatures, frechet_distance
from soratrain.quality import BEST, psnr, ssim


def noisy(seed: int, height: int = 14, width: int = 17) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    x = draw.integers(0, 256, (height, width, 3))
    return x.astype(np.uint8), np.clip(x + draw.integers(-40, 41, x.shape), 0, 255).astype(np.uint8)


def ssim_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. (2004), eq. 13, window by window, on values of 0 to 255."""
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for channel in range(3):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                a, b = (v[top : top + 11, left : left + 11, channel].astype(float) for v in (x, y))
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                both = (window * (a - ma) * (b - mb)).sum()
                found.append((2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(found))


def test_psnr_equals_a_computation_by_hand():
    x, y = noisy(0)
    error = sum((int(a) - int(b)) ** 2 for a, b in zip(x.ravel(), y.ravel(), strict=True)) / x.size
    (found,) = psnr(torch.from_numpy(x)[None], torch.from_numpy(y)[None])
    assert float(found) == pytest.approx(20 * math.log10(255) - 10 * math.log10(error), abs=1e-9)


def test_a_frame_without_error_counts_as_the_best():
    x = torch.from_numpy(noisy(0)[0])[None]
    assert float(psnr(x, x)) == BEST and float(ssim(x, x)) == pytest.approx(1, abs=1e-6)


def test_ssim_equals_a_computation_by_hand_window_by_window(monkeypatch):
    monkeypatch.setattr("soratrain.quality.AT_ONCE", 1)  # a frame at a time changes nothing
    pairs = [noisy(seed) for seed in range(3)]
    x, y = (torch.from_numpy(np.stack(side)) for side in zip(*pairs, strict=True))
    assert ssim(x, y).tolist() == pytest.approx([ssim_by_hand(*pair) for pair in pairs], abs=1e-5)


def gaussian(mean: list[float], deviation: list[float], count: int, seed: int) -> torch.Tensor:
    """Samples whose own mean and covariance are exactly these."""
    x = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x * torch.tensor(deviation) + torch.tensor(mean)


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    x, y = gaussian([0, 1, 2], [1, 2, 3], 50, 0), gaussian([3, 1, -2], [2, 2, 1], 40, 1)
    assert frechet_distance(x, y) == pytest.approx(9 + 0 + 16 + 1 + 0 + 4, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(30, abs=1e-9)  # and no axis is special


def test_the_frechet_distance_of_covariances_that_do_not_commute_is_the_closed_form():
    x, y = gaussian([0, 0], [1, 1], 30, 0), gaussian([0, 0], [1, 1], 30, 1)
    a, b = torch.tensor([[2.0, 1.0], [0.0, 1.0]]).double(), torch.tensor([[1.0, 0.0], [-1.0, 3.0]]).double()
    first, second = a.T @ a, b.T @ b
    # of a 2 × 2 matrix with positive eigenvalues, tr(M^½)² = tr M + 2 √det M
    product = first @ second
    root = torch.sqrt(product.trace() + 2 * torch.sqrt(torch.linalg.det(product)))
    expected = float(first.trace() + second.trace() - 2 * root)
    assert frechet_distance(x @ a, y @ b) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_a_covariance_of_one_clip_is_refused():
    with pytest.raises(DataError, match="at least two clips, and here are 1"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(1, 3))


def test_a_file_that_is_no_torchscript_is_named(tmp_path):
    file = tmp_path / "i3d.pt"
    with pytest.raises(DataError, match="fvd.i3d=.*no such file"):
        ClipFeatures(str(file), 16, torch.device("cpu"))
    file.write_bytes(b"nothing")
    with pytest.raises(DataError, match="fvd.i3d=.*is not a TorchScript"):
        ClipFeatures(str(file), 16, torch.device("cpu"))
    with pytest.raises(ConfigError, match="fvd.frames=8"):
        ClipFeatures(str(file), 8, torch.device("cpu"))
