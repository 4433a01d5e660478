"""Numbers and tables as the pages of studies, reports and comparisons write them."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any

from scaling4d.provenance import format_number

NOTHING = "-"


def number_format(value: float | int) -> str:
    """Format spec of a number on a page: four decimals, two from 10 on, three digits where it is tiny or huge."""
    if isinstance(value, int):
        return ",d" if value < 1e9 else ".3g"
    if value and not 1e-3 <= abs(value) < 1e6:
        return ".3g"
    return ".4f" if abs(value) < 10 else ".2f"


def deviation_format(deviation: float) -> str:
    """Format spec of a mean and its deviation: two digits of the deviation, four decimals at least."""
    return f".{max(4, 1 - math.floor(math.log10(deviation))) if deviation > 0 else 4}f"


def cell_text(value: Any) -> str:
    """Text of a value in a table; `-` for None."""
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, float | int):
        return str(value)
    return format_number(value, number_format(value))


def csv_cell_text(text: str) -> str:
    """Text of a csv's cell in a table: a number in its usual format, other text as it is."""
    try:
        return cell_text(int(text) if text.isdigit() else float(text)) if math.isfinite(float(text)) else text
    except ValueError:
        return text


def escape(text: str) -> str:
    """Text as HTML; a line end becomes a line break."""
    return html.escape(text).replace("\n", "<br>")


def code_html(text: str) -> str:
    """Text as HTML, with `code` between backticks."""
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(escape(text).split("`")))


def html_figure(path: str, alt: str, caption: str) -> str:
    """A picture that a click opens alone, in a box that scrolls by itself, above its caption."""
    image = f'<a href="{path}"><img alt="{html.escape(alt)}" src="{path}"></a>'
    return f'<figure><div class="scroll">{image}</div><figcaption>{code_html(caption)}</figcaption></figure>'


def page_style() -> str:
    """The style sheet of every page."""
    return resources.files(__package__).joinpath("style.css").read_text()


def html_page(title: str, body: str) -> str:
    """A page of its own, without links to the network. title: text. body: HTML."""
    template = resources.files(__package__).joinpath("page.html").read_text()
    return template.replace("@STYLE@", page_style()).replace("@TITLE@", html.escape(title)).replace("@BODY@", body)


def html_table(head: Sequence[Any], rows: Iterable[Sequence[Any]], cell_html: Callable[[Any], str] = escape) -> str:
    """A table in a box that scrolls by itself. cell_html: gives the HTML of a cell; it is called in reading order."""

    def line(cells: Sequence[Any], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{cell_html(cell)}</{tag}>' for cell in cells)}</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if any(head) else ""
    return f'<div class="scroll"><table>{top}<tbody>{"".join(line(row, "td") for row in rows)}</tbody></table></div>'
