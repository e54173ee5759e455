"""Promises of the losses of the autoencoder: LPIPS, hinge, LeCam, and the balance of two gradients."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from soratrain.batch import draw_of
from soratrain.errors import ConfigError, DataError
from soratrain.models.discriminator import PatchDiscriminator
from soratrain.models.lpips import load_lpips
from soratrain.stages.vae_losses import Perceptual, balance, drawn_frames, hinge, lecam

VGG = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
VGG |= {17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}
POOLS, TAPS, WIDTHS = (4, 9, 16, 23), (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)


def weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return random weights under the names that torchvision's and lpips's files have."""
    random = torch.Generator().manual_seed(0)
    vgg = {"classifier.0.weight": torch.zeros(2, 2)}
    for index, (before, after) in VGG.items():
        vgg[f"features.{index}.weight"] = torch.randn(after, before, 3, 3, generator=random) * (9 * before) ** -0.5
        vgg[f"features.{index}.bias"] = 0.1 * torch.randn(after, generator=random)
    return vgg, {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1, generator=random) for i, n in enumerate(WIDTHS)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, (vgg, lin) = tmp_path_factory.mktemp("lpips"), weights()
    torch.save(vgg, folder / "vgg16.pth")
    save_file(lin, str(folder / "lin.safetensors"))
    return folder / "vgg16.pth", folder / "lin.safetensors"


def by_hand(x: Tensor, y: Tensor) -> Tensor:
    """Return LPIPS as its paper says, layer by layer, position by position."""
    vgg, lin = weights()
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((z - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for z in (x, y))
    total = torch.zeros(len(x))
    for index in range(30):
        if index in VGG:
            kernel, bias = vgg[f"features.{index}.weight"], vgg[f"features.{index}.bias"]
            x, y = (F.conv2d(z, kernel, bias, padding=1) for z in (x, y))
        elif index in POOLS:
            x, y = (F.max_pool2d(z, 2, 2) for z in (x, y))
        else:
            x, y = x.relu(), y.relu()
        if index in TAPS:
            a, b = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
            weight = lin[f"lin{TAPS.index(index)}.model.1.weight"].view(1, -1, 1, 1)
            total += ((a - b).square() * weight).sum(1).mean((1, 2))
    return total


def test_lpips_is_the_paper_s_distance_zero_for_equals_and_symmetric(files: tuple[Path, Path]) -> None:
    net = load_lpips(*files)
    x, y = torch.rand(2, 2, 3, 32, 48).mul(2).sub(1).unbind()
    distance = net(x, y)
    torch.testing.assert_close(distance, by_hand(x, y))
    assert (net(x, x) == 0).all() and (distance > 0).all()
    torch.testing.assert_close(net(y, x), distance)
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_lpips_has_a_finite_slope_where_no_feature_fires(files: tuple[Path, Path]) -> None:
    net = load_lpips(*files)
    for parameter in net.features.parameters():
        parameter.zero_()
    y = torch.zeros(1, 3, 16, 16, requires_grad=True)
    net(torch.ones(1, 3, 16, 16), y).sum().backward()
    assert y.grad is not None and y.grad.isfinite().all()


def test_lpips_stays_fp32_under_autocast(files: tuple[Path, Path]) -> None:
    net = load_lpips(*files)
    x, y = torch.rand(2, 1, 3, 16, 16).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x, y), net(x.float(), y.float()))
        assert net(x, y).dtype == torch.float32


def test_weights_that_do_not_fit_lpips_are_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    vgg, lin = weights()
    del vgg["features.5.bias"]
    vgg["features.0.weight"] = torch.zeros(64, 1, 3, 3)
    save_file(vgg, str(tmp_path / "vgg.safetensors"))
    with pytest.raises(DataError, match=r"lpips.vgg=.*features.5.bias.*features.0.weight \[64, 1, 3, 3\] instead of"):
        load_lpips(tmp_path / "vgg.safetensors", files[1])
    save_file(lin | {"lin9": torch.zeros(1)}, str(tmp_path / "lin.safetensors"))
    with pytest.raises(DataError, match=r"lpips.lin=.*unexpected \['lin9'\]"):
        load_lpips(files[0], tmp_path / "lin.safetensors")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(DataError, match="broken.pth: cannot be read"):
        load_lpips(tmp_path / "broken.pth", files[1])
    with pytest.raises(ConfigError, match="needs both files"):
        Perceptual(vgg=str(files[0]))
    with pytest.raises(ConfigError, match="lpips.lin=nowhere: there is no such file"):
        Perceptual(vgg=str(files[0]), lin="nowhere")


