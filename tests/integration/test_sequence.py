"""A DiT whose tokens ranks share computes what one process does: outputs, and the mean of the ranks' gradients."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from soratrain.callbacks.compiled import compile_blocks
from soratrain.diffusion.segments import Segment, flatten
from soratrain.distributed.mesh import Mesh
from soratrain.distributed.sequence import Ulysses, share
from soratrain.models.attention import Packing
from soratrain.models.dit import DiT

SHAPES = {  # latents (t, h, w) of the clips of a pack; tokens are t · h/2 · w/2
    "mixed": [(1, 4, 4), (5, 4, 6), (1, 6, 4), (3, 4, 4)],  # 4 + 30 + 6 + 12 tokens: no multiple of 3, nor of 8
    "equal": [(2, 4, 4)] * 3,
    "short": [(1, 2, 2)],  # one token: the other ranks have nothing but padding
    "short among long": [(1, 2, 2), (4, 4, 6), (1, 2, 2)],
}


def pack(shapes: list[tuple[int, int, int]], rows: bool, spoil: int | None = None) -> Any:
    """Return a pack of noise; with `rows` every latent frame has a level of its own, `spoil` is a clip of NaN."""
    random = torch.Generator().manual_seed(3)
    samples = []
    for number, (t, h, w) in enumerate(shapes):
        latent = torch.randn(4, t, h, w, generator=random)
        levels = torch.rand(t, generator=random)
        if number == spoil:
            latent.fill_(float("nan"))
        sigma = levels.repeat_interleave(h * w // 4) if rows else levels[0]
        samples.append([Segment(latent, sigma, 8.0)])
    return flatten(samples, (1, 2, 2))


def built(heads: int, **options: Any) -> DiT:
    """Return a small DiT with all of its weights at random, none at zero."""
    torch.manual_seed(1)
    net = DiT(channels=4, dim=6 * heads, depth=2, num_heads=heads, text_dim=8, **options)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def computed(net: DiT, flat: Any, half: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the prediction for a pack, and the gradients of a loss of it, those of the texts among them."""
    random = torch.Generator().manual_seed(4)
    texts = Packing(tuple(1 + number % 3 for number in range(len(flat.tokens.packing))))
    text = torch.randn(texts.total, 8, generator=random).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        out = net(flat.tokens, text, texts)
    loss = (out.float() * torch.randn(out.shape, generator=random)).nan_to_num().sum()
    gradients = torch.autograd.grad(loss, [text, *net.parameters()])
    return out.detach(), dict(zip(["text", *dict(net.named_parameters())], gradients, strict=True))


def compare(
    shapes: list[tuple[int, int, int]],
    heads: int = 4,
    rows: bool = False,
    half: bool = False,
    compiled: bool = False,
    **options: Any,
) -> dict[str, float]:
    """Return how far outputs and gradients of shared packs are from those of whole ones, as a share of the largest."""
    rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=size)
    net, flat = built(heads, **options), pack(shapes, rows)
    out, gradients = computed(net, flat, half)
    share(net, Ulysses.joined(Mesh(rank, size, size)))
    if compiled:
        compile_blocks(net)
    ours, own = computed(net, flat, half)
    found = {"out": float((ours - out).abs().max() / out.abs().max())}
    for name, expected in gradients.items():
        dist.all_reduce(own[name])
        found[name] = float((own[name] / size - expected).abs().max() / expected.abs().max())
    dist.destroy_process_group()
    return found


def check(ranks: int, bound: float, timeout: float = 120, **settings: Any) -> None:
    for found in run_ranks(compare, ranks, timeout, **settings):
        worst = max(found, key=lambda name: found[name])
        assert found[worst] <= bound, f"{worst} is {found[worst]:.2g} off"


@pytest.mark.parametrize("rows", [False, True], ids=["a level a clip", "a level a frame"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_two_ranks_compute_what_one_does(shapes: list[tuple[int, int, int]], rows: bool) -> None:
    check(2, 1e-5, shapes=shapes, rows=rows)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_more_ranks_compute_what_one_does(shapes: list[tuple[int, int, int]], ranks: int) -> None:
    check(ranks, 1e-5, shapes=shapes, heads=12, rows=True)


@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "full"},
        {"recompute": "selective"},
        {"qk_norm_full": True, "rope_time": "index"},
        {"pooled_text": True, "cross_norm": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_it_goes_with_every_option_of_the_net(options: dict[str, Any]) -> None:
    check(2, 1e-5, shapes=SHAPES["mixed"], **options)


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_in_bf16_it_is_within_rounding(recompute: str) -> None:
    check(2, 0.03, shapes=SHAPES["mixed"], half=True, recompute=recompute)


@pytest.mark.full  # the compiler takes its time
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_it_goes_with_compiled_blocks(recompute: str) -> None:
    check(2, 1e-4, timeout=500, shapes=SHAPES["mixed"], compiled=True, recompute=recompute)


def isolated(shapes: list[tuple[int, int, int]], spoil: int) -> list[bool]:
    """Return of each clip whether its prediction is the same when clip `spoil` is NaN."""
    rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=size)
    net = built(4)
    share(net, Ulysses.joined(Mesh(rank, size, size)))
    whole, spoilt = (computed(net, pack(shapes, False, spoil=clip), False)[0] for clip in (None, spoil))
    lengths = [t * h * w // 4 for t, h, w in shapes]
    dist.destroy_process_group()
    return [torch.equal(*parts) for parts in zip(whole.split(lengths), spoilt.split(lengths), strict=True)]


@pytest.mark.parametrize("spoil", [1, 3])
def test_nan_in_one_clip_leaves_the_others_untouched(spoil: int) -> None:
    expected = [clip != spoil for clip in range(4)]
    assert run_ranks(isolated, 2, shapes=SHAPES["mixed"], spoil=spoil) == [expected] * 2


def counted(shapes: list[tuple[int, int, int]]) -> list[tuple[int, ...]]:
    """Return the shapes of what is exchanged in a step, in order."""
    rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=size)
    net, calls = built(4), []
    share(net, Ulysses.joined(Mesh(rank, size, size)))
    real = dist.all_to_all_single

    def counting(out: Tensor, *rest: Any, **named: Any) -> Any:
        calls.append(tuple(out.shape))
        return real(out, *rest, **named)

    dist.all_to_all_single = counting
    computed(net, pack(shapes, False), False)
    dist.destroy_process_group()
    return calls


def test_an_attention_takes_one_exchange_each_way_forwards_and_backwards() -> None:
    for calls in run_ranks(counted, 2, shapes=SHAPES["mixed"]):
        there, back = (2, 26, 3, 2, 6), (2, 26, 2, 6)  # ranks, tokens of one, q k v, heads of one, head dim
        assert calls == [there, back] * 2 + [back, there] * 2
