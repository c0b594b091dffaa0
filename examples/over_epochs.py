"""One validation image throughout a training: ``python examples/over_epochs.py --sample 2``.

Draws from the offline page's records, of the newest run of ``demo.py`` or any other folder: the base's maps
above SESS's, each with its insertion minus deletion and whether its point hits, under the validation
accuracy.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from report import newest
from sess_lightning.reporting.report.records import RunRecord, picture, read

SIDE, GAP, HEAD, LEFT = 150, 6, 24, 92


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="holds report.html; default: the demo's newest")
    parser.add_argument("--sample", type=int, default=1, help="which of the panel's samples, from 1")
    parser.add_argument("--epochs", type=int, nargs="*", help="which to draw; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/over_epochs.png"))
    args = parser.parse_args()
    folder = (args.folder or newest(Path("runs/demo"))) / "records"
    records = [record for record in read(folder) if args.epochs is None or record.epoch in args.epochs]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    page = draw(folder, records, args.sample - 1)
    page.quantize(256, dither=Image.Dither.NONE).save(args.out, optimize=True)
    print(args.out)


def draw(folder: Path, records: list[RunRecord], sample: int) -> Image.Image:
    """Lay out a column per run and a row per method."""
    methods = [name for name in records[0].panel[sample].pictures if name != "image"]
    columns = len(records) + 1
    page = Image.new("RGB", (LEFT + columns * (SIDE + GAP), HEAD + len(methods) * (SIDE + HEAD)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    page.paste(opened(folder, records[0], sample, "image"), (LEFT, HEAD + (SIDE + HEAD) // 2))
    for row, method in enumerate(methods):
        top = HEAD + row * (SIDE + HEAD)
        pen.text((4, top + SIDE // 2 - 8), method, fill="black", font=font)
        for column, record in enumerate(records, 1):
            left = LEFT + column * (SIDE + GAP)
            page.paste(opened(folder, record, sample, method), (left, top))
            pen.text((left, top + SIDE + 2), scores(record, sample, method), fill="black", font=font)
    for column, record in enumerate(records, 1):
        accuracy = next((value for key, value in record.metrics.items() if key == "val/acc"), None)
        text = f"epoch {record.epoch}" + ("" if accuracy is None else f", accuracy {accuracy:.2f}")
        pen.text((LEFT + column * (SIDE + GAP), 4), text, fill="black", font=font)
    return page


def opened(folder: Path, record: RunRecord, sample: int, name: str) -> Image.Image:
    """Return an image with the object's boxes drawn on it."""
    shown = record.panel[sample]
    image = Image.open(io.BytesIO(picture(folder, shown.pictures[name]))).convert("RGB").resize((SIDE, SIDE))
    pen = ImageDraw.Draw(image)
    for x0, y0, x1, y1 in shown.boxes:
        pen.rectangle((x0 * SIDE, y0 * SIDE, x1 * SIDE - 1, y1 * SIDE - 1), outline=(0, 255, 0), width=2)
    return image


def scores(record: RunRecord, sample: int, method: str) -> str:
    """Return overall and hit or miss, from the panel's caption."""
    lines = record.panel[sample].caption.split("\n")
    line = next((line for line in lines if line.startswith(f"{method}:")), "")
    areas = [float(number) for number in re.findall(r"(?:insertion|deletion) (-?[\d.]+)", line)]
    point = next((f", {word}" for word in ("hit", "miss") if line.endswith(word)), "")
    return f"{areas[0] - areas[1]:+.2f}{point}" if len(areas) == 2 else ""


if __name__ == "__main__":
    main()
