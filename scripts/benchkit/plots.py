"""SVG plots, by pygal. Plain files: no script, nothing fetched from elsewhere when they are looked at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#5b6770", "#1f77b4", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#17a2a2")
Point = tuple[float, float | None]


def _style() -> Any:
    from pygal.style import Style  # noqa: PLC0415 - only those who plot need it

    return Style(
        background="white",
        plot_background="white",
        colors=COLOURS,
        font_family="sans-serif",
        title_font_size=16,
        label_font_size=11,
        major_label_font_size=11,
        legend_font_size=12,
    )


def _options(title: str) -> dict[str, Any]:
    return {
        "title": title,
        "style": _style(),
        "js": [],
        "legend_at_bottom": True,
        "width": 900,
        "height": 420,
        "disable_xml_declaration": False,
        "pretty_print": False,
    }


def _rendered(chart: Any, title: str) -> str:
    """The same text for the same figures: without script, comments (they hold the date) and random identity."""
    chart.uuid = re.sub(r"[^a-z]+", "-", title.lower())
    svg = re.sub(r"<script.*?</script>|<!--.*?-->", "", str(chart.render(is_unicode=True)), flags=re.DOTALL)
    return svg + "\n"


def bars(
    title: str, labels: Sequence[str], series: Mapping[str, Sequence[float | None]], *, logarithmic: bool = False
) -> str:
    """One group of bars for each label."""
    import pygal  # noqa: PLC0415 - as above

    chart = pygal.Bar(**_options(title), logarithmic=logarithmic, value_formatter=lambda value: f"{value:g}")
    chart.x_labels = list(labels)
    for name, values in series.items():
        chart.add(name, [None if value is None else round(value, 2) for value in values])
    return _rendered(chart, title)


def lines(
    title: str, x_title: str, series: Mapping[str, Sequence[Point]], *, logarithmic: bool = False, dots: bool = False
) -> str:
    """Values over time or size."""
    import pygal  # noqa: PLC0415 - as above

    chart = pygal.XY(
        **_options(title),
        x_title=x_title,
        logarithmic=logarithmic,
        show_dots=dots,
        stroke_style={"width": 2},
        x_value_formatter=lambda value: f"{value:g}",
        value_formatter=lambda value: f"{value:g}",
        allow_interruptions=True,
    )
    for name, points in series.items():
        chart.add(name, [(round(x, 3), None if y is None else round(y, 3)) for x, y in points])
    return _rendered(chart, title)
