"""The offline report: one page without network that replays a training, drawn from its records."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from sess_lightning.locks import held
from sess_lightning.reporting.paths import write_whole
from sess_lightning.reporting.report import charts
from sess_lightning.reporting.report.content import Content
from sess_lightning.reporting.report.records import RunRecord, outlines, picture, whole

MAX_BYTES = 10_000_000
HEAD = 2_000
"""The page names its training within this many bytes."""


def write_report(
    folder: str | Path, path: str | Path, max_bytes: int = MAX_BYTES, run: str | None = None
) -> Path:
    """Draw the runs recorded in ``folder`` as one page at ``path``.

    The charts show every run. Images, curves and tables are included for as many runs as fit into
    ``max_bytes``, always for the first and the last. An existing page is replaced atomically; one of another
    training moves to ``report-<its name>.html``.

    Args:
        folder: The folder of ``ReportSink``'s records.
        path: Path of the page.
        max_bytes: The page's largest size, bytes.
        run: Name of the training to draw; None is the one that wrote last.

    Raises:
        FileNotFoundError: If there are no records.
        ValueError: If ``max_bytes`` has no room for a single run.
    """
    runs, path = outlines(folder, run), Path(path)
    if not runs:
        raise FileNotFoundError(f"write_report: no records of a validation run in {folder}.")
    content, places = Content([record for record, _ in runs]), [place for _, place in runs]
    every = _first_guess(content, places, folder, max_bytes)
    with held(path):
        make_way(path, runs[-1][0].run)
        while not _fits(path, _page(content, places, folder, every, others(path)), max_bytes):
            if every >= len(runs):
                raise ValueError(f"write_report: not even one run fits; raise max_bytes={max_bytes}.")
            every = every * 5 // 4 + 1
    return path


class _TooLargeError(Exception):
    """A page is larger than allowed."""


def _fits(path: Path, parts: Iterator[str], max_bytes: int) -> bool:
    """Write a page unless it is too large; return whether it was written."""
    try:
        write_whole(path, _limited(parts, max_bytes))
    except _TooLargeError:
        return False
    return True


def _limited(parts: Iterator[str], max_bytes: int) -> Iterator[bytes]:
    size = 0
    for part in parts:
        data = part.encode(errors="replace")  # A file name may not be valid text.
        size += len(data)
        if size > max_bytes:
            raise _TooLargeError
        yield data


def _first_guess(content: Content, places: Sequence[int], folder: str | Path, max_bytes: int) -> int:
    """Return n where every n-th run probably fits, if all are as large as the last."""
    before, last = (whole(folder, place) for place in [*places, *places][-2:])
    new = set(_pictures(last)) - set(_pictures(before))  # The images are the same in every run.
    weight = len(_json(content.run(last, 1.0))) + sum(len(picture(folder, name)) * 4 // 3 for name in new)
    # A tenth is for charts and frame.
    return min(len(places), max(1, -(-len(places) * weight * 10 // (9 * max_bytes))))


def make_way(path: Path, run: str) -> None:
    """Move a page of another training aside, and drop this training's page that was moved aside."""
    theirs = _run_of(path)
    if theirs is not None and theirs != run:
        path.replace(_aside(path, theirs))
    _aside(path, run).unlink(missing_ok=True)


def others(path: Path) -> list[str]:
    """Return the names of the pages of other trainings beside a page."""
    return sorted(page.name for page in path.parent.glob(f"{path.stem}-*{path.suffix}"))


def _aside(path: Path, run: str) -> Path:
    name = re.sub(r"[^\w.]", "_", run)[:8] or "earlier"
    return path.with_name(f"{path.stem}-{name}{path.suffix}")


def _run_of(path: Path) -> str | None:
    """Return the name of a page's training; None if there is no page."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        tag = re.search(rb'<meta name="sess-run" content="([^"]*)">', file.read(HEAD))
    return tag[1].decode(errors="replace") if tag else ""


@cache
def _environment() -> Environment:
    """Return the templates' environment: all text that is not our own markup is escaped."""
    environment = Environment(
        loader=PackageLoader("sess_lightning.reporting.report", "page"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    right, bottom = charts.WIDTH - charts.RIGHT, charts.HEIGHT - charts.BOTTOM
    environment.globals["share_axes"] = charts.share_axes()
    environment.globals["canvas"] = {
        "width": charts.WIDTH, "height": charts.HEIGHT, "left": charts.LEFT, "right": right,
        "top": charts.TOP, "bottom": bottom, "middle": (charts.LEFT + right) // 2,
    }  # fmt: skip
    return environment


def macros() -> Any:
    """Return the templates' macros: ``line_chart(chart, number)`` and ``curve_frame(title, style)``."""
    return _environment().get_template("charts.html").module


def _asset(name: str) -> str:
    """Return the content of a file beside the templates."""
    environment = _environment()
    return environment.loader.get_source(environment, name)[0] if environment.loader else ""


def _page(
    content: Content, places: Sequence[int], folder: str | Path, every: int, beside: Sequence[str]
) -> Iterator[str]:
    """Yield the page part by part: for a long training, the whole would not fit in memory."""
    chosen = sorted({0, *range(len(places) - 1, -1, -every)})
    css, script = _asset("report.css"), _asset("report.js")
    return _environment().get_template("report.html").generate(
        run=content.last.run,
        policy=f"default-src 'none'; img-src data:; style-src {_hash(css)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        css=css,
        script=script,
        title=content.title,
        when=content.when,
        others=beside,
        alerts=content.alerts(),
        tiles=content.tiles(),
        charts=content.charts(),
        partly=f", {len(chosen)} of {len(places)} runs to keep the page small" if every > 1 else "",
        latest=len(chosen) - 1,
        settings=content.settings(),
        data=_data(content, [(places[i], content.places[i]) for i in chosen], folder),
    )  # fmt: skip


def _data(content: Content, runs: Sequence[tuple[int, float]], folder: str | Path) -> Iterator[str]:
    """Yield the data that the page's script shows."""
    names: dict[str, None] = {}
    yield '{"runs":['
    for i, (place, at) in enumerate(runs):
        record = whole(folder, place)
        names |= dict.fromkeys(_pictures(record))
        yield "," * (i > 0) + _json(content.run(record, at))
    yield '],"pictures":{'
    for i, name in enumerate(names):
        yield "," * (i > 0) + f"{_json(name)}:{_json(base64.b64encode(picture(folder, name)).decode())}"
    plot = {"left": charts.LEFT, "width": charts.INNER_WIDTH}
    yield f'}},"styles":{_json(content.styles)},"plot":{_json(plot)}}}'


def _pictures(record: RunRecord) -> list[str]:
    return [name for sample in record.panel for name in sample.pictures.values()]


def _json(value: Any) -> str:
    # No "<" is allowed in a script element: a name could end it.
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
