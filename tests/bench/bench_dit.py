"""The DiT beside diffusers' WanTransformer3DModel of the same shape: tokens a second and memory in training.

Both go forwards and backwards over the same latents and texts, each as it is fastest on that set: the peer's
projections fused or apart, and on equal shapes the blocks of either compiled or not. `equal`: clips of one shape in one
batch. `mixed`: every pair of four durations and four sizes, from one image of 256x256 to 33 frames of 640x384; ours
takes them in packs of no more tokens than the largest clip has, the peer one by one or padded to the largest (of whose
equal clips `PADDED` are timed, and counted for all). Tokens are those of the clips, not of the padding. Memory is that
of the nets as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from bench_vae import seconds
from bench_vae_memory import begin, memory_of
from torch import Tensor, nn

from soratrain.diffusion.segments import Segment, flatten
from soratrain.models.attention import Packing
from soratrain.models.dit import DiT

DIM, DEPTH, HEADS, RATIO, CHANNELS, TEXT = 384, 2, 3, 4, 16, 512
TITLE = (
    f"DiTs on a CPU, fp32, two threads, forwards and backwards: {DEPTH} blocks of width {DIM}, {HEADS} heads of"
    f" {DIM // HEADS}, MLP x{RATIO}; memory is what is added by the largest step"
)
ROUNDS = 5
EQUAL = {"equal, short": [(1, 32, 32)] * 32, "equal, long": [(5, 32, 48)] * 4}  # 256x256 and 17 frames of 384x256
MIXED = [(t, h, w) for t in (1, 3, 5, 9) for h, w in ((32, 32), (32, 48), (48, 32), (48, 80))]
SETS = {**EQUAL, "mixed": MIXED}
WORDS = 64  # tokens of a text in `equal`; those of `mixed` have from a quarter as many to this
PADDED = 2
OURS, BATCH, ONE, PAD = "ours", "diffusers", "diffusers, one by one", "diffusers, padded"
Shape = tuple[int, int, int]
Clips = list[tuple[Tensor, Tensor]]  # latents and their texts
Train = Callable[[Any, Clips], None]


def ours() -> DiT:
    """Return our net."""
    torch.manual_seed(0)
    return DiT(channels=CHANNELS, dim=DIM, depth=DEPTH, num_heads=HEADS, text_dim=TEXT, mlp_ratio=RATIO)


def theirs(fused: bool = True) -> Any:
    """Return the peer's net, its projections in one matrix or not. Raises ImportError where it is not installed."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    net = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=DIM // HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT,
        ffn_dim=RATIO * DIM,
        num_layers=DEPTH,
    )
    for block in net.blocks if fused else ():
        block.attn1.fuse_projections()
        block.attn2.fuse_projections()
    return net


def compiled(net: Any) -> Any:
    """Return a net with its blocks compiled for the shapes that they meet first."""
    for block in net.blocks:
        block.compile()
    return net


def tokens(shape: Shape) -> int:
    """Return the tokens of a latent."""
    return shape[0] * shape[1] * shape[2] // 4


