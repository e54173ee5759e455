"""LPIPS: how different two images look, by VGG16's features (Zhang et al., "The Unreasonable Effectiveness of Deep
Features as a Perceptual Metric", 2018), computed as their own code does.

The weights are not shipped. They are two files: torchvision's VGG16 (its `features`, without or with the classifier)
and the linear layers `vgg.pth` of the package lpips, version 0.1; each as `.pth` or as `.safetensors`.

Legend: B images, C channels, H W pixels.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from soratrain.errors import DataError

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels; a pool between blocks
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation, for [-1, 1]
EPSILON = 1e-10
SMALLEST = 16  # pixels a side, of which the last block sees one


class LPIPS(nn.Module):
    """Distance of images `[B, 3, H, W]` in [-1, 1], H and W at least 16: `[B]`, fp32, 0 for equal ones; frozen."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = []
        self.taps: list[int] = []  # after conv1_2, conv2_2, conv3_3, conv4_3 and conv5_3, each with its ReLU
        channels = 3
        for number, block in enumerate(BLOCKS):
            features += [nn.MaxPool2d(2)] if number else []
            for width in block:
                features += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.taps.append(len(features) - 1)
        self.features = nn.Sequential(*features)
        self.lins = nn.ParameterList(torch.zeros(1, block[-1], 1, 1) for block in BLOCKS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of each pair."""
        with torch.autocast(x.device.type, enabled=False):
            both = (torch.cat((x, y)).float() - self.shift) / self.scale
            total = torch.zeros(len(x), device=x.device)
            for index, layer in enumerate(self.features):
                both = layer(both)
                if index in self.taps:
                    # vector_norm's slope at zero is zero; that of the square root is infinite
                    length = torch.linalg.vector_norm(both, dim=1, keepdim=True)
                    left, right = (both / (length + EPSILON)).chunk(2)
                    lin = self.lins[self.taps.index(index)]
                    total = total + F.conv2d((left - right).square(), lin).mean(dim=(1, 2, 3))
        return total


def load_lpips(vgg: str | Path, lin: str | Path) -> LPIPS:
    """Return the network with the weights in two files.

    Raises:
        DataError: a file cannot be read, or its keys or shapes are others; the message names them.
    """
    net = LPIPS().eval()
    features = {key: value for key, value in read_tensors(vgg).items() if not key.startswith("classifier.")}
    fill({f"features.{key}": value for key, value in net.features.named_parameters()}, features, vgg, "lpips.vgg")
    fill({f"lin{i}.model.1.weight": value for i, value in enumerate(net.lins)}, read_tensors(lin), lin, "lpips.lin")
    return net


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """Return the tensors in a `.safetensors` or a `.pth` file; no code in it is run.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        if Path(file).suffix == ".safetensors":
            return load_file(str(file))
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise DataError(f"{file}: cannot be read ({' '.join(str(error).split())[:200]}); copy it again") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise DataError(f"{file}: holds no table of tensors; it must be a state dict")
    return dict(found)


def fill(own: Mapping[str, Tensor], given: Mapping[str, Tensor], file: str | Path, key: str) -> None:
    """Copy `given` into `own`, every name and shape matching.

    Raises:
        DataError: names what is missing, unexpected or of another shape.
    """
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    reshaped = [
        f"{name} {list(given[name].shape)} instead of {list(value.shape)}"
        for name, value in own.items()
        if name in given and given[name].shape != value.shape
    ]
    if missing or unexpected or reshaped:
        raise DataError(
            f"{key}={file}: does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}, of another shape"
            f" {reshaped[:3]}; lpips.vgg is torchvision's vgg16, lpips.lin is weights/v0.1/vgg.pth of the package lpips"
        )
    for name, value in own.items():
        value.copy_(given[name])
