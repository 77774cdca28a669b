"""Pictures of results. matplotlib is an extra, asked for before anything is measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.workers.errors import InvalidValueError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
COLORS = ("#4477aa", "#ee6677", "#228833", "#aa3377")
"""Of lines; told apart with any colour vision. After Paul Tol's "bright", as the fills are after his "light"."""
FILLS = (
    *("#77aadd", "#ee8866", "#eedd88", "#44bb99", "#ffaabb", "#bbcc33", "#99ddff", "#cc99bb"),
    *("#aaaa00", "#bbccee", "#cc7788", "#88ccaa", "#ddaa55", "#aa9977", "#dddddd"),
)
"""Of bars, light enough for black text on them."""
BOUND_COLOR = "#222222"


def check_plot(path: Path | None) -> None:
    """
    Raises:
        InvalidValueError: a picture is wanted, and cannot be made or written.
    """
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        fix = "run: pip install 'headwise[plot]'"
        raise InvalidValueError("--plot", str(path), "needs matplotlib, which is not installed", fix)
    if path.suffix not in SUFFIXES:
        raise InvalidValueError("--plot", str(path), f"must end in {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise InvalidValueError("--plot", str(path), f"the folder {path.absolute().parent} is not there")


def new_figure(title: str, subtitle: str, panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many axes, up to three in a row, each with a light grid behind what is drawn."""
    from matplotlib.figure import Figure

    columns = panels if panels <= 3 else 2
    rows = -(-panels // columns)
    figure = Figure(figsize=(1.0 + 4.6 * columns, 1.0 + 3.8 * rows), layout="constrained", dpi=120)
    figure.suptitle(f"{title}\n{subtitle}")
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]
    for one in axes:
        one.grid(True, color="#dddddd", linewidth=0.7)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def stacked_bar(axes: Axes, x: float, parts: dict[str, float], colors: dict[str, str]) -> None:
    """One bar of parts, the first at the bottom; a part that is tall enough carries its value."""
    total, bottom = sum(parts.values()), 0.0
    for name, value in parts.items():
        axes.bar(x, value, 0.7, bottom, color=colors[name])
        if value > 0.04 * total:
            axes.text(x, bottom + value / 2, short(value), ha="center", va="center", fontsize=8)
        bottom += value


def fills_of(names: Iterable[str]) -> dict[str, str]:
    """A fill for each name; they repeat past the fifteenth."""
    return dict(zip(names, cycle(FILLS), strict=False))


def short(value: float) -> str:
    """Three digits, and no exponent for a large number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
