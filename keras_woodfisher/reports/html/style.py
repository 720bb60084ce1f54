"""How reports look: light or dark as the reader's system is, and from telephones to wide screens."""

COLORS = ("#2563eb", "#d97706", "#059669", "#c026d3", "#dc2626", "#64748b")
"""Of curves, on light paper; each has a lighter one in the dark."""

_DARK = ("#7aa2ff", "#fbbf24", "#34d399", "#e879f9", "#f87171", "#a3b1c6")


def _palette(colors: tuple[str, ...]) -> str:
    return "".join(f"--c{number}:{color};" for number, color in enumerate(colors))


STYLE = f"""
.kw-report{{--paper:#fff;--ink:#1c2430;--faint:#5b6675;--line:#dce1e8;--soft:#f4f6f9;{_palette(COLORS)}
background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
max-width:1180px;margin:0 auto;padding:16px;box-sizing:border-box;text-align:left;overflow-wrap:anywhere}}
@media (prefers-color-scheme:dark){{.kw-report{{--paper:#14181f;--ink:#e6eaf0;--faint:#9aa7b8;--line:#2f3846;
--soft:#1d232d;{_palette(_DARK)}}}}}
.kw-report h1{{font-size:1.55em;line-height:1.2;margin:.2em 0 .1em;color:inherit}}
.kw-report h2{{font-size:1.1em;margin:1.8em 0 .5em;padding-bottom:.25em;border-bottom:1px solid var(--line);
color:inherit}}
.kw-report p{{margin:.4em 0;color:var(--faint)}}
.kw-report ul{{margin:.4em 0;padding-left:1.3em}}
.kw-report .kw-tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(135px,1fr));gap:10px;margin:14px 0}}
.kw-report .kw-tiles div{{background:var(--soft);border-radius:8px;padding:9px 13px}}
.kw-report .kw-tiles span{{display:block;color:var(--faint);font-size:.85em}}
.kw-report .kw-tiles strong{{font-size:1.25em;font-variant-numeric:tabular-nums}}
.kw-report .kw-scroll{{overflow-x:auto;max-height:70vh;border:1px solid var(--line);border-radius:8px}}
.kw-report table{{border-collapse:collapse;width:100%;margin:0;font-size:.9em;font-variant-numeric:tabular-nums;
color:inherit;background:none}}
.kw-report th,.kw-report td{{padding:5px 11px;text-align:right;white-space:nowrap;border:0;
border-bottom:1px solid var(--line);background:none;color:inherit}}
.kw-report tbody tr:last-child td{{border-bottom:0}}
.kw-report th{{position:sticky;top:0;z-index:1;background:var(--soft);font-weight:600;color:var(--faint)}}
.kw-report th.kw-left,.kw-report td.kw-left{{text-align:left}}
.kw-report .kw-total td{{font-weight:600;border-top:2px solid var(--line)}}
.kw-report .kw-share{{min-width:9em}}
.kw-report .kw-share>span:last-child{{display:inline-block;min-width:3.7em}}
.kw-report .kw-bar{{display:inline-block;vertical-align:middle;width:4.5em;height:.6em;background:var(--line);
border-radius:3px;overflow:hidden;text-align:left;margin-right:.6em}}
.kw-report .kw-bar span{{display:block;height:100%;background:var(--c0)}}
.kw-report .kw-heat{{background:color-mix(in srgb,var(--c1) var(--shade),transparent)}}
.kw-report dl{{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:2px 24px;margin:.4em 0}}
.kw-report dl div{{display:flex;justify-content:space-between;gap:12px;border-bottom:1px dotted var(--line)}}
.kw-report dt{{color:var(--faint);font-weight:400}}
.kw-report dd{{margin:0;text-align:right;font-family:ui-monospace,Consolas,monospace;font-size:.92em}}
.kw-report .kw-charts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:16px;
margin-bottom:14px}}
.kw-report figure{{margin:0;max-width:560px}}
.kw-report figcaption{{font-size:.88em;color:var(--faint)}}
.kw-report figcaption span{{margin-right:1.1em;display:inline-block}}
.kw-report figcaption i{{display:inline-block;width:1.1em;height:.28em;border-radius:2px;vertical-align:middle;
margin-right:.4em}}
.kw-report svg{{display:block;width:100%;height:auto}}
.kw-report svg text{{fill:var(--faint);font-size:11px}}
.kw-report svg .kw-grid{{stroke:var(--line);stroke-width:1}}
.kw-report svg .kw-curve{{fill:none;stroke-width:2;stroke-linejoin:round}}
.kw-report footer{{margin-top:2.2em;color:var(--faint);font-size:.85em}}
@media print{{.kw-report .kw-scroll{{max-height:none;overflow:visible}}}}
"""

BODY = "body{margin:0;background:#fff}@media (prefers-color-scheme:dark){body{background:#14181f}}"
"""Of a page of its own."""
