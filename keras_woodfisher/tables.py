"""Tables of plain text."""


def aligned(cells: list[tuple[str, ...]], left: int = 2) -> list[str]:
    """Lines of a table, its first `left` columns flush left and the others flush right."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
