"""Tables of agreement, for the terminal and for report.html: raters with each other, and labellers one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rayrlhf.labelling.agreement import PUBLISHED, Agreement, Figures
from rayrlhf.reports.measures import interval_text
from rayrlhf.reports.raters import Compared
from rayrlhf.resampling import Interval

UNKNOWN = "–"


@dataclass(frozen=True)
class Grid:
    """A table whose cells are text."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    """So many columns hold names, the others numbers."""

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for number, head in enumerate(self.heads):
            table.add_column(head, justify="left" if number < self.left else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def html(self) -> str:
        """For the report."""

        def row(cells: Sequence[str], tag: str) -> str:
            tags = [("th" if number < self.left else tag, cell) for number, cell in enumerate(cells)]
            return f"<tr>{''.join(f'<{name}>{escape(cell)}</{name}>' for name, cell in tags)}</tr>"

        rows = "".join(row(cells, "td") for cells in self.rows)
        head = f"<caption>{escape(self.title)}</caption><thead>{row(self.heads, 'th')}</thead>"
        return f"<table>{head}<tbody>{rows}</tbody></table>"


def raters_grid(compared: Sequence[Compared]) -> Grid:
    """One row for every two raters."""
    return Grid(
        "share of pairs ordered alike [95 % interval over prompts], of the pairs that both order; 0.5 is chance",
        ("rater", "other rater", "ordered alike", "pairs", "prompts", "ties"),
        tuple(
            (
                each.one,
                each.other,
                _text(each.alike),
                str(each.pairs),
                str(each.alike.n if each.alike else 0),
                str(each.ties),
            )
            for each in compared
        ),
        left=2,
    )


def labellers_grid(found: Agreement, reliability: Mapping[str, float]) -> Grid:
    """One row for each labeller, and one for all together; columns of figures that nobody has are left out.

    Args:
        found: their figures.
        reliability: by labeller, as `rayrlhf.labelling.aggregate.reliabilities` estimates it.
    """
    share, error = PUBLISHED
    title = (
        f"{found.items} items ranked, {found.shared} of them by several: Kendall's tau-b {_text(found.tau_b)}, "
        f"Krippendorff's alpha {_text(found.alpha)}; labellers of InstructGPT: {share:.3f} ± {error:.3f} with others"
    )
    heads = ("labeller", "ranked", "skip", "flag", "ties", "with others", "with self", "with gold")
    heads = (*heads, "earlier preferred", "s each", "reliable")
    each = (*found.labellers.items(), ("all", found.everyone))
    rows = [_row(name, own, reliability.get(name)) for name, own in each]
    measured = [column for column in range(len(heads)) if any(row[column] != UNKNOWN for row in rows)]
    return Grid(
        title,
        tuple(heads[column] for column in measured),
        tuple(tuple(row[column] for column in measured) for row in rows),
    )


def _row(name: str, own: Figures, reliability: float | None) -> tuple[str, ...]:
    # Two decimals, so that all columns fit into a log's 120 columns.
    shares = (own.with_others, own.with_self, own.with_gold, own.earlier_preferred)
    return (
        name,
        str(own.judged),
        str(own.skipped),
        str(own.flagged),
        UNKNOWN if own.ties is None else f"{own.ties:.2f}",
        *(f"{s.mean:.2f} [{s.low:.2f}, {s.high:.2f}]" if s else UNKNOWN for s in shares),
        UNKNOWN if own.seconds is None else f"{own.seconds:.0f}",
        UNKNOWN if reliability is None else f"{reliability:.2f}",
    )


def _text(value: Interval | None) -> str:
    return interval_text(None if value is None else asdict(value))
