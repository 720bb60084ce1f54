"""Pages in a real browser, which has to be there: `make test-browser` (Debian: apt-get install chromium).

Each page is looked at in frames of several widths, in light and dark, by a script beside it.
"""

import json
import re
import shutil
import subprocess

import pytest
from pages import PRUNING, SENSITIVITY

_ASK = """<body><iframe style="width:{width}px;height:900px" src="report.html"></iframe><pre></pre><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const style = getComputedStyle(page.querySelector(".kw-report"));
  document.querySelector("pre").textContent = "FOUND" + JSON.stringify({{
    wide: root.scrollWidth, seen: root.clientWidth, paper: style.backgroundColor, ink: style.color,
    tables: [...page.querySelectorAll("table")].filter(t => t.parentElement.clientWidth > root.clientWidth).length,
    text: [...page.querySelectorAll("svg")].map(s => 11 * s.getBoundingClientRect().width / s.viewBox.baseVal.width),
  }}) + "END";
}}
</script>"""


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "There is no chromium on this machine. Install it (Debian: apt-get install chromium)."
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_page_fits_its_width_and_can_be_read(browser, width, scheme, tmp_path):
    PRUNING.save(tmp_path / "report.html", SENSITIVITY)
    ask = tmp_path / "ask.html"
    ask.write_text(_ASK.format(width=width), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    flags.append(f"--blink-settings=preferredColorScheme={int(scheme == 'light')}")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [browser, *flags, profile, ask.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(re.search("FOUND(.*?)END</pre>", done.stdout).group(1))
    assert found["wide"] <= found["seen"], "the page itself needn't be scrolled sideways"
    assert found["tables"] == 0
    assert all(9.0 <= size <= 18.0 for size in found["text"])
    light = sum(map(int, re.findall(r"\d+", found["paper"])[:3])) > 3 * 128
    ink = sum(map(int, re.findall(r"\d+", found["ink"])[:3])) > 3 * 128
    assert (light, ink) == (scheme == "light", scheme == "dark")
