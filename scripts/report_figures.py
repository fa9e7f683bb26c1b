"""Take the pictures of a run's report for docs/report.md, with Chromium and without a network.

    python scripts/report_figures.py runs/quickstart docs/figures/report

The page is written anew into a folder that is deleted afterwards. Look at the pictures before you commit them.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Literal

from playwright.sync_api import Page, expect, sync_playwright

from rayrlhf.reports.page import report
from rayrlhf.runs.folder import run_at
from rayrlhf.runs.metrics import read_metrics


def main(address: str, directory: Path) -> None:
    """Write the pictures of the run at `address` into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or sys.exit("report_figures: install Chromium (apt install chromium)")
    run = run_at(address)
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        html = Path(temporary) / "report.html"
        html.write_text(report(run, read_metrics(run.address)), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def look(width: int, height: int, scheme: Literal["light", "dark"] = "light", scale: float = 1.0) -> Page:
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme=scheme,
                device_scale_factor=scale,
                offline=True,
                reduced_motion="reduce",
            )
            page = context.new_page()
            page.goto(html.as_uri())
            expect(page.locator(".sample").first).to_be_visible()
            return page

        page = look(1280, 700)
        page.screenshot(path=directory / "verdict.png")
        page.get_by_role("button", name="Most changed").click()
        page.locator("#samples").scroll_into_view_if_needed()
        page.evaluate("document.getElementById('samples').scrollIntoView()")
        page.screenshot(path=directory / "samples.png")
        page.evaluate("document.getElementById('curves').scrollIntoView()")
        page.locator("figure .u-over").nth(1).hover()
        page.screenshot(path=directory / "curves.png")
        page = look(390, 844, "dark", 1.5)
        page.screenshot(path=directory / "phone.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
