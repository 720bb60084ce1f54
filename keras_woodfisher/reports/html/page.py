"""A report as a fragment for a notebook, or as a page of its own."""

from collections.abc import Sequence

from keras_woodfisher.reports.html.elements import Section, text
from keras_woodfisher.reports.html.style import BODY, STYLE


def fragment(title: str, sections: Sequence[Section]) -> str:
    """What a notebook shows; it brings its own style, which touches nothing else of the notebook."""
    return f"<style>{STYLE}</style>\n{_article(title, sections)}"


def page(parts: Sequence[tuple[str, Sequence[Section]]], made_by: str) -> str:
    """One HTML document of one report after the other.

    Args:
        parts: The title and the sections of each.
        made_by: What the last line says.
    """
    titles = " and ".join(dict.fromkeys(title for title, _ in parts))
    articles = "\n".join(_article(title, sections) for title, sections in parts)
    footer = f'<div class="kw-report"><footer>{text(made_by)}</footer></div>'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(titles)}</title>
<style>{BODY}{STYLE}</style>
</head>
<body>
{articles}
{footer}
</body>
</html>
"""


def _article(title: str, sections: Sequence[Section]) -> str:
    body = "\n".join(
        f"<section><h2>{text(section.title)}</h2>\n{section.body}</section>"
        if section.title
        else f"<section>{section.body}</section>"
        for section in sections
        if section.body
    )
    return f'<article class="kw-report"><h1>{text(title)}</h1>\n{body}</article>'
