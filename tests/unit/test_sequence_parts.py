"""Which tokens of a pack are whose where ranks share them, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from soratrain.compose import compose
from soratrain.diffusion.segments import Segment, flatten
from soratrain.distributed import sequence
from soratrain.distributed.mesh import Mesh, check_heads, check_ranks
from soratrain.distributed.sequence import Part, Ulysses, share
from soratrain.errors import ConfigError
from soratrain.models.attention import Packing
from soratrain.models.dit import DiT
from soratrain.models.tokens import Tokens
from soratrain.outputs import matters
from soratrain.rules import validate
from soratrain.stages.plan_scale import DiTWork


def pack(*lengths: int, rows: bool = False) -> Tokens:
    """Return a pack whose values number its tokens from 1 on; with `rows`, every token of a clip by turns of two."""
    packing = Packing(lengths)
    owner = packing.owner()
    count = torch.arange(1.0, packing.total + 1)
    return Tokens(
        values=count[:, None],
        coords=count[:, None].expand(-1, 3),
        flags=torch.ones(packing.total, dtype=torch.int64),
        packing=packing,
        sigma=torch.rand(2 * len(lengths) if rows else len(lengths)),
        row_clips=torch.arange(len(lengths)).repeat_interleave(2 if rows else 1),
        rows=2 * owner + torch.arange(packing.total) % 2 if rows else None,
    )


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("lengths", [(6, 6), (7, 1, 5), (1,), (2, 1), (40,), (3, 3, 3, 3, 3)])
def test_parts_are_equally_long_and_together_the_pack_with_less_padding_than_ranks(
    lengths: tuple[int, ...], size: int, rows: bool
) -> None:
    tokens = pack(*lengths, rows=rows)
    texts = Packing(tuple(range(2, 2 + len(lengths))))
    text = texts.owner().float()[:, None]  # each text's features are its clip's number
    condition = torch.stack((tokens.row_clips.float(), torch.arange(len(tokens.sigma)).float()), dim=1)
    parts = [Ulysses(None, place, size).part_of(tokens, text, texts, condition) for place in range(size)]
    each = -(-tokens.packing.total // size)
    assert all(part.packing.total == len(part.values) == each for part, *_ in parts)
    assert each * size - tokens.packing.total < size
    values = torch.cat([part.values for part, *_ in parts])
    owner, total = tokens.packing.owner(), tokens.packing.total
    assert torch.equal(values[:total], tokens.values) and not values[total:].any()
    for place, (part, own_text, own_texts, own_condition) in enumerate(parts):
        assert isinstance(part.packing, Part) and part.packing.whole is tokens.packing
        here = torch.arange(place * each, (place + 1) * each).clamp(max=total - 1)  # padding is the last clip's
        clips = torch.arange(len(lengths))[owner[here].unique()]
        assert torch.equal(clips[part.packing.owner()], owner[here])
        assert len(own_texts) == len(clips) and own_texts.total == len(own_text)
        assert torch.equal(own_text[:, 0], clips[own_texts.owner()].float())
        spread = part.packing.owner() if part.rows is None else part.rows
        assert torch.equal(own_condition[spread, 0], owner[here].float())
        if rows:
            assert torch.equal(own_condition[spread, 1], tokens.rows[here].float())


def test_ranks_of_a_group_follow_each_other_and_have_the_same_micro_batches() -> None:
    strategy = SimpleNamespace(sequence=2)
    meshes = [Mesh.of(SimpleNamespace(global_rank=rank, world_size=6, strategy=strategy)) for rank in range(6)]
    assert [mesh.data_rank for mesh in meshes] == [0, 0, 1, 1, 2, 2] and meshes[0].data_ranks == 3
    assert [mesh.place for mesh in meshes] == [0, 1, 0, 1, 0, 1]
    assert [mesh.counts for mesh in meshes] == [True, False] * 3


def test_heads_that_cannot_be_dealt_out_are_refused_with_what_divides_them() -> None:
    said = "parallel.sequence=4: the 6 heads of .* cannot be dealt out evenly over so many ranks; use one of 1, 2, 3, 6"
    with pytest.raises(ConfigError, match=said):
        check_heads(4, 6, "dit.num_heads")
    with pytest.raises(ConfigError, match=said):
        share(DiT(channels=4, dim=36, depth=1, num_heads=6, text_dim=8), Ulysses(None, 0, 4))


@pytest.mark.parametrize("sequence", [3, 8, 0])
def test_ranks_that_make_no_whole_groups_are_refused_with_what_divides_them(sequence: int) -> None:
    with pytest.raises(ConfigError, match=rf"parallel.sequence={sequence}: 4 ranks \(here\) .* use one of 1, 2, 4"):
        check_ranks(sequence, 4, "here")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("stage=dit parallel.sequence=5 strategy=ddp dit.num_heads=6 dit.dim=384", "the 6 heads of dit.num_heads"),
        ("stage=dit parallel.sequence=2", "parallel.sequence=2 with strategy=single: tokens are shared by several"),
        ("stage=dit parallel.sequence=0", "parallel.sequence=0: must be a whole number of at least 1"),
        ("stage=dit parallel.sequence=1.5", "parallel.sequence=1.5: must be a whole number of at least 1"),
        ("stage=dit parallel.sequnce=2", "did you mean 'sequence'"),
        ("stage=vae parallel.sequence=2 strategy=ddp", "and not in stage=vae; leave it out"),
        ("stage=plan target=vae parallel.sequence=2", "and not in stage=plan target=vae; leave it out"),
        ("stage=recaption parallel.sequence=2", "and not in stage=recaption; leave it out"),
        ("stage=encode parallel.sequence=2 vae=wan", "parallel.sequence=2 with vae=wan: its pictures cannot be cut up"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(words: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(compose(words.split())[0])
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_run_may_go_on_with_its_tokens_shared_otherwise() -> None:
    config = compose(["stage=dit", "strategy=ddp", "parallel.sequence=2", "dit.num_heads=4"])[0]
    validate(config)
    assert config["trainer"]["sequence"] == 2 and not matters("trainer.sequence") and not matters("parallel.sequence")
    config = compose(["stage=encode", "strategy=ddp", "parallel.sequence=4"])[0]
    validate(config)
    assert config["stage"]["job"]["sequence"] == 4 and not matters("stage.job.sequence")


@pytest.mark.parametrize(("recompute", "times"), [("none", 2), ("selective", 3), ("full", 3)])
def test_what_is_computed_again_is_exchanged_again_and_the_plan_counts_it(
    recompute: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []

    def alone(x: torch.Tensor, group: object) -> torch.Tensor:
        moved.append(x.numel())
        return x.clone()

    monkeypatch.setattr(sequence, "_all_to_all", alone)
    monkeypatch.setattr(sequence.dist, "all_gather", lambda parts, x, group: parts[0].copy_(x))
    net = DiT(channels=4, dim=12, depth=2, num_heads=2, text_dim=8, recompute=recompute)
    share(net, Ulysses(None, 0, 1))
    latent = Segment(torch.randn(4, 1, 4, 8), torch.tensor(0.5), 8.0)
    tokens = flatten([[latent]], net.patch).tokens
    net(tokens, torch.randn(2, 8), Packing.of([2])).sum().backward()
    assert sum(moved) == times * 4 * 8 * 12 * 2 and len(moved) == times * 2 * 2  # two in each of two blocks
    told = DiTWork(net, (4, 8, 8), half=False, sequence=2).exchanged(8)
    assert told == sum(moved) * 4 / 2 / 2  # fp32; of two ranks each has half of the tokens, and hands on half of that
