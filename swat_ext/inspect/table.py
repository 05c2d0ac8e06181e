"""Tables of text for people to read."""

from collections.abc import Sequence

__all__ = ["human_bytes", "human_change", "human_count", "human_share", "human_shares", "render"]


def human_count(value: float | None) -> str:
    """A count in thousands, millions and so on, three digits: ``1.23 G``; ``-`` for None."""
    return _scaled(value, 1000.0, ("", "k", "M", "G", "T", "P", "E"))


def human_bytes(value: float | None) -> str:
    """Bytes in binary units, three digits: ``16.0 MiB``; ``-`` for None."""
    return _scaled(value, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def human_share(value: float | None) -> str:
    """A fraction in percent: ``0.9`` is ``90%``, ``0.955`` is ``95.5%``; ``-`` for None."""
    return "-" if value is None else f"{100 * value:.1f}".removesuffix(".0") + "%"


def human_shares(pair: tuple[float | None, float | None]) -> str:
    """Two fractions in percent: ``90/95.5%``; ``-`` where not known."""
    return "/".join(human_share(share).rstrip("%") for share in pair) + "%" if pair != (None, None) else "-"


def human_change(before: float | None, after: float | None) -> str:
    """How much more ``after`` is, in percent: ``-84.1%``; ``-`` where not known."""
    return "-" if not before or after is None else f"{100 * (after - before) / before:+.1f}%"


def _scaled(value: float | None, base: float, units: Sequence[str]) -> str:
    if value is None:
        return "-"
    for unit in units:
        if abs(value) < 999.5 or unit == units[-1]:
            break
        value /= base
    digits = 0 if unit == units[0] or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {unit}".rstrip()


def render(header: Sequence[str], rows: Sequence[Sequence[str]], align: str, footer: Sequence[str] = ()) -> str:
    """Aligned columns under a header, a rule above and below ``rows``.

    Args:
        header, footer: one cell a column; the footer may be empty.
        rows: as many cells each.
        align: one letter a column, "<" or ">".
    """
    lines = [header, *rows] + ([footer] if footer else [])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(cells, align, widths, strict=True)
        ).rstrip()

    rule = "-" * max(len(line(cells)) for cells in lines)
    text = [line(header), rule, *map(line, rows)]
    if footer:
        text += [rule, line(footer)]
    return "\n".join(text)
