"""One self-contained HTML page (light, dark, no scripts, nothing loaded): the only HTML generator here."""

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from facemask.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

Cell = str | int | float | bool | None

# Figures are drawn in stand-in colours that become CSS variables: so they follow the light or dark theme.
INK, MUTED, GRID = "#010203", "#010204", "#010205"
SERIES = ("#020301", "#020302", "#020303", "#020304", "#020305", "#020306")
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {c: f"--series-{i}" for i, c in enumerate(SERIES)}

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "facemask",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def plot(draw: Callable[["Figure"], None], width: float = 7.6, height: float = 3.0) -> str:
    """An inline SVG, the same bytes for the same drawing; ``draw`` fills the empty figure, sizes in inches.

    Use ``INK``, ``MUTED``, ``GRID`` and ``SERIES`` as colours: they follow the page's theme.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    # a style sheet of the user's must not change the page
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text


def standalone(svg: str) -> str:
    """What :func:`plot` made as a file of its own: in the colours of the light theme, on white."""
    template = (Path(__file__).parent / "page.html.j2").read_text(encoding="utf-8")
    for variable, colour in re.findall(r"(--[\w-]+): (#\w+)", template.split("@media")[0]):
        svg = svg.replace(f"var({variable})", colour)
    return svg.replace("<svg ", '<svg style="background: #ffffff" ', 1)


def picture(pixels: np.ndarray, size: int = 144) -> str:
    """A data URI (JPEG) of a picture, uint8 (H, W, 3) or (H, W), its longer side at most ``size`` pixels."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def format_cell(value: Cell) -> str:
    """Text of a cell: None is a dash, floats have four significant digits, integers thousands separators."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return str(value)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table, its first columns to the left, the others to the right."""
    rule = ["---" if place < left else "---:" for place in range(len(columns))]
    return ["| " + " | ".join(row) + " |" for row in (columns, rule, *rows)]


def render(template: str, **facts: Any) -> str:
    """A template of this folder or of the package, filled in; what goes into an HTML page is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    html, here = template.endswith(".html.j2"), Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([here, here.parent]), undefined=StrictUndefined, autoescape=html, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=not html,
    )  # fmt: skip
    return environment.get_template(template).render(**facts)


def _numbers(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Whether all cells of a column are numbers, or missing."""
    width = max((len(row) for row in rows), default=0)
    filled = [[row[c] for row in rows if c < len(row) and row[c] not in ("–", "")] for c in range(width)]
    return [bool(texts) and all(re.match(r"[-+−]?[\d.]", text) for text in texts) for texts in filled]


