"""Promises of clips that several processes encode together."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from test_encode import FACTORY

from data_prep.encode import Encoding, encode_rgb
from soratrain.data.assignment import Bucket
from soratrain.data.decode import load_clip
from soratrain.models.vae import VAE
from soratrain.stages.encoding import DTYPES, ClipEncoder
from soratrain.stages.encoding_parts import WORTH, Part, divide, joined, sides_of
from soratrain.stages.encoding_rounds import Encoded, Round, rounds

CPU, TAILS = torch.device("cpu"), [1, 5, 9]
CASES = {"time": (Bucket(16, 16, 97), 2), "width": (Bucket(32, 256, 5), 4), "all": (Bucket(160, 128, 129), 8)}


@pytest.fixture(scope="module")
def vae() -> VAE:
    torch.manual_seed(0)
    vae = FACTORY().eval()
    for parameter in vae.parameters():  # blocks begin as the identity
        parameter.data.normal_(std=0.2)
    return vae


def encoder(pixels: int = 1 << 22) -> ClipEncoder:
    return ClipEncoder(tail_frames=TAILS, dtype="fp16", pixels_per_batch=pixels, autocast=False)


def pixels_of(part: Part, video: np.ndarray) -> np.ndarray:
    frames, rows, columns = part.pixels
    return video[frames, rows, columns]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pixels", [1 << 22, 1 << 16], ids=["at_once", "in_pieces"])
def test_parts_make_the_latents_of_the_whole(name: str, pixels: int, vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DTYPES, "fp16", torch.float32)  # before rounding
    bucket, ranks = CASES[name]
    parts = divide(vae, bucket, ranks, TAILS)
    assert 2 <= len(parts) <= ranks
    video = np.random.default_rng(0).integers(0, 256, (bucket.frames, bucket.height, bucket.width, 3), dtype=np.uint8)
    (whole,) = encoder()(vae, [video], CPU)
    made = joined(parts, [encoder(pixels)(vae, [pixels_of(part, video)], CPU, part)[0] for part in parts])
    assert made.keys() == whole.keys() == {"latent", *(f"tail{tail}" for tail in TAILS if tail <= bucket.frames)}
    for key, latent in whole.items():
        torch.testing.assert_close(made[key], latent, rtol=1e-5, atol=1e-5)


def test_less_around_a_part_than_it_reads_would_not_do(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DTYPES, "fp16", torch.float32)
    bucket, ranks = CASES["width"]
    parts = divide(vae, bucket, ranks, TAILS)
    around = sides_of(vae, bucket)[2].before
    narrow = [
        replace(part, width=replace(part.width, low=min(part.width.start, part.width.low + around // 2 + 1)))
        for part in parts
    ]
    video = np.random.default_rng(0).integers(0, 256, (bucket.frames, bucket.height, bucket.width, 3), dtype=np.uint8)
    found = [
        joined(cut, [encoder()(vae, [pixels_of(part, video)], CPU, part)[0] for part in cut])["latent"]
        for cut in (parts, narrow)
    ]
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_every_position_is_one_part_s_and_the_largest_part_is_worth_it(ranks: int, vae: VAE) -> None:
    divided = 0
    for frames, height, width in product((1, 45, 241), (64, 480), (64, 832)):
        bucket = Bucket(height, width, frames)
        sides = sides_of(vae, bucket)
        count = np.zeros([side.count for side in sides], dtype=int)
        for part in (parts := divide(vae, bucket, ranks, TAILS)):
            count[part.time.own, part.height.own, part.width.own] += 1
            assert pixels_of(part, np.empty(tuple(bucket)[2:] + tuple(bucket)[:2], dtype=bool)).size > 0
            read = [span.high - span.low for span in (part.time, part.height, part.width)]
            assert np.prod(read) <= WORTH * count.size + 3 * count[0].size  # the last also holds its tails' frames
        divided += bool(parts)
        assert len(parts) <= ranks and (count == bool(parts)).all()
    assert divided >= 4
    assert divide(vae, Bucket(32, 32, 1), ranks, TAILS) == []  # too small


def test_rounds_keep_the_order_and_give_each_process_a_batch_or_a_part(vae: VAE) -> None:
    parts = divide(vae, *CASES["width"], TAILS)
    batches = [((Bucket(16, 16, 1), np.array([number])), parts if number in (3, 4) else []) for number in range(8)]
    found = list(rounds(batches, 2))
    numbers = [[int(members[0]) for _, members in each.batches] for each in found]
    assert numbers == [[0, 1], [2], [3], [4], [5, 6], [7]]
    assert [bool(each.parts) for each in found] == [False, False, True, True, False, False]
    assert [item and (int(item[0][1][0]), item[1]) for item in map(found[1].of, range(2))] == [(2, None), None]
    assert [item and (int(item[0][1][0]), item[1]) for item in map(found[2].of, range(4))] == [(3, p) for p in parts]
    made = found[0].whole([[Encoded(0, ["a"])], [Encoded(1, ["b"])]])
    assert [clip.captions for _, clips in made for clip in clips] == [["a"], ["b"]]


def test_a_clip_that_one_process_cannot_decode_is_left_out_by_all(vae: VAE) -> None:
    bucket, ranks = CASES["width"]
    parts = divide(vae, bucket, ranks, TAILS)
    shapes = [(1, 2, part.height.stop - part.height.start, part.width.stop - part.width.start) for part in parts]
    made = [[Encoded(7, ["a"], {"latent": torch.ones(shape)}), Encoded(8, [])] for shape in shapes]
    made[1][1] = Encoded(8, [], failure="it is gone")
    ((of, (whole, lost)),) = Round([(bucket, np.array([7, 8]))], parts).whole([*made, None])
    assert of == bucket and whole.latents["latent"].shape == (1, 2, 4, 32) and not whole.failure
    assert lost.failure == "it is gone" and not lost.latents


@pytest.mark.parametrize(("stride", "start"), [(1, 40), (2, 4)])
def test_a_part_of_a_clip_is_decoded_alone(stride: int, start: int) -> None:
    low = np.random.default_rng(0).integers(0, 256, (60, 6, 8, 3), dtype=np.uint8)
    media = encode_rgb(low.repeat(8, 1).repeat(8, 2), Fraction(8), Encoding())[0]
    clip = {"fps": Fraction(8), "frames": 60, "bucket": Bucket(32, 48, 57 if stride == 1 else 29), "stride": stride}
    within = (slice(start, start + 9), slice(8, 24), slice(16, 48))
    assert np.array_equal(load_clip(media, **clip, within=within), load_clip(media, **clip)[within])
