from __future__ import annotations

import numpy as np
import pytest
from data_tiny import manifest

from soratrain.data.assignment import Bucket
from soratrain.data.buckets import Native, Stored, Table
from soratrain.data.mixing import assign, lasting, with_images
from soratrain.errors import ConfigError, DataError


def one(bucket: Bucket) -> int:
    return 1


def names(assignment) -> dict[str, int]:
    counts = map(len, assignment.members)
    return {str(bucket): count for bucket, count in zip(assignment.buckets, counts, strict=True)}


def test_native_buckets_are_the_sizes_there_are_rounded_down_to_the_grid():
    found = Native().assign(manifest([(64, 64, 17), (70, 79, 20), (48, 80, 9), (50, 50, 1)]), one)
    assert names(found) == {"64x64x17": 2, "80x48x9": 1, "48x48x1": 1}


def test_no_sample_is_ever_upsampled_or_longer_than_it_is():
    rng = np.random.default_rng(0)
    shapes = np.stack([rng.integers(16, 300, 500), rng.integers(16, 300, 500), rng.integers(1, 80, 500)], 1)
    data = manifest(shapes.tolist())
    for buckets in (Native(), Native(max_size="96x96", max_frames=33), Table(table=["64x64x17", "32x32x1", "80x48x5"])):
        found = buckets.assign(data, one)
        for bucket, members in zip(found.buckets, found.members, strict=True):
            assert (shapes[members] >= np.array(bucket)).all()
        assert sum(map(len, found.members)) + sum(found.dropped.values()) == 500
        if isinstance(buckets, Native) and buckets.area:
            assert max(bucket.height * bucket.width for bucket in found.buckets) <= 96 * 96
        assert all(bucket.height % 16 == bucket.width % 16 == 0 and bucket.frames % 4 == 1 for bucket in found.buckets)


def test_max_size_bounds_the_area_and_keeps_the_aspect_ratio():
    found = Native(max_size="64x64").assign(manifest([(720, 1280, 50), (1280, 720, 50), (900, 900, 50)]), one)
    assert names(found) == {"80x48x49": 1, "64x64x49": 1, "48x80x49": 1}
    near = manifest([(256, 456, 50), (480, 854, 50), (240, 426, 50)])  # a pixel off 16:9 costs no row of the grid
    assert names(Native(max_size="64x64").assign(near, one)) == {"80x48x49": 3}
    flat = Native(max_size="64x64").assign(manifest([(16, 4000, 9)]), one).buckets[0]
    assert flat == Bucket(16, 256, 9)


def test_square_cuts_every_frame_to_its_shorter_side():
    found = Native(square=True).assign(manifest([(64, 112, 17), (112, 64, 17), (48, 50, 1)]), one)
    assert names(found) == {"64x64x17": 2, "48x48x1": 1}
    assert names(Native(square=True, max_size="48x32").assign(manifest([(64, 112, 9)]), one)) == {"32x32x9": 1}


def test_max_fps_takes_an_integer_fraction_of_the_rate():
    found = Native(max_fps=24).assign(manifest([(64, 64, 34)] * 2, fps=60), one)
    assert found.stride.tolist() == [3, 3] and names(found) == {"64x64x9": 2}
    assert Native(max_fps=30).assign(manifest([(64, 64, 34)], fps=30), one).stride.tolist() == [1]


def test_rare_buckets_merge_into_the_nearest_that_fits_and_are_counted():
    shapes = [(64, 64, 17)] * 8 + [(64, 64, 9)] * 8 + [(64, 64, 21)] * 2 + [(64, 96, 17)] * 3 + [(48, 48, 17)] * 8
    found = Native().assign(manifest(shapes), lambda bucket: 16)
    assert names(found) == {"64x64x17": 13, "64x64x9": 8, "48x48x17": 8}
    assert {(str(a), str(b), count) for a, b, count in found.merged} == {
        ("64x64x21", "64x64x17", 2),
        ("96x64x17", "64x64x17", 3),
    }


def test_a_rare_bucket_with_nothing_smaller_stays_and_is_named():
    found = Native().assign(manifest([(64, 64, 17)] * 8 + [(32, 32, 9), (64, 64, 1)]), lambda bucket: 8)
    assert names(found) == {"64x64x17": 8, "32x32x9": 1, "64x64x1": 1}
    assert {str(bucket) for bucket in found.rare} == {"32x32x9", "64x64x1"}


def test_a_bucket_that_fills_a_good_part_of_a_block_keeps_its_own_size():
    found = Native().assign(manifest([(64, 64, 17)] * 9 + [(64, 64, 9)] * 30 + [(64, 64, 13)] * 7), lambda bucket: 32)
    assert names(found) == {"64x64x17": 9, "64x64x9": 37}
    assert [str(bucket) for bucket in found.rare] == ["64x64x17"]