def words(shapes: list[Shape]) -> list[int]:
    """Return the tokens of each clip's text."""
    return [WORDS] * len(shapes) if len(set(shapes)) == 1 else [WORDS // 4 * (1 + i % 4) for i in range(len(shapes))]


def clips(shapes: list[Shape]) -> Clips:
    """Return each clip's latent and text."""
    generator = torch.Generator().manual_seed(0)
    pairs = zip(shapes, words(shapes), strict=True)
    return [
        (torch.randn((CHANNELS, *shape), generator=generator), torch.randn((count, TEXT), generator=generator))
        for shape, count in pairs
    ]


def packs(given: Clips) -> Iterator[Clips]:
    """Yield clips in packs of at most as many tokens as the largest has; equal ones all at once."""
    sizes = [latent[0].numel() // 4 for latent, _ in given]
    most = sum(sizes) if len(set(sizes)) == 1 else max(sizes)
    left = sorted(range(len(given)), key=sizes.__getitem__, reverse=True)
    while left:
        room, pack = most, []
        for index in list(left):
            if sizes[index] <= room:
                room -= sizes[index]
                pack.append(index)
                left.remove(index)
        yield [given[index] for index in pack]


def train_ours(net: DiT, given: Clips) -> None:
    """Go forwards and backwards over all clips."""
    net.zero_grad()
    for pack in packs(given):
        flat = flatten([[Segment(latent, torch.tensor(0.5), 24.0)] for latent, _ in pack], net.patch)
        text = Packing.of([len(one) for _, one in pack])
        net(flat.tokens, torch.cat([one for _, one in pack]), text).square().mean().backward()


def train_theirs(net: nn.Module, given: Clips) -> None:
    """Go forwards and backwards over clips of one shape, in one batch."""
    latents, texts = (torch.stack(parts) for parts in zip(*given, strict=True))
    sigma = torch.full((len(given),), 500.0)
    net(latents, sigma, texts, return_dict=False)[0].square().mean().backward()


def train_one_by_one(net: nn.Module, given: Clips) -> None:
    """Go forwards and backwards over each clip alone."""
    net.zero_grad()
    for clip in given:
        train_theirs(net, [clip])


def train_equal(net: nn.Module, given: Clips) -> None:
    """Go forwards and backwards over clips of one shape."""
    net.zero_grad()
    train_theirs(net, given)


def largest(count: int) -> Clips:
    """Return equal clips of the largest shape, with the longest text."""
    return clips([max(MIXED, key=tokens)] * count)


def fastest(train: Train, nets: dict[str, Any], given: Clips) -> str:
    """Return the name of the net that is fastest on `given`."""
    found = {}
    for name, net in nets.items():
        train(net, given)
        found[min(seconds(partial(train, net, given)) for _ in range(2))] = name
    return found[min(found)]


Timed = dict[str, tuple[Callable[[], object], float, str]]  # what is timed, how many make the whole set, a note


def timed() -> dict[str, Timed]:
    """Return what is timed, by set and net."""
    sets, runs = {kind: clips(shapes) for kind, shapes in SETS.items()}, {}
    said = {kind: f"{len(shapes)} clips, {sum(map(tokens, shapes)):,} tokens in all" for kind, shapes in SETS.items()}
    for kind in EQUAL:
        mine = {"eager": ours(), "compiled": compiled(ours())}
        form = fastest(train_ours, mine, sets[kind])
        runs[kind] = {OURS: (partial(train_ours, mine[form], sets[kind]), 1, f"{said[kind]}; {form}")}
    runs["mixed"] = {OURS: (partial(train_ours, ours(), sets["mixed"]), 1, f"{said['mixed']}; eager")}
    try:
        eager = {"eager": theirs(False), "eager, fused": theirs()}
    except ImportError:
        return runs
    for kind in EQUAL:
        peers = {**eager, "compiled": compiled(theirs(False)), "compiled, fused": compiled(theirs())}
        form = fastest(train_equal, peers, sets[kind])
        runs[kind][BATCH] = partial(train_equal, peers[form], sets[kind]), 1, form
    form = fastest(train_one_by_one, eager, sets["mixed"])
    runs["mixed"][ONE] = partial(train_one_by_one, eager[form], sets["mixed"]), 1, form
    note = f"{len(MIXED) * max(map(tokens, MIXED)):,} tokens with the padding; {form}"
    runs["mixed"][PAD] = partial(train_equal, eager[form], largest(PADDED)), len(MIXED) / PADDED, note
    return runs


def figures(values: list[float], digits: int) -> str:
    """Return the median (least to most)."""
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def speed() -> list[dict[str, str]]:
    """Return tokens a second, measured in turn."""
    rows = []
    for kind, runs in timed().items():
        count = sum(map(tokens, SETS[kind]))
        took: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, (run, times, _) in runs.items():
                took[name].append(seconds(run) * times)
        for name, spent in took.items():
            row = {"clips": kind, "net": name, "tokens/s": figures([count / one for one in spent], 0)}
            row["note"] = runs[name][2]
            if name != OURS:
                row["ours / this"] = figures([b / a for a, b in zip(took[OURS], spent, strict=True)], 2)
            rows.append(row)
        if len(took) == 1:
            rows.append({"clips": kind, "net": BATCH, "note": "diffusers is not installed"})
    return rows


def measured(name: str, shapes: list[Shape]) -> None:
    """Do once what adds to memory: gradients are there before."""
    net: Any = ours() if name == OURS else theirs()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    given = clips(shapes)
    begin()
    if name == OURS:
        net.zero_grad = lambda: None
        train_ours(net, given)
    else:
        train_theirs(net, given)


def memory() -> dict[tuple[str, str], str]:
    """Return the MiB that a step adds, by set and net."""
    top = max(MIXED, key=tokens)
    work = {(kind, name): shapes for kind, shapes in EQUAL.items() for name in (OURS, BATCH)}
    work |= {("mixed", OURS): MIXED, ("mixed", ONE): [top], ("mixed", PAD): [top] * PADDED}
    found = {}
    for (kind, name), shapes in work.items():
        found[kind, name] = f"{memory_of(measured, name, shapes)[0]:,.0f} MiB"
    found["mixed", PAD] += f" for {PADDED} clips"
    return found


def measure() -> list[dict[str, str]]:
    """Return the table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows, held = speed(), {}
        if any(row["net"] == ONE for row in rows):
            held = memory()
    finally:
        torch.set_num_threads(threads)
    columns = ("clips", "net", "tokens/s", "ours / this", "memory", "note")
    for row in rows:
        row["memory"] = held.get((row["clips"], row["net"]), "")
    return [{name: row.get(name, "") for name in columns} for row in rows]
