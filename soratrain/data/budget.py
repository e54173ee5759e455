"""What a micro-batch may cost."""

from __future__ import annotations

from dataclasses import dataclass

from soratrain.data.assignment import Bucket
from soratrain.errors import ConfigError


@dataclass(frozen=True)
class Budget:
    """How many samples of a bucket make a micro-batch: a fixed number, or as many as a cost allows (at least one).

    Attributes:
        batch_size: samples, the same for every bucket; or None.
        tokens_per_batch: cost of a micro-batch, where a sample of L tokens costs L + quadratic · L²; or None.
        quadratic: attention's part; 1/(6 · width) is where attention's products cost as much as all others.
        max_batch_size: bound for small buckets.
    """

    batch_size: int | None = None
    tokens_per_batch: int | None = None
    quadratic: float = 0.0
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        if (self.batch_size is None) == (self.tokens_per_batch is None):
            raise ConfigError(
                f"data.batch_size={self.batch_size} and data.tokens_per_batch={self.tokens_per_batch}: set one of them,"
                " the other to null"
            )
        for name in ("batch_size", "tokens_per_batch", "max_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}={value}: must be at least 1")
        if self.quadratic < 0:
            raise ConfigError(f"data.quadratic={self.quadratic}: must not be negative")

    def cost(self, bucket: Bucket) -> float:
        """Return what one sample costs, in tokens."""
        return bucket.tokens + self.quadratic * bucket.tokens**2

    @property
    def cap(self) -> int:
        """What a pack may cost. Raises ConfigError where samples are counted instead."""
        if self.tokens_per_batch is None or self.max_batch_size is not None:
            raise ConfigError(
                "data.batching=pack is bounded by data.tokens_per_batch alone: set data.batch_size and"
                " data.max_batch_size to null"
            )
        return self.tokens_per_batch

    def samples(self, bucket: Bucket) -> int:
        """Return the samples of one micro-batch."""
        if self.batch_size is not None:
            return self.batch_size
        assert self.tokens_per_batch is not None
        count = max(1, int(self.tokens_per_batch / self.cost(bucket)))
        return min(count, self.max_batch_size) if self.max_batch_size else count