def test_clips_never_become_stills():
    found = Native().assign(manifest([(64, 64, 5)] + [(64, 64, 1)] * 9), lambda bucket: 4)
    assert names(found) == {"64x64x1": 9, "64x64x5": 1}


def test_a_table_takes_the_nearest_aspect_then_the_largest():
    table = Table(table=["64x64x17", "128x64x17", "64x64x33", "32x16x17", "64x64x1"])
    shapes = [(70, 70, 40), (70, 150, 40), (70, 70, 20), (20, 40, 40), (64, 64, 3)]
    found = table.assign(manifest(shapes), one)
    which = {int(m): str(b) for b, members in zip(found.buckets, found.members, strict=True) for m in members}
    assert which == {0: "64x64x33", 1: "128x64x17", 2: "64x64x17", 3: "32x16x17", 4: "64x64x1"}


def test_what_fits_no_bucket_is_counted_by_reason():
    found = Table(table=["64x64x17", "64x64x1"]).assign(
        manifest([(64, 64, 17), (64, 32, 17), (64, 64, 9), (32, 32, 1)]), one
    )
    assert found.dropped == {"clip smaller or shorter than every bucket": 2, "still smaller than every image bucket": 1}
    assert Native().assign(manifest([(64, 64, 17), (12, 64, 17)]), one).dropped == {"smaller than 16 pixels": 1}


@pytest.mark.parametrize(
    "table, message",
    [
        ([], "is empty"),
        (["64x60x17"], "off the grid"),
        (["64x64x16"], "off the grid"),
        (["64x64"], "WIDTHxHEIGHTxFRAMES"),
        (["0x64x17"], "off the grid"),
    ],
)
def test_a_table_off_the_grid_is_refused(table, message):
    with pytest.raises(ConfigError, match=message):
        Table(table=table)


def test_a_table_with_a_bucket_too_rare_for_the_ranks_is_refused_by_name():
    table = Table(table=["64x64x17"])
    with pytest.raises(ConfigError, match="64x64x17 has 3 samples"):
        table.assign(manifest([(64, 64, 17)] * 3), lambda bucket: 8, least=4)
    assert table.assign(manifest([(64, 64, 17)] * 3), lambda bucket: 8, least=2).rare == (Bucket(64, 64, 17),)


def test_data_without_a_usable_sample_are_refused():
    for shapes in ([], [(8, 8, 17)]):
        with pytest.raises(DataError, match="no sample fits"):
            Native().assign(manifest(shapes), one)


def test_a_latent_keeps_its_own_shape_and_one_off_the_grid_is_refused():
    found = Stored().assign(manifest([(64, 64, 17), (48, 80, 9), (64, 64, 17)]), lambda bucket: 2)
    assert names(found) == {"80x48x9": 1, "64x64x17": 2} and [str(b) for b in found.rare] == ["80x48x9"]
    with pytest.raises(DataError, match="off the grid"):
        Stored().assign(manifest([(64, 64, 16)]), one)


def test_durations_show_each_clip_at_every_length_that_it_has():
    found = Native().assign(manifest([(64, 64, 17)] * 6 + [(64, 64, 9)] * 3 + [(64, 64, 1)] * 2), one)
    mixed = lasting(found, [1, 5, 9, 17])
    rates = dict(zip(map(str, mixed.buckets), mixed.rates, strict=True))
    assert names(mixed) == {"64x64x1": 11, "64x64x5": 9, "64x64x9": 9, "64x64x17": 6}
    assert rates == pytest.approx({"64x64x1": 1.5 + 1 + 2, "64x64x5": 2.5, "64x64x9": 2.5, "64x64x17": 1.5})
    assert sum(mixed.rates) == pytest.approx(11)


def test_image_fraction_sets_the_share_of_single_frames():
    found = Native().assign(manifest([(64, 64, 17)] * 9 + [(64, 64, 1)]), one)
    mixed = with_images(found, 0.25)
    rates = dict(zip(map(str, mixed.buckets), mixed.rates, strict=True))
    assert rates == pytest.approx({"64x64x1": 2.5, "64x64x17": 7.5})
    assert [bucket.frames for bucket in with_images(found, 0.0).buckets] == [17]


@pytest.mark.parametrize(
    "durations, fraction, message",
    [
        ([4], None, "1\\+4k"),
        ([5, 33], None, "33, but the longest clips have"),
        (None, 0.5, "no single"),
        (None, 2, "between"),
    ],
)
def test_a_mix_that_the_data_cannot_give_is_refused(durations, fraction, message):
    with pytest.raises(ConfigError, match=message):
        assign(manifest([(64, 64, 17)]), Native(), one, 1, durations=durations, image_fraction=fraction)
