"""stage=sample: clips from prompts, and from pictures and videos, as MP4, PNG and JSON.

What is drawn is settled before a net is read: files opened, sizes checked. A sample depends on its seed, its prompt and
its inputs alone, never on its batch or on who draws it; so processes share the batches, and a second run draws only
what is missing.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import soratrain
from soratrain.batch import draw_of
from soratrain.diffusion.generator import Generator
from soratrain.diffusion.sampler import Sampler
from soratrain.diffusion.sizes import check_fps, check_prompt
from soratrain.diffusion.ways import Layout
from soratrain.distributed.mesh import Mesh, check_ranks
from soratrain.distributed.ranks import LONGEST, Ranks, deal
from soratrain.distributed.room import available
from soratrain.distributed.sequence import Ulysses, share
from soratrain.errors import ConfigError, UserError
from soratrain.expand.expansion import Expanded, Expansion
from soratrain.models import weights
from soratrain.models.autoencoders import stride_at
from soratrain.schema import SEEDS
from soratrain.stages.pace import Pace, progress
from soratrain.stages.sample_files import Writer, clip_of, is_there, name_of, slug
from soratrain.stages.sample_joints import Joined
from soratrain.stages.sample_memory import most_at_once
from soratrain.stages.sample_prompts import Wish, wishes
from soratrain.stages.sample_tasks import Order, Scene, Task

__all__ = ["Generator", "Sample", "parse_size", "slug"]

log = logging.getLogger(__name__)


def parse_size(size: str) -> tuple[int, int]:
    """Return (height, width) of `WIDTHxHEIGHT`.

    Raises:
        ConfigError: it is written otherwise.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*", str(size))
    if not match:
        raise ConfigError(f"size={size!r} is not WIDTHxHEIGHT; write 832x480, say")
    return int(match[2]), int(match[1])


@dataclass(frozen=True)
class Item:
    """A sample to draw, and what is written beside it; all but the weights is known before they are read."""

    prompt: str  # that is drawn from
    seed: int
    scene: Scene
    notes: dict[str, Any]

    @property
    def draw(self) -> int:
        """The seed of its noise."""
        return draw_of(self.seed, self.prompt)

    def drawn_from(self, longer: Expanded | None) -> Item:
        """Return the sample as it is drawn from a longer prompt, whose notes have both; without one, as it is."""
        if longer is None:
            return self
        prompts = {"prompt": self.notes["prompt"], "expanded": longer.text, "expanded_by": longer.by}
        rest = {key: value for key, value in self.notes.items() if key not in prompts}
        return replace(self, prompt=longer.text, notes=prompts | rest)


