"""What a command that stops says of going on is true of that command: with fresh=true it would start over."""

from __future__ import annotations

from pathlib import Path

import pytest

from soratrain import again, outputs
from soratrain.__main__ import ending
from soratrain.distributed.fit import StoppedError
from soratrain.errors import DataError


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "_fresh", False)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "stopped",
    [
        KeyboardInterrupt(),
        StoppedError("stopped at step 3 of 5; the same command goes on", 2),
        DataError("another process of this job has died; the same command goes on"),
        DataError("no room: see to that. The same command goes on"),
    ],
)
def test_how_to_go_on_is_true_of_the_command_that_was_given(
    fresh: bool, stopped: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        again.began(fresh=fresh)
        raise stopped

    assert ending(work) in (2, 130)
    said = capsys.readouterr().err
    assert "he same command without fresh=true goes on" in said if fresh else "he same command goes on" in said


def test_what_is_kept_in_the_folder_says_the_same_and_says_it_once(tmp_path: Path) -> None:
    again.began(fresh=True)
    outputs.fail(tmp_path, again.told("killed; the same command goes on from the last checkpoint"))
    kept = (tmp_path / "log.txt").read_text()
    assert kept == "error: killed; the same command without fresh=true goes on from the last checkpoint\n"