def text_table(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "", strong: Sequence[int] = ()
) -> "Table":
    """A table for the terminal, as :meth:`Page.table` takes it; columns of numbers are never broken."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [[format_cell(cell) for cell in row] for row in rows]
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_header=bool(columns), caption=caption or None, caption_justify="left"
    )
    right = _numbers(cells) or [False] * len(columns)
    for i, number in enumerate(right):
        heading = columns[i] if i < len(columns) else ""
        table.add_column(heading, justify="right" if number and columns else "left", no_wrap=number, overflow="fold")
    for i, row in enumerate(cells):
        table.add_row(*map(Text, row), style="bold" if i in strong else None)  # brackets are no markup
    return table


def shares(counts: Sequence[int]) -> list[float]:
    """How strongly the cells of a row of counts are tinted: by their share of it."""
    return [0.45 * n / max(1, sum(counts)) for n in counts]


@dataclass
class Page:
    """Sections in the order in which they are added; text is escaped, only :meth:`figure` takes markup."""

    title: str
    lead: str = ""
    blocks: list[dict[str, Any]] = field(default_factory=list)

    def heading(self, text: str, level: int = 2) -> None:
        """Level 2 headings make the table of contents."""
        anchor = f"s{len(self.blocks)}"
        self.blocks.append({"kind": "heading", "text": text, "level": level, "anchor": anchor})

    def text(self, text: str) -> None:
        self.blocks.append({"kind": "text", "text": text})

    def note(self, text: str) -> None:
        """A paragraph that must not be overlooked."""
        self.blocks.append({"kind": "note", "text": text})

    def code(self, text: str, folded: str = "") -> None:
        """Preformatted text; with ``folded``, behind a line that says so."""
        self.blocks.append({"kind": "code", "text": text, "folded": folded})

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        caption: str = "",
        *,
        strong: Sequence[int] = (),
        shade: Sequence[Sequence[float | None]] | None = None,
    ) -> None:
        """A table; columns whose cells are all numbers are set to the right.

        Args:
            columns: headings; none for a table of names and values.
            strong: indices of the rows that are emphasised.
            shade: per cell how strongly its ground is tinted, 0 to 1, None for not at all.
        """
        cells = [[format_cell(cell) for cell in row] for row in rows]
        block = {
            "kind": "table",
            "columns": list(columns),
            "rows": cells,
            "caption": caption,
            "right": [bool(columns) and number for number in _numbers(cells)],
            "strong": set(strong),
            "shade": [[None if s is None else round(100 * s) for s in row] for row in shade or []],
        }
        self.blocks.append(block)

    def confusion(self, counts: Sequence[Sequence[int]], classes: Sequence[str], caption: str) -> None:
        """A table of counts (C, C), rows labels and columns decisions, tinted by their share of the row."""
        rows: list[list[Cell]] = [[name, *row] for name, row in zip(classes, counts, strict=True)]
        shade = [[None, *shares(row)] for row in counts]
        self.table(["label ↓  decided →", *classes], rows, caption, shade=shade)

    def figure(self, svg: str, caption: str = "") -> None:
        """``svg``: trusted markup, as :func:`plot` makes it."""
        from markupsafe import Markup

        # several figures on one page must not share ids
        prefix = f"f{len(self.blocks)}-"
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption or "figure")}" ', 1)
        self.blocks.append({"kind": "figure", "svg": Markup(svg), "caption": caption})

    def pictures(self, items: Sequence[tuple[np.ndarray, str]], size: int = 144) -> None:
        """Thumbnails with captions; pixels as in :func:`picture`."""
        shown = [{"source": picture(pixels, size), "caption": caption} for pixels, caption in items]
        self.blocks.append({"kind": "pictures", "items": shown})

    def render(self) -> str:
        contents = [b for b in self.blocks if b["kind"] == "heading" and b["level"] == 2]
        return render("page.html.j2", title=self.title, lead=self.lead, blocks=self.blocks, contents=contents)

    def write(self, path: Path) -> Path:
        """Write the page, whole or not at all."""
        write_text(path, self.render())
        return path


def show(page: Page, console: "Console", rows: int | None = None) -> None:
    """Print a page's text and tables, of these at most ``rows`` rows."""
    from rich.padding import Padding
    from rich.text import Text

    console.print(Text(f"{page.title}: {page.lead}"), style="bold")
    for block in page.blocks:
        if block["kind"] == "heading":
            console.print(Text(f"\n{block['text']}"), style="bold")
        elif block["kind"] == "note":
            console.print(Padding(Text(f"! {block['text']}"), (0, 0, 0, 2)), style="yellow")
        elif block["kind"] == "text":
            console.print(Padding(Text(block["text"]), (0, 0, 0, 2)))
        elif block["kind"] == "table":
            table = text_table(block["columns"], block["rows"][:rows], strong=block["strong"])
            console.print(Padding(table, (0, 0, 0, 2)))
            if rows is not None and len(block["rows"]) > rows:
                console.print(Padding(f"and {len(block['rows']) - rows} more on the page", (0, 0, 0, 2)))
            if block["caption"]:
                console.print(Padding(Text(block["caption"]), (0, 0, 1, 2)), style="dim")
