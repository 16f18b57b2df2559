"""The report's page in a browser: nothing overflows on a phone, light and dark differ, and it prints."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.image import imread
from report_helpers import CLIENTS, NORMS, ONE, a_run

from tfprivacy_ft.report import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")

DARK, LIGHT = "--blink-settings=preferredColorScheme=0", "--blink-settings=preferredColorScheme=1"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page on two runs, with long names, several units, a damaged ledger, and gradient norms."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        a_run(folder / f"a_name_that_goes_on_{'and_on_' * 20}", [ONE, CLIENTS, ONE], norms=NORMS),
        a_run(folder / "one", facts={"target_epsilon": 9.0, "comment": "<script>document.title = 'run'</script>" * 9}),
    ]
    return write_report(runs, folder / "page.html")


@pytest.fixture(scope="module", autouse=True)
def a_browser_that_runs(tmp_path_factory):
    """Where not even an empty page can be shown, it is the machine that lacks something."""
    folder = tmp_path_factory.mktemp("browser")
    empty = folder / "empty.html"
    empty.write_text("<!DOCTYPE html><title>empty</title>")
    try:
        browse(folder, empty, "--dump-dom")
        browse(folder, empty, f"--screenshot={folder / 'empty.png'}")
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"chromium does not run here: {error}")


def browse(folder, address, *options):
    """What Chromium prints on a page, in a profile of its own."""
    command = [
        CHROMIUM,
        *"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split(),
        *"--disable-component-update --disable-sync --hide-scrollbars --disable-dev-shm-usage".split(),
        f"--user-data-dir={folder / 'profile'}",
        *options,
        address.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, cwd=folder).stdout


def screenshot(page, folder, *options):
    file = folder / "shot.png"
    browse(folder, page, f"--screenshot={file}", "--window-size=900,1200", *options)
    return imread(file)[..., :3]


def test_light_and_dark_are_both_legible(page, tmp_path):
    light, dark = (screenshot(page, tmp_path, scheme) for scheme in (LIGHT, DARK))
    for shot in (light, dark):
        assert np.ptp(shot.min(axis=-1)) > 0.7  # not blank: ink and paper are far apart
        assert len(np.unique((shot * 255).astype(int) @ [1, 256, 65536])) > 50  # colours
    assert light.mean() > 0.8 and dark.mean() < 0.3
    assert np.median(light) - np.median(dark) > 0.7


# Holds the page in a frame as wide as a phone. The page runs no scripts; this one looks at it from outside.
MEASURE = """<!DOCTYPE html><meta charset="utf-8"><iframe style="width: 390px; height: 800px; border: 0"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const inside = frame.contentDocument, root = inside.documentElement;
  const wide = () => [...inside.body.querySelectorAll("*")].filter(
    one => one.getBoundingClientRect().right > 390.5 && !one.closest(".scroll, svg")).map(one => one.outerHTML.slice(0, 99));
  const found = {closed: [root.scrollWidth, wide()]};
  inside.querySelectorAll("details").forEach(one => { one.open = true; });
  found.open = [root.scrollWidth, wide()];
  found.title = inside.title;
  found.details = inside.querySelectorAll("details").length;
  document.body.dataset.found = encodeURIComponent(JSON.stringify(found));
});
frame.srcdoc = PAGE;
</script>"""


def test_nothing_overflows_on_a_phone(page, tmp_path):
    html = page.read_text(encoding="utf-8")
    around = tmp_path / "around.html"
    around.write_text(MEASURE.replace("PAGE", json.dumps(html).replace("</", "<\\/")), encoding="utf-8")
    dom = browse(tmp_path, around, "--dump-dom", "--window-size=900,1200")
    found = json.loads(re.sub(r"%(..)", lambda code: chr(int(code[1], 16)), re.search(r'data-found="([^"]*)', dom)[1]))
    assert found["closed"] == [390, []] and found["open"] == [390, []]
    assert found["details"] > 5 and found["title"].startswith("Privacy report: ")


def test_it_prints(page, tmp_path):
    browse(tmp_path, page, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", DARK)
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-") and len(pdf) > 20_000
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 20
