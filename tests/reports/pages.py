"""Reports with a bit of everything, for tests of pages; and a reader of pages that is as strict as HTML lets it be."""

from html.parser import HTMLParser

import keras_woodfisher as kw

HOSTILE = 'block"><script>alert(1)</script>&amp;/kernel'
VARIABLES = (kw.VariableReport(HOSTILE, (3, 400), 1200, 300), kw.VariableReport("long/name/kernel", (5,), 5, 5))
HISTORY = (
    kw.EpochReport(0, 0.0, {"loss": 2.5, "val_loss": 2.75, "accuracy": 0.25, "sparsity": 0.0}),
    kw.EpochReport(1, 0.25, {"loss": 1.5, "val_loss": float("nan"), "accuracy": 0.5, "sparsity": 0.25}),
)
PRUNING = kw.PruningReport(
    VARIABLES,
    (kw.PhaseReport("gradients", 1.234, 3 * 2**20), kw.PhaseReport("inverse", 0.5, None)),
    64,
    (f"A note of {HOSTILE}.",),
    (kw.StageReport(0.1, 64, 1e-5, epoch=1.0), kw.StageReport(0.25, 64, 1e-5, epoch=1.5)),
    {"damp": "auto", "mask_type": "<2:4>"},
    kw.BatchNormReport(("bn",), (), 2048, (0.05, 0.06)),
    kw.ReconstructionReport((kw.LayerReport(HOSTILE, 4096, 0.123, 2, 0.5),), 1000, 24, 0.0234, "between"),
    history=HISTORY,
)
SENSITIVITY = kw.SensitivityReport(
    tuple(
        kw.Sensitivity(f"{HOSTILE}_{number}", 100, level, int(100 * level), None, number * level - 0.1)
        for number in range(9)
        for level in (0.5, 0.9)
    ),
    (0.5, 0.9),
    0.3566,
    597,
)

_VOID = {"meta", "br", "line", "circle", "polyline"}
"""Elements that end themselves, in SVG with a slash."""


class Page(HTMLParser):
    """The elements, attributes and texts of a document; an AssertionError where elements don't nest.

    Attributes:
        tags: Every element's name.
        attributes: Every attribute, as (name, value).
        cells: The texts of table cells.
        words: All text, but for styles.
        styles: The style sheets.
    """

    def __init__(self, document):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.cells, self._open = [], [], [], []
        self.words = self.styles = ""
        self.feed(document)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self._open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        assert tag in _VOID

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            self.styles += data
            return
        self.words += data
        if {"td", "th"} & set(self._open):
            self.cells[-1] += data
