"""Where figures go and how they are set: width, resolution, formats and title, in the type of the formulas.

Drawn with matplotlib through its objects: there is no global figure, no backend is chosen for anyone. The same input
gives the same bytes in every format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from crate_dist.files import written_whole

FORMATS = ("png", "pdf", "svg")
TEXT_WIDTH_IN = 6.3
TEXT_HEIGHT_IN = 8.9
STYLE: Any = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "text.parse_math": False,  # names of files and runs may have dollars
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "0.87",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "image.composite_image": False,
    "pdf.fonttype": 42,  # publishers refuse matplotlib's own choice, type 3
    "svg.hashsalt": "crate-dist",
}
_WITHOUT_TIME: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}


@dataclass(frozen=True)
class Sheet:
    """A folder for figures, and the page that they stand on.

    formats: of FORMATS; dpi: of PNG, and of the photos and maps in the others, whose lines and letters have none
    width_in: of the text; no figure is wider, and none higher than TEXT_HEIGHT_IN
    title: above each figure; None: what the figure says of itself; "": none
    """

    out: Path
    formats: Sequence[str] = ("png",)
    dpi: int = 300
    width_in: float = TEXT_WIDTH_IN
    title: str | None = None

    def heading(self, own: str) -> str:
        """Returns the title of a figure that would call itself `own`."""
        return own if self.title is None else self.title

    def save(self, figure: Figure, name: str) -> list[Path]:
        """Writes a figure in every format, each file whole or not at all. Returns their paths."""
        written = []
        for kind in self.formats:
            path = self.out / f"{name}.{kind}"
            with rc_context(STYLE), written_whole(path) as file:
                FigureCanvasAgg(figure).print_figure(file, format=kind, dpi=self.dpi, metadata=_WITHOUT_TIME.get(kind))
            written.append(path)
        return written

    def save_pages(self, pages: Sequence[Figure], name: str) -> list[Path]:
        """Writes a figure that takes several pages: NAME, NAME-page-2, …"""
        names = [name, *(f"{name}-page-{number}" for number in range(2, len(pages) + 1))]
        return [path for figure, each in zip(pages, names, strict=True) for path in self.save(figure, each)]

    def save_numbers(self, arrays: Mapping[str, NDArray[Any]], name: str) -> Path:
        """Writes the numbers of a figure as NAME.npz."""
        with written_whole(self.out / f"{name}.npz") as file:
            np.savez_compressed(file, **dict[str, Any](arrays))
        return self.out / f"{name}.npz"
