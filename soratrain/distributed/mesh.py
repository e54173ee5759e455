"""Data × sequence: which ranks share a micro-batch, and which have micro-batches of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from soratrain.errors import ConfigError


class Trained(Protocol):
    """What a mesh is asked of: a trainer."""

    @property
    def global_rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def strategy(self) -> Any: ...


@dataclass(frozen=True)
class Mesh:
    """Where a rank stands among data × sequence ranks; those of a group follow each other.

    Attributes:
        rank, size: its number, and how many there are.
        sequence: ranks of a group, k.
    """

    rank: int
    size: int
    sequence: int = 1

    @classmethod
    def of(cls, trainer: Trained) -> Mesh:
        """Return where this process stands in a trainer's run."""
        return cls(trainer.global_rank, trainer.world_size, getattr(trainer.strategy, "sequence", 1))

    @property
    def data_rank(self) -> int:
        """The group's number: which of the micro-batches are its own."""
        return self.rank // self.sequence

    @property
    def data_ranks(self) -> int:
        """How many groups there are."""
        return self.size // self.sequence

    @property
    def place(self) -> int:
        """The rank's number in its group."""
        return self.rank % self.sequence

    @property
    def counts(self) -> bool:
        """Whether this rank speaks for its group, where each sample must count once."""
        return self.place == 0


def divisors(number: int) -> str:
    """Return what divides `number`, in words."""
    return ", ".join(str(count) for count in range(1, number + 1) if number % count == 0)


def check_ranks(sequence: int, ranks: int, said: str) -> None:
    """Refuse ranks that do not make whole groups.

    Args:
        said: which keys the ranks are from.

    Raises:
        ConfigError: names what divides.
    """
    if sequence < 1 or ranks % sequence:
        raise ConfigError(
            f"parallel.sequence={sequence}: {ranks} ranks ({said}) make no whole groups of so many; use one of"
            f" {divisors(ranks)}, or other ranks"
        )


def check_heads(sequence: int, heads: int, said: str) -> None:
    """Refuse heads that cannot be dealt out evenly.

    Args:
        said: where the heads are from.

    Raises:
        ConfigError: names what divides.
    """
    if heads % sequence:
        raise ConfigError(
            f"parallel.sequence={sequence}: the {heads} heads of {said} cannot be dealt out evenly over so many ranks;"
            f" use one of {divisors(heads)}"
        )
