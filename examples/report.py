"""Draw a run's report again from its records, and take a screenshot: ``python examples/report.py``.

The callback itself writes ``sess/report.html`` after every validation run. This script draws it again for the
newest run of ``demo.py``, or any other folder, and with a Chromium takes the README's screenshot.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from sess_lightning.reporting.report.page import write_report

BROWSERS = ("chromium", "google-chrome", "chromium-browser")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="holds report.html; default: the demo's newest")
    parser.add_argument("--picture", type=Path, help="where a picture of the page goes, .png")
    parser.add_argument("--size", type=int, nargs=2, default=(1600, 1960), help="of the picture, px")
    args = parser.parse_args()

    folder = args.folder or newest(Path("runs/demo"))
    page = write_report(folder / "records", folder / "report.html")
    print(f"Report   {page} ({page.stat().st_size / 1e6:.2f} MB)")
    if args.picture:
        screenshot(page, args.picture, args.size)
        print(f"Picture  {args.picture} ({args.picture.stat().st_size / 1e3:.0f} kB)")


def newest(runs: Path) -> Path:
    """The folder of the run that wrote its report last."""
    found = sorted(runs.glob("*/sess/report.html"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"No report below {runs}: run examples/demo.py first, or name a folder.")
    return found[-1].parent


def screenshot(page: Path, picture: Path, size: tuple[int, int]) -> None:
    """Take a screenshot of the page's top in a headless Chromium, in 256 colours."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"--picture needs one of {', '.join(BROWSERS)}.")
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
                   "--disable-background-networking", f"--user-data-dir={profile}",
                   f"--window-size={size[0]},{size[1]}", f"--screenshot={picture.absolute()}"]  # fmt: skip
        subprocess.run([browser, *options, page.absolute().as_uri()], check=True, capture_output=True)
    Image.open(picture).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    main()
