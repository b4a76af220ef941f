"""A report on disk: the page and beside it a folder of its figures, whole or not at all.

report.html
report_files/faithfulness-rd.png, ...
"""

import os
import shutil
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from moescope.analysis.export import written_aside
from moescope.analysis.report_plots import to_png, to_svg
from moescope.tracer.errors import InputError


def check_target(out: str | Path) -> None:
    """Raise InputError unless a report can be written to `out`: ask before the work."""
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"can't write the report {out}: end its name with .html.")
    if not out.absolute().parent.is_dir():
        raise InputError(f"can't write the report {out}: the folder {out.parent} doesn't exist.")
    if out.is_dir():
        raise InputError(f"can't write the report {out}: it is a folder; name a file.")
    folder = out.with_name(f"{out.stem}_files")
    foreign = not folder.is_dir() if folder.exists() else False
    if folder.is_dir():
        foreign = any(file.suffix != ".png" for file in folder.iterdir())
    if foreign:
        raise InputError(
            f"can't put the report's figures into {folder}: something else is there. Name the "
            "report otherwise, or move that away."
        )


class Page:
    """The figures of a page as they come: each as an <svg> and as a PNG file."""

    def __init__(self, stem: str) -> None:
        self.folder = f"{stem}_files"
        self.pngs: dict[str, bytes] = {}

    def figure(self, name: str, figure: Figure, alt: str) -> dict[str, Any]:
        """Keep the PNG; returns what the template's `figure` takes."""
        self.pngs[f"{name}.png"] = to_png(figure)
        svg = Markup(to_svg(figure, name))  # made by us; its texts are escaped
        return {"svg": svg, "alt": alt, "file": f"{name}.png"}


def write_page(out: Path, text: str, page: Page) -> None:
    """The folder of figures and then the page; what was there before stays until both are done."""
    folder = out.with_name(page.folder)
    aside, old = (out.with_name(f".{page.folder}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        try:
            with written_aside(out) as html:
                html.write_text(text, encoding="utf-8")
                aside.mkdir()
                for name, png in page.pngs.items():
                    (aside / name).write_bytes(png)
                if folder.exists():
                    folder.replace(old)
                aside.replace(folder)
        finally:
            if old.exists() and not folder.exists():
                old.replace(folder)
            for left in (aside, old):
                shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise InputError(f"can't write the report {out}: {error.strerror}.") from error
