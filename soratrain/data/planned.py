"""A plan's micro-batches for Lightning, with exact resume.

State. A run is one endless epoch; its state is `Plan.state`: a few scalars, the same on every rank, whose count of
micro-batches is that of the finished optimizer steps, not of what workers have read ahead. A run that goes on with
another number of ranks, or from the middle of an accumulation, begins with the step after the last finished one.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from soratrain.batch import Batch
from soratrain.data.buckets import Buckets
from soratrain.data.budget import Budget
from soratrain.data.caption_table import open_captions, open_original_captions
from soratrain.data.captions import CaptionMix
from soratrain.data.dataset import MicroBatches, Source
from soratrain.data.held_clips import HeldClips
from soratrain.data.held_out import HeldOut
from soratrain.data.loader import make_loader
from soratrain.data.manifest import Manifest
from soratrain.data.mixing import assigned
from soratrain.data.plan import Plan
from soratrain.data.reading import read_manifest
from soratrain.data.remote import Remote
from soratrain.data.summary import remarks, summarise, table
from soratrain.distributed import halt
from soratrain.distributed.agree import agree
from soratrain.distributed.mesh import Mesh
from soratrain.errors import ConfigError

log = logging.getLogger(__name__)


class PlannedData(L.LightningDataModule, ABC):
    """What both kinds of data share.

    Args:
        shards: folder or URL of shards with a manifest, or several.
        captions: folder or folders of captions made later, joined by key; None uses those in the shards.
        buckets: how samples are put into buckets.
        mix: with several folders of shards, the share of the samples shown that each has; None: as they come.
        seed: of the order and of every draw.
        max_steps: optimizer steps in the whole run.
        batching: `bucket`: each micro-batch holds samples of one bucket; `pack`: of any, as many as cost the same.
        batch_size, tokens_per_batch, quadratic, max_batch_size: see `Budget`; token: 16 × 16 pixels of a latent frame.
        accumulate_blocks: blocks of an optimizer step.
        canonical_ranks: data-parallel ranks of a block; None takes those of the run's first start.
        gamma: exponent of tokens in a sample's loss weight.
        window: shards whose samples are mixed; see `Streams`.
        durations: numbers of frames 1 + 4k at which clips are shown, equally often; None shows each at its own.
        image_fraction: share of samples that are single frames; None takes them as they come.
        strides: `[1, 2]`: show clips also at these integer fractions of their frame rate; each sample draws one of
            those for which its clip is long enough, and its batch says the rate. None shows all at their own.
        caption_mix: weights of `synthetic` and `original` captions.
        caption_types: weights of caption types.
        workers: loader processes; 0 loads in the training process.
        prefetch: micro-batches that each worker reads ahead.
        cache: bytes of decoded samples that a rank keeps in memory, shared out among its workers.
        quarantine: JSON-lines file for samples that cannot be read.
        max_bad: share of the samples that may be unreadable before the run stops.
        remote: how shards in a store are read (`Remote`).
        held_out: which samples are never trained on; None holds out none.

    Raises:
        ConfigError: a value, or a combination of values, that cannot work.
    """

    def __init__(
        self,
        *,
        shards: str | Sequence[str],
        buckets: Buckets,
        seed: int,
        max_steps: int,
        captions: str | Sequence[str] | None = None,
        mix: Sequence[float] | None = None,
        batching: str = "bucket",
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        quadratic: float = 0.0,
        max_batch_size: int | None = None,
        accumulate_blocks: int = 1,
        canonical_ranks: int | None = None,
        gamma: float = 0.0,
        window: int = 64,
        durations: Sequence[int] | None = None,
        image_fraction: float | None = None,
        strides: Sequence[int] | None = None,
        caption_mix: Mapping[str, float] | None = None,
        caption_types: Mapping[str, float] | None = None,
        workers: int = 0,
        prefetch: int = 2,
        cache: int = 0,
        quarantine: str | None = None,
        max_bad: float = 0.01,
        remote: Remote | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        super().__init__()
        bounds = {"workers": (workers, 0), "prefetch": (prefetch, 1), "cache": (cache, 0), "max_steps": (max_steps, 0)}
        for name, (value, least) in bounds.items():
            if value < least:
                raise ConfigError(f"data.{name}={value}: must be at least {least}")
        if strides is not None and (1 not in strides or min(strides) < 1):
            raise ConfigError(f"data.strides={list(strides)}: must hold 1, and no number below it")
        self.strides = sorted(set(strides or (1,)))
        self.folders = [shards] if isinstance(shards, str) else list(shards)
        self.captions = [captions] if isinstance(captions, str) else list(captions or ())
        self.buckets, self.seed, self.max_steps = buckets, seed, max_steps
        self.batching, self.window = batching, window
        self.budget = Budget(batch_size, tokens_per_batch, quadratic, max_batch_size)
        self.accumulate_blocks, self.canonical_ranks, self.gamma = accumulate_blocks, canonical_ranks, gamma
        self.durations, self.image_fraction = durations, image_fraction
        self.mix, self.caption_mix, self.caption_types = mix, caption_mix, caption_types
        CaptionMix(sources=caption_mix, types=caption_types)  # what is wrong with them is said at once
        self.workers, self.prefetch, self.cache, self.remote = workers, prefetch, cache, remote
        self.quarantine, self.max_bad, self.held_out = quarantine, max_bad, held_out or HeldOut()
        self.seat: tuple[int, int] | None = None  # (rank, ranks) that share the data, where Lightning's are not those
        self._manifest: Manifest | None = None
        self._plan: Plan | None = None
        self._items: MicroBatches | None = None
        self._state: dict[str, Any] | None = None
        self._origin = (0, 0)  # micro-batches of a rank: done when fitting began, and Lightning's counter then
        self._begun: L.Trainer | None = None  # whose fitting that was

    @abstractmethod
    def source(self, manifest: Manifest, plan: Plan, cache: int) -> Source:
        """Return what reads this data's samples, keeping up to `cache` bytes of them."""

    def _world(self) -> tuple[int, int]:
        if self.seat is not None:
            return self.seat
        if self.trainer is None:
            return 0, 1
        mesh = Mesh.of(self.trainer)
        return mesh.data_rank, mesh.data_ranks

    @property
    def manifest(self) -> Manifest:
        """The table of samples, read once."""
        if self._manifest is None:
            self._manifest = read_manifest(*self.folders)
        return self._manifest

    def plan(self, world_size: int | None = None) -> Plan:
        """Return the plan, made once; `world_size` settles the canonical ranks where the config leaves them open.

        Raises:
            ConfigError: the ranks do not divide the canonical ranks, or the checkpoint is of another plan.
        """
        world_size = world_size or self._world()[1]
        if self._plan is None:
            stored = self._state["canonical_ranks"] if self._state and not self.canonical_ranks else None
            ranks = self.canonical_ranks or stored or world_size
            assignment = assigned(
                self.manifest,
                self.buckets,
                self.budget,
                ranks,
                durations=self.durations,
                weights=self.mix,
                image_fraction=self.image_fraction,
                held_out=self.held_out.count,
            )
            self._plan = Plan(
                assignment=assignment,
                manifest=self.manifest,
                seed=self.seed,
                budget=self.budget,
                batching=self.batching,
                accumulate_blocks=self.accumulate_blocks,
                canonical_ranks=ranks,
                gamma=self.gamma,
                window=self.window,
            )
        self._plan.per_rank(world_size)
        return self._plan

    def accumulation(self, world_size: int) -> int:
        """Return the micro-batches of a rank in an optimizer step, for `Trainer(accumulate_grad_batches=…)`."""
        return self.plan(world_size).per_rank(world_size)

    def summary(self) -> dict[str, Any]:
        """Return what the plan makes of the data (see `summarise`)."""
        return summarise(self.plan(), self.manifest)

    def items(self) -> MicroBatches:
        """Return this rank's micro-batches, by number; the same object each time, so that its cache is warm."""
        if self._items is None:
            plan, (rank, world_size) = self.plan(), self._world()
            if rank == 0 and halt.speaks():  # of ranks that share their tokens, the first
                found = summarise(plan, self.manifest)
                for line in remarks(found):
                    log.info("%s", line)
                for line in table(found):
                    log.debug("%s", line)
            self._items = MicroBatches(
                plan=plan,
                source=self.source(self.manifest, plan, self.cache // max(1, self.workers)),
                captions=self._captions(self.folders),
                rank=rank,
                world_size=world_size,
                quarantine=self.quarantine,
                max_bad=self.max_bad,
            )
        return self._items

    def _captions(self, folders: Sequence[str]) -> CaptionMix:
        """Return what chooses captions for the samples of `folders`."""
        beside = [open_original_captions(folder) for folder in folders]
        return CaptionMix(
            sources=self.caption_mix,
            types=self.caption_types,
            made=[open_captions(folder) for folder in self.captions],
            beside=[table for table in beside if table is not None],
        )

    def held(self) -> HeldClips:
        """Return the samples that are not trained on: some of these data, or of a folder of latents beside them.

        Raises:
            DataError: that folder holds samples that are trained on, or no latents.
        """
        if self.held_out.latents:
            found, clips = self.held_out.beside(self.manifest, self.remote)
            return HeldClips(found, self._captions([self.held_out.latents]), clips)
        plan = self.plan()
        source = self.source(self.manifest, plan, 0)
        return HeldClips(source, self._captions(self.folders), plan.assignment.held)

    def loader(self, start: int, end: int) -> DataLoader[Batch]:
        """Return a loader of this rank's micro-batches from number `start` up to `end`."""
        items = self.items()
        items.end = end
        return make_loader(items, start, end, workers=self.workers, prefetch=self.prefetch)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the rest of the run; asked after its last step, as much again of what would come next."""
        per_rank = self.plan().per_rank(self._world()[1])
        trainer, end = self.trainer, self.max_steps * per_rank
        if trainer is None:
            start = self.plan().check(self._state) // self._world()[1] if self._state else 0
            return self.loader(start, end)
        if self._begun is trainer and self._done() >= end:
            return self.loader(end, 2 * end)
        if trainer.world_size > 1 and getattr(trainer._accelerator_connector, "use_distributed_sampler", False):
            raise ConfigError("Trainer(use_distributed_sampler=True) would deal out the data twice; set it to False")
        automatic = trainer.lightning_module.automatic_optimization
        if automatic and trainer.accumulate_grad_batches != per_rank:
            raise ConfigError(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) is not the {per_rank}"
                " micro-batches that a step has on each rank; use data.accumulation(world_size)"
            )
        agree("plan", self.plan().state(0) | {"max_steps": self.max_steps})
        self._origin, self._begun = self._begin(), trainer
        return self.loader(self._origin[0], end)

    def _begin(self) -> tuple[int, int]:
        """Return where a rank begins, and what Lightning's counter of batches will say then.

        Where Lightning restores that counter from a checkpoint, it is moved to where this rank begins: it counts one
        rank's micro-batches, which are more or fewer if the number of ranks has changed.
        """
        assert self.trainer is not None
        start = self.plan().check(self._state) // self._world()[1] if self._state else 0
        loop = self.trainer.fit_loop.epoch_loop
        if not loop.restarting:
            return start, 0
        current: Any = loop.batch_progress.current
        moved = start - current.processed
        for progress in (current, loop.batch_progress.total):
            for name in ("ready", "started", "processed", "completed"):
                setattr(progress, name, getattr(progress, name) + moved)
        return start, start

    def _done(self) -> int:
        """Return the micro-batches of a rank that are behind the last finished optimizer step."""
        assert self.trainer is not None
        start, counter = self._origin
        current: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        done = start + current.processed - counter
        per_rank = self.plan().per_rank(self._world()[1])
        return done // per_rank * per_rank

    def state_dict(self) -> dict[str, Any]:
        """Return the plan's scalars."""
        return self.plan().state(self._done() * self._world()[1] if self.trainer is not None else 0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was written. Raises ConfigError where it is of another plan."""
        self._state = dict(state_dict)
        self.plan().check(self._state)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch; its draws stay on the CPU."""
        return batch.to(device, non_blocking=True)
