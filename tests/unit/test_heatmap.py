"""Promises of a validation's table and of its picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from soratrain.callbacks.validation_table import Table
from soratrain.compared import MAGMA
from soratrain.data.assignment import Bucket
from soratrain.heatmap import MOST, chosen, draw, gathered, heading

SMALL, LONG = Bucket(32, 48, 1), Bucket(32, 32, 9)


def table(buckets: list[Bucket], levels: int = 2, names: tuple[str, ...] = ("ema", "raw")) -> Table:
    """A clip's loss is its number, and a tenth more at each further level; of the trained weights 1 more."""
    each = torch.arange(len(buckets), dtype=torch.float64)[:, None] + torch.arange(levels) / 10
    places = torch.tensor([0.5, 0.9])[:levels].expand(len(buckets), levels)
    return Table.of({name: each + number for number, name in enumerate(names)}, buckets, places)


def test_a_cell_is_the_mean_of_its_sizes_clips_and_the_whole_that_of_all_clips() -> None:
    made = table([LONG, SMALL, LONG])
    assert made.sizes == (SMALL, LONG) and made.clips == (1, 2)
    torch.testing.assert_close(made.losses["ema"], torch.tensor([[1.0, 1.1], [1.0, 1.1]]).double())
    assert made.mean("ema") == pytest.approx((0 + 1 + 2) / 3 + 0.05) and made.mean("raw") == made.mean("ema") + 1
    rows = made.rows(7)
    assert len(rows) == 2 * 2 * 2
    assert rows[0] == {
        "step": "7",
        "weights": "ema",
        "level": "0.50000",
        "size": "48x32",
        "frames": "1",
        "loss": "1",
        "clips": "1",
    }
    assert made.words() == "loss 1.05 (ema), 2.05 (raw); from 1 at noise level 0.5 to 1.1 at noise level 0.9"


def test_of_many_sizes_the_frequent_ones_are_shown_and_the_rest_as_their_mean() -> None:
    sizes = [Bucket(16 * (2 + number), 32, 1) for number in range(MOST + 3)]
    made = table([*sizes, *sizes[4:]])
    columns = chosen(made)
    assert len(columns) == MOST and columns[-1] == [0, 1, 2, 3]
    assert sorted(place for column in columns for place in column) == list(range(len(sizes)))
    assert heading(made, columns[-1]) == ("4 others", "", "4 clips")
    assert gathered(made, "ema", columns)[MOST - 1].tolist() == pytest.approx([1.5, 1.6])
    assert chosen(table(sizes[:MOST])) == [[place] for place in range(MOST)]


def test_both_blocks_share_one_scale_from_the_lowest_loss_to_the_highest(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", "a title", table([LONG, SMALL]))
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    for colour in (MAGMA[0], MAGMA[-1]):
        at = np.argwhere((picture == colour.astype(np.uint8)).all(-1))
        assert len(at)
    lowest, highest = ((picture == MAGMA[end].astype(np.uint8)).all(-1).sum(0) for end in (0, -1))
    assert lowest.argmax() < picture.shape[1] / 2 < highest.argmax()  # the averaged weights' block, the trained ones'
