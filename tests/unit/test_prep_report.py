"""Promises of report.html: one small file that stands alone and tells what was kept, what was not, and why."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from prep_clips import moving, picture, write

from data_prep.__main__ import main
from data_prep.charts import bars, funnel
from data_prep.output import read_lines

ODD = '<b>&"quoted" 三只猫 🙂.mp4'


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    videos = folder / "videos"
    videos.mkdir()
    write(videos / "pan.mp4", [np.roll(picture(seed=1), 3 * step, axis=1) for step in range(12)])
    write(videos / "slide.mp4", [picture(seed=2)] * 12)
    write(folder / "clip.mp4", moving(10))
    shutil.move(folder / "clip.mp4", videos / ODD)
    (videos / f"broken {ODD}").write_bytes(b"nothing")
    assert main([f"input={videos}", f"output={folder / 'built'}"]) == 0
    assert main(["task=select", f"input={folder / 'built'}", f"output={folder / 'selected'}"]) == 0
    return folder


class Page(HTMLParser):
    """What a page holds: its tags, the addresses it names, and the text below each id."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.figures: dict[str, int] = {}
        self.text: dict[str, str] = {}
        self._at = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self._at = value or ""
            if name in ("src", "href"):
                self.addresses.append(value or "")
        if tag == "img":
            self.figures[self._at] = self.figures.get(self._at, 0) + 1

    def handle_data(self, data: str) -> None:
        self.text[self._at] = self.text.get(self._at, "") + " " + data


def test_the_page_tells_the_funnel_and_shows_what_was_kept(built: Path) -> None:
    page = Page(built / "built" / "report.html")
    assert "4 files in, 3 out" in page.text["funnel"] and "3 clips in, 3 out" in page.text["funnel"]
    assert "1 dropped: not a video or image that FFmpeg can read" in page.text["funnel"]
    assert page.figures == {"kept": 3}
    assert f"broken {ODD}" in page.text["dropped"] and "no picture" in page.text["dropped"]
    for name in ("size in pixels", "aspect ratio", "duration in seconds", "motion", "static"):
        assert name in page.text["charts"]


def test_a_selection_shows_pictures_of_what_it_dropped_with_the_reason(built: Path) -> None:
    page = Page(built / "selected" / "report.html")
    assert page.figures == {"kept": 2, "dropped": 1}
    assert "select.max_static=0.9: 1" in page.text["dropped"]
    shown = (built / "selected" / "report.html").read_text(encoding="utf-8")
    assert f"<h1>selected</h1><p class=origin>from {html.escape(str(built / 'built'))}</p>" in shown


def test_the_page_stands_alone_is_small_and_names_are_text(built: Path) -> None:
    path = built / "built" / "report.html"
    page = Page(path)
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags) and path.stat().st_size < 300_000
    assert "url(" not in path.read_text(encoding="utf-8")


def test_the_page_is_the_same_each_time(built: Path) -> None:
    path = built / "selected" / "report.html"
    before = path.read_bytes()
    path.unlink()
    assert main(["task=report", f"input={built / 'selected'}"]) == 0
    assert path.read_bytes() == before


def test_a_folder_that_is_not_finished_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task=report", f"input={tmp_path}"]) == 2
    assert "no folder that data_prep has finished" in capsys.readouterr().err


def test_names_with_what_unicode_calls_the_end_of_a_line_are_one_name(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    write(tmp_path / "clip.mp4", moving(5)).rename(videos / "good\u2028\x85.mp4")
    (videos / "bad\u2028\x85.mp4").touch()
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"videos/{name}\u2028\x85.mp4\n" for name in ("good", "bad")), encoding="utf-8")
    for number, place in enumerate((videos, listed)):
        assert main([f"input={place}", f"output={tmp_path / str(number)}"]) == 0
        (failure,) = read_lines(tmp_path / str(number) / "failures.jsonl")
        assert failure["uri"].endswith("bad\u2028\x85.mp4") and "empty" in failure["reason"]
    (videos / "good\u2028\x85.txt").write_text("a caption")
    assert main([f"input={videos}", f"output={tmp_path / '0'}", "fresh=true"]) == 0  # the captions alone are new


def test_charts_are_to_scale_and_say_what_they_leave_out() -> None:
    chart = bars("sizes", [("a", 4), ("b", 1)], 7)
    assert re.findall(r"width:([\d.]+)%", chart) == ["100.0", "25.0"] and "2 others" in chart
    dropped = {f"reason {number}": number for number in range(1, 13)}
    step = {"step": "probe", "unit": "files", "in": 80, "out": 2, "how": {}, "dropped": dropped}
    shown = funnel([step])
    assert "width:2.5%" in shown and "10 dropped: other reasons" in shown and shown.count("<li>") == 9


@pytest.mark.full
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_page_without_overflow(built: Path, tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser is installed (Debian: apt-get install chromium)")
    probe = "<script>document.title=[document.documentElement.scrollWidth,innerWidth,"
    probe += "[...document.images].filter(i=>i.complete&&i.naturalWidth>0).length].join(' ')</script></body>"
    text = (built / "selected" / "report.html").read_text(encoding="utf-8").replace(' loading="lazy"', "")
    (tmp_path / "page.html").write_text(text.replace("</body>", probe), encoding="utf-8")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    words += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", f"file://{tmp_path}/page.html"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
    assert found, done.stdout[:500] + done.stderr[-500:]
    page, window, images = map(int, found.groups())
    assert page <= window and images == 3
