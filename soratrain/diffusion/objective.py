"""Objectives: what noise is added, what the net predicts, and how one turns into the other. Pure maths.

`sigma` is the noise level that the net sees, 0 clean to 1 noise; it broadcasts against the latents. Noise and uniform
numbers come in as arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Protocol

from torch import Tensor

from soratrain.diffusion.ddpm import DDPM
from soratrain.diffusion.flow import Flow
from soratrain.errors import DataError

KINDS: dict[str, type[Flow] | type[DDPM]] = {kind.name: kind for kind in (Flow, DDPM)}


class Objective(Protocol):
    """What a stage and a sampler need to know of an objective: a dataclass of plain values, which weights keep."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """What config and weights call it."""

    @property
    def prediction(self) -> str:
        """What the net answers."""

    def levels(self, uniform: Tensor, tokens: Tensor) -> Tensor:
        """Return the noise level of each sample, from numbers in [0, 1) and the samples' token counts."""

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a, s): the noised latent is `a clean + s noise`."""

    def noised(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return the net's input."""

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return what a perfect net would answer."""

    def weight(self, sigma: Tensor) -> Tensor:
        """Return the factor of each sample's mean squared error."""

    def to_clean(self, noised: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        """Return the clean latent that the prediction implies."""

    def to_noise(self, noised: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        """Return the noise that the prediction implies."""

    def to_velocity(self, noised: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        """Return noise - clean: d noised / d sigma along a straight path."""

    def grid(self, steps: int, tokens: int, start: float = 1.0) -> Tensor:
        """Return the `steps + 1` noise levels of a sampling run, falling from `start` to 0."""


def rebuilt(values: Mapping[str, Any]) -> Objective:
    """Return the objective whose fields weights keep beside them.

    Raises:
        DataError: it is of a kind, or has a setting, that this version does not know.
    """
    given = dict(values)
    name = given.pop("name", None)
    if name not in KINDS:
        raise DataError(f"the weights are of the objective {name!r}; this version knows {', '.join(KINDS)}")
    kind = KINDS[name]
    unknown = sorted(given.keys() - {field.name for field in fields(kind)})
    if unknown:
        raise DataError(f"the weights' objective {name} has {unknown[0]}={given[unknown[0]]!r}; this version has none")
    return kind(**given)


def learned(beside: Mapping[str, Any]) -> Objective:
    """Return the objective that a DiT was trained for, from the values kept beside its weights.

    Raises:
        DataError: see `rebuilt`.
    """
    return rebuilt(beside.get("objective", {"name": "flow"}))