def test_without_weights_lpips_is_off_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    perceptual = Perceptual()
    with caplog.at_level("INFO", logger="soratrain"):
        perceptual.prepare(torch.device("cpu"))
    assert not perceptual.on
    assert [record.getMessage() for record in caplog.records] == [
        "LPIPS is off: lpips.vgg and lpips.lin name no weights"
    ]


def test_lpips_compares_the_frames_that_each_draw_alone_chooses(files: tuple[Path, Path]) -> None:
    perceptual = Perceptual(vgg=str(files[0]), lin=str(files[1]), frames=2)
    perceptual.prepare(torch.device("cpu"))
    batch = SimpleNamespace(draws=torch.tensor([draw_of(0, key) for key in "abc"]))
    x, y = torch.rand(2, 3, 3, 5, 16, 16).unbind()
    distance = perceptual(batch, x, y)
    chosen = list(drawn_frames(batch, 5, 2))
    assert all(len(set(index.tolist())) == 2 for index in chosen) and len({tuple(i.tolist()) for i in chosen}) > 1
    for sample, index in enumerate(chosen):
        alone = torch.stack([by_hand(x[sample, :, t][None], y[sample, :, t][None]) for t in index]).mean()
        torch.testing.assert_close(distance[sample], alone)
    turned = SimpleNamespace(draws=batch.draws.flip(0))
    torch.testing.assert_close(perceptual(turned, x.flip(0), y.flip(0)), distance.flip(0))


def test_hinge_is_half_of_what_the_margins_lack() -> None:
    real = torch.tensor([2.0, 0.5, -1.0, 1.0]).view(1, 1, 1, 2, 2)
    fake = torch.tensor([-2.0, -0.5, 0.0, 3.0]).view(1, 1, 1, 2, 2)
    by_hand = 0.5 * ((0 + 0.5 + 2 + 0) / 4 + (0 + 0.5 + 1 + 4) / 4)
    assert float(hinge(real, fake)) == pytest.approx(by_hand)
    assert float(hinge(torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, 1, 2, 2))) == 1.0


def test_lecam_grows_with_the_square_of_what_logits_exceed_the_other_side_s_mean() -> None:
    real = torch.tensor([2.0, -1.0]).view(1, 1, 1, 1, 2)
    fake = torch.tensor([-2.0, 1.0]).view(1, 1, 1, 1, 2)
    by_hand = ((2 + 0.5) ** 2 + 0) / 2 + ((0.75 + 2) ** 2 + 0) / 2
    assert float(lecam(real, fake, torch.tensor(0.75), torch.tensor(-0.5))) == pytest.approx(by_hand)


def test_the_balance_is_the_ratio_of_gradient_norms_up_to_a_bound() -> None:
    assert float(balance(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]), 100.0)) == pytest.approx(2.5)
    assert float(balance(torch.tensor([3.0, 4.0]), torch.zeros(2), 100.0)) == 100.0


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_a_patch_s_logit_depends_on_its_own_surroundings_and_sample_alone(frames: int) -> None:
    torch.manual_seed(0)
    net = PatchDiscriminator(channels=[8, 16, 16], time_strides=[1, 2, 1])
    x = torch.randn(2, 3, frames, 128, 32)
    logits = net(x)
    assert logits.shape == (2, 1, (frames + 1) // 2, 16, 4)
    torch.testing.assert_close(net(x[:1]), logits[:1])
    far = x.clone()
    far[:, :, :, -16:] = 9.0
    assert torch.equal(net(far)[:, :, :, :8], logits[:, :, :, :8])
    assert not torch.equal(net(far)[:, :, :, -1], logits[:, :, :, -1])
