"""Pictures of the documents: plots have the figures of the recorded results, and say of when and of which host."""

from __future__ import annotations

import html
import re

import pytest

from bench.recorded import Recorded, recorded
from tests.docs.blocks import PAGES, ROOT

FIGURES = ROOT / "docs/figures"


@pytest.mark.parametrize("one", recorded(), ids=lambda one: one.report.name)
def test_plot_has_the_figures_of_the_recorded_results(one: Recorded) -> None:
    picture = (FIGURES / f"{one.report.name}.svg").read_text()
    texts = [html.unescape(text) for text in re.findall(r"<text [^>]*>([^<]*)</text>", picture)]
    for series in one.report.series:
        assert texts.count(series.name) == 1, series.name
        assert f"{series.median:.2f} {series.unit}" in texts, series.name
    assert {one.caption, one.report.title, "Isolator", "others", "5th to 95th percentile"} <= set(texts)


def test_every_picture_is_shown_and_small() -> None:
    pages = "".join(page.read_text() for page in [*PAGES, ROOT / "bench/README.md"])
    pictures = sorted(FIGURES.iterdir())
    others = {"demo.svg", "console-overview.png", "console-story.png"}
    assert {picture.name for picture in pictures} == {f"{one.report.name}.svg" for one in recorded()} | others
    for picture in pictures:
        assert f"figures/{picture.name})" in pages, picture.name
        assert picture.stat().st_size < 128 << 10, picture.name