class Sample:
    """The job of `stage=sample`.

    Args:
        out: the stage's folder; clips go to `samples/`.
        vae, dit: folders with the weights.
        task: what to draw from what.
        prompt: what to draw: one text, or several.
        prompts_file: a file with prompts instead (`sample_prompts.py`).
        expand: makes prompts longer before they are drawn; None draws them as they are.
        samples: of each prompt, with the seeds `seed`, `seed + 1`, …
        size: `WIDTHxHEIGHT` in pixels; None takes it off the task's input.
        frames: 1 for an image, else 1 + 4k; None takes those of the input.
        fps: frames per second; None takes that of the input.
        seed: with the prompt, settles the noise.
        sampler: how a run goes.
        area: `WIDTHxHEIGHT` with the area of frames whose size is taken off an input.
        patch: latent positions of a token, so that a wrong size is refused before the weights are read.
        batch: most clips drawn at once; fewer where memory is short.
        precision: `bf16-mixed` draws under autocast, `32-true` does not.
        sequence: processes that draw each clip together, sharing its tokens.

    Raises:
        ConfigError: a value, or an input, that cannot be drawn from.
        DataError: an input that cannot be read.
    """

    def __init__(
        self,
        *,
        out: str,
        vae: str,
        dit: str,
        task: Task,
        prompt: str | Sequence[str] | None,
        size: str | None,
        frames: int | None,
        fps: float | None,
        seed: int,
        sampler: Sampler,
        prompts_file: str | None = None,
        expand: Expansion | None = None,
        samples: int = 1,
        area: str = "832x480",
        patch: Sequence[int] = (1, 2, 2),
        batch: int = 16,
        precision: str = "32-true",
        sequence: int = 1,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"stage.job.batch={batch} must be at least 1")
        self.out, self.vae, self.dit, self.batch, self.precision = Path(out), vae, dit, batch, precision
        self.task, self.sampler, self.area = task, sampler, parse_size(area)
        self.patch, self.stride = tuple(patch), stride_at(vae)
        self.sequence, self.expand = sequence, expand or None
        self.own = {"seed": seed, "samples": samples, "size": size, "frames": frames, "fps": fps}
        self.scenes: dict[tuple[Task, Order], Scene] = {}
        self.items = [item for wish in wishes(prompt, prompts_file, task) for item in self._placed(wish)]

    def _placed(self, wish: Wish) -> list[Item]:
        """Return the samples of one prompt; what is wrong with it is said with its place in a file."""
        try:
            return self._items(wish)
        except UserError as error:
            if not wish.place:
                raise
            raise type(error)(f"{wish.place}: {error}") from error

    def _items(self, wish: Wish) -> list[Item]:
        """Return the samples of one prompt."""
        own, task = {**self.own, **wish.own}, wish.of(self.task)
        check_prompt(wish.prompt, self.sampler.guidance_scale)
        if own["samples"] < 1:
            raise ConfigError(f"samples={own['samples']} must be at least 1")
        if not 0 <= own["seed"] < SEEDS:
            raise ConfigError(f"seed={own['seed']} must lie between 0 and {SEEDS - 1}")
        if own["fps"] is not None:
            check_fps(own["fps"])
        size = None if own["size"] is None else parse_size(own["size"])
        order = Order(size, own["frames"], own["fps"], self.area[0] * self.area[1], self.patch, self.stride)
        scene = self.scenes.get((task, order)) or task.scene(order)
        check_fps(scene.fps)
        self.scenes[task, order] = scene
        seeds = range(own["seed"], own["seed"] + own["samples"])
        return [self._item(wish.prompt, seed, task, order, scene) for seed in seeds]

    def _item(self, prompt: str, seed: int, task: Task, order: Order, scene: Scene) -> Item:
        notes = {
            "prompt": prompt,
            "task": task.name,
            "size": f"{scene.width}x{scene.height}",
            "frames": scene.frames,
            "fps": scene.fps,
            "seed": seed,
            "options": {**task.options(), **({"window": order.frames} if isinstance(scene, Joined) else {})},
            "inputs": {file.key: {"path": file.path, "blake2b": file.digest} for file in scene.inputs},
        }
        return Item(prompt, seed, scene, notes)

    def __call__(self) -> dict[str, Any]:
        """Draw every sample that is not drawn yet; return how many, and where the clips are."""
        with Ranks.joined() as ranks:
            began = time.monotonic()
            mesh = Mesh(ranks.rank, ranks.size, self.sequence)
            check_ranks(mesh.sequence, mesh.size, "the processes of this job")
            self._lengthen(ranks)
            generate = self._load(ranks)
            group = self._group(generate, mesh)
            made_by = {
                "sampler": asdict(self.sampler.fitted(generate.objective)),
                "precision": self.precision,
                "weights": {name: weights.digest(getattr(generate, name))[:16] for name in ("vae", "dit", "text")},
                "versions": {"soratrain": soratrain.__version__, "torch": torch.__version__},
            }
            items = {
                self._place(item.notes | made_by): replace(item, notes=item.notes | made_by) for item in self.items
            }
            missing = ranks.together(lambda: [path for path, item in items.items() if not is_there(path, item.notes)])
            todo = {path: items[path] for path in missing[0]}
            if ranks.first and len(todo) < len(items):
                there = "all" if not todo else f"{len(items) - len(todo)} of the"
                log.info("%s %d samples are in %s already", there, len(items), self.out / "samples")
            if todo:
                batches = ranks.together(lambda: self._batches(generate, todo))[0]
                ranks.together(lambda: self._draw(generate, todo, batches, ranks, mesh, group))
            return {
                "samples": len(items),
                "drawn": len(todo),
                "seconds": round(time.monotonic() - began, 1),
                "files": [str(clip_of(path, item.notes)) for path, item in items.items()],
            }

    def _lengthen(self, ranks: Ranks) -> None:
        """Give the samples longer prompts; the first rank has them made, and all draw the same."""
        if self.expand is None:
            return
        expand, wishes = self.expand, [(item.notes["prompt"], item.scene.frames == 1) for item in self.items]
        found = ranks.together(lambda: expand(wishes, self.out) if ranks.first else {})[0]
        self.items = [item.drawn_from(found.get(wish)) for item, wish in zip(self.items, wishes, strict=True)]

    def _place(self, notes: Mapping[str, Any]) -> Path:
        return self.out / "samples" / f"{name_of(notes)}.json"

    def _load(self, ranks: Ranks) -> Generator:
        """Return the nets, and see that they can draw what is asked for."""
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", ranks.local % torch.cuda.device_count()) if cuda else torch.device("cpu")
        generate = Generator.load(self.vae, self.dit, device=device, precision=self.precision)
        for scene in self.scenes.values():
            scene.check(generate)
        if ranks.first:
            generate.check_prompts([item.prompt for item in self.items], self.sampler)
            for line in dict.fromkeys(line for scene in self.scenes.values() for line in scene.said if line):
                log.info("%s", line)
        return generate

    def _group(self, generate: Generator, mesh: Mesh) -> Ulysses | None:
        """Let the net share its tokens where processes draw each clip together."""
        if mesh.sequence == 1:
            return None
        group = Ulysses.joined(mesh, LONGEST, "nccl" if generate.device.type == "cuda" else "gloo")
        share(generate.dit, group)
        return group

    def _batches(self, generate: Generator, todo: Mapping[Path, Item]) -> list[list[Path]]:
        """Return what is drawn together: samples of one shape, as many as memory holds.

        Raises:
            ConfigError: one alone is too large.
        """
        groups: dict[tuple[Any, ...], list[Path]] = {}
        for path, item in todo.items():
            groups.setdefault(item.scene.key(), []).append(path)
        free, found = available(generate.device), []
        for paths in groups.values():
            scene = todo[paths[0]].scene
            most = most_at_once(
                generate.dit,
                scene.positions(generate),
                guided=self.sampler.guidance_scale != 1,
                half=generate.half,
                free=free,
                size=(scene.height, scene.width),
                unit=[step * part for step, part in zip(generate.vae.stride[1:], generate.dit.patch[1:], strict=True)],
                sequence=self.sequence,
            )
            step = 1 if isinstance(scene, Joined) else min(self.batch, most)
            found += [paths[start : start + step] for start in range(0, len(paths), step)]
        return found

    def _draw(
        self,
        generate: Generator,
        todo: Mapping[Path, Item],
        batches: Sequence[Sequence[Path]],
        ranks: Ranks,
        mesh: Mesh,
        group: Ulysses | None,
    ) -> None:
        """Draw the batches of this rank, or of its group, whose first writes them."""
        costs = [sum(todo[path].scene.cost(generate) for path in batch) for batch in batches]
        own = deal(costs, mesh.data_ranks)[mesh.data_rank]
        clips = sum(len(batches[number]) for number in own)
        pace = Pace(clips, sum(costs[number] for number in own), mesh.data_ranks)
        write = Writer(writes=mesh.counts, goes_on=group is not None)
        with progress(shown=ranks.first) as bar:
            runs = sum(todo[path].scene.runs for number in own for path in batches[number])
            line = bar.add_task(f"sample (rank 0 of {ranks.size})" if ranks.size > 1 else "sample", total=runs)
            for number in own:
                ranks.check()
                if group is not None and group.any(write.failure is not None, generate.device):
                    break
                batch = {path: todo[path] for path in batches[number]}
                for path, frames in self._drawn(generate, batch, lambda: bar.advance(line)):
                    write(path, frames, todo[path].notes)
                if (said := pace.step(costs[number], len(batches[number]))) and ranks.first:
                    log.info("%s", said)
        if write.failure is not None:
            raise write.failure

    def _drawn(
        self, generate: Generator, batch: Mapping[Path, Item], step: Callable[[], None]
    ) -> Iterator[tuple[Path, Iterable[np.ndarray]]]:
        """Yield the frames of each sample of a batch, some of which are drawn only as they are taken."""
        items = list(batch.values())
        if isinstance(scene := items[0].scene, Joined):  # alone in its batch
            ((path, item),) = batch.items()

            def draw(layout: Layout, name: str) -> Tensor:
                (drawn,) = generate.draw([layout], [item.prompt], [item.draw], self.sampler, name=name)
                step()
                return drawn

            yield path, scene.play(generate, draw)
            return
        made = {item.scene: item.scene.layout(generate) for item in items}
        layouts, strength = [made[item.scene] for item in items], items[0].scene.strength
        prompts, draws = [item.prompt for item in items], [item.draw for item in items]
        drawn = generate.draw(layouts, prompts, draws, self.sampler, strength=strength)
        for (path, item), layout, latent in zip(batch.items(), layouts, drawn, strict=True):
            yield path, item.scene.show(generate, layout, latent)
            step()
