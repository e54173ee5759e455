"""stage=plan: what one clip costs, in tokens and operations."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned_tiny import planned, write_shards
from test_dit import build, clips, texts
from test_dit import run as forward
from torch.utils.flop_counter import FlopCounterMode

from soratrain.stages.plan_cost import forward_flops


def test_a_minute_of_1080p_is_counted_in_tokens_by_hand(tmp_path: Path, capsys) -> None:
    write_shards(tmp_path / "shards")
    clip = planned(tmp_path)["clip"]
    assert clip["tokens"] == 360 * 67 * 120 and clip["bucket"] == "1920x1072x1437"
    assert "a clip of 1920x1072x1437 (of 1920x1080x1440: sides in multiples of 16" in capsys.readouterr().out


def test_shares_and_durations_that_training_would_show_are_planned(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    words = ["stage.job.target=vae", "data.image_fraction=0.9", "data.durations=[1,5]"]
    data = planned(tmp_path, *words)["data"]
    shown = {item["bucket"]: item["shown"] for item in data["buckets"]}
    assert shown == pytest.approx({"64x48x1": 0.9 * 6 / 12, "48x64x1": 0.9 * 6 / 12, "64x48x5": 0.1})
    # of 64x48 all clips have 9 frames, of 48x64 one
    assert data["frames_discarded"] == pytest.approx(1 - (0.9 + 0.1 * 5) / (0.55 * 9 + 0.45))


def test_the_forward_pass_of_a_clip_is_counted_as_it_is_run() -> None:
    net, tokens = build(dim=64, depth=3, mlp_ratio=4.0), 5 * 8 * 8
    with FlopCounterMode(display=False) as counter:
        forward(net, clips([(4, 5, 16, 16)]), *texts(1))
    linear = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    # what is left to text and to the noise level is little
    total, attention = forward_flops(net, [tokens])
    assert total - attention == pytest.approx(linear, rel=0.05) and attention == 4 * 3 * 64 * tokens**2


def test_attention_in_a_pack_is_counted_for_each_clip_alone() -> None:
    net, lengths, words = build(dim=64, depth=3, mlp_ratio=4.0), [320, 64, 16], [3, 1, 5]
    with FlopCounterMode(display=False) as counter:
        forward(net, clips([(4, 5, 16, 16), (4, 1, 16, 16), (4, 1, 8, 8)]), *texts(3))
    counted = counter.get_flop_counts()["Global"]
    total, attention = forward_flops(net, lengths, words)
    assert attention == 4 * 3 * 64 * sum(n * n + n * m for n, m in zip(lengths, words, strict=True))
    linear = sum(count for name, count in counted.items() if "mm" in str(name))
    assert total - attention == pytest.approx(linear, rel=0.05)


@pytest.mark.parametrize("vae", ["hc", "wan22"])
def test_a_vae_of_a_larger_stride_has_fewer_positions(tmp_path: Path, vae: str) -> None:
    write_shards(tmp_path / "shards")
    small, large = (planned(tmp_path, f"vae={name}", "fresh=true") for name in (vae, "wan"))
    assert small["clip"]["tokens"] == 360 * 33 * 60 and large["clip"]["tokens"] == 360 * 67 * 120
    for part, key in (("cache", "latents_gib"), ("clip", "latent_mib")):  # a quarter of the positions, 48 for 16
        assert small[part][key] == pytest.approx(large[part][key] * 3 / 4)
    gib = [found["memory"]["gib"]["activations"] for found in (small, large)]
    assert gib[0] == pytest.approx(gib[1] / 4, rel=0.02)
