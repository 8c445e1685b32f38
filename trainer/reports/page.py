"""The report as one HTML page that needs nothing else: no script, no font, no address outside itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from trainer.evaluation.intervals import Difference, Interval
from trainer.evaluation.metrics import COLUMNS
from trainer.evaluation.tables import auxiliary_about, headline, reads_teacher
from trainer.evaluation.worth import not_followed
from trainer.reports.attention import Look
from trainer.reports.gallery import Group

TEACHER = ", with the teacher at test time"  # of runs that are no student alone
STYLE = """
:root { --ink: #1d2329; --soft: #5c6670; --line: #e3e7eb; --hit: #16a34a; --miss: #dc2626; --accent: #1f6feb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 0 0 12px; } h3 { font-size: 14px; margin: 18px 0 8px; }
p { margin: 0 0 12px; } section > p:last-child { margin-bottom: 0; } .soft { color: var(--soft); }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px; margin-top: 20px; }
section > img { width: 100%; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
th { font-weight: 600; color: var(--soft); font-size: 13px; }
tr.auxiliary td { color: var(--soft); font-size: 13.5px; } tr.auxiliary td:first-child { padding-left: 28px; }
.range { color: var(--soft); font-size: 12px; font-weight: 400; }
td.best { font-weight: 700; color: var(--accent); }
.example { display: grid; grid-template-columns: 92px 1fr; gap: 16px; padding: 12px 0; }
.example { border-top: 1px solid var(--line); }
.example figure { margin: 0; }
figcaption { font-size: 12px; color: var(--soft); overflow-wrap: anywhere; line-height: 1.3; }
.query { width: 92px; height: 92px; object-fit: cover; border-radius: 6px; display: block; margin-bottom: 4px; }
.row { display: flex; align-items: center; gap: 6px; margin-bottom: 6px; }
.row span { width: 110px; flex: none; font-size: 12.5px; color: var(--soft); overflow-wrap: anywhere; }
.row img { width: 88px; height: 88px; object-fit: cover; border-radius: 6px; border: 3px solid; min-width: 0; }
img.hit { border-color: var(--hit); } img.miss { border-color: var(--miss); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; border: 3px solid; vertical-align: -1px; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--soft); }
pre { font-size: 12.5px; overflow-x: auto; background: #f5f6f8; padding: 12px; border-radius: 6px; }
@media (prefers-color-scheme: dark) { html { color-scheme: light; } }
"""


@dataclass(frozen=True)
class RunView:
    """What the page shows of one run: `scores` as in eval.json, `result` as in result.json, the flat config.

    `intervals` are over classes, by metric; `gain` is of R@1 over the first run's, query by query, None of itself.
    """

    name: str
    result: dict[str, Any]
    scores: dict[str, Any]
    config: dict[str, Any]
    intervals: dict[str, Interval]
    gain: Difference | None


@dataclass(frozen=True)
class Page:
    """Everything on the page; figures and thumbnails are data URIs, `classes` are class names by row."""

    title: str
    subtitle: str
    runs: Sequence[RunView]
    recall_figure: str
    loss_figure: str
    map_figure: str
    looks: Sequence[Look]
    gallery: Sequence[Group]
    images: dict[int, str]
    classes: dict[int, str]


def render_page(page: Page) -> str:
    """Render the whole page as HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(page.title)}</title><style>{STYLE}</style></head><body><main>
<h1>{escape(page.title)}</h1><p class="soft">{escape(page.subtitle)}</p>
<section><h2>Retrieval on classes never seen in training</h2>{_scores_table(page.runs)}{_notes(page.runs)}</section>
<section><h2>Recall</h2><img alt="Recall at 1, 2, 4, 8 of each run" src="{page.recall_figure}"></section>
<section><h2>Training</h2><img alt="Loss curves of each run" src="{page.loss_figure}"></section>
<section><h2>Cost</h2>{_cost_table(page.runs)}</section>
<section><h2>Map of the embeddings</h2>{_MAP}
<img alt="The test images of each run on a plane" src="{page.map_figure}"></section>
{"".join(_look(each) for each in page.looks)}
<section><h2>Retrieval gallery</h2><p class="soft">Each query and its eight nearest other test images, nearest first:
<i class="key" style="border-color: var(--hit)"></i> the query's class,
<i class="key" style="border-color: var(--miss)"></i> another class. Queries are chosen by rule, not by hand.</p>
{"".join(_group(group, page) for group in page.gallery)}</section>
<section><h2>Configuration</h2>{_config_table(page.runs)}</section>
</main></body></html>
"""


def _scores_table(runs: Sequence[RunView]) -> str:
    best = {metric: max(headline(run.scores)[metric] for run in runs) for metric in COLUMNS}
    gains = ["R@1 − the first run's"] if len(runs) > 1 else []
    head = "".join(f"<th>{name}</th>" for name in (*COLUMNS.values(), *gains))
    rows = []
    for run in runs:
        student, teacher = headline(run.scores), reads_teacher(run.scores)
        cells = "".join(
            f"<td{_mark(len(runs) > 1 and student[metric] == best[metric])}>{_percent(student[metric])}"
            f"{_interval(run.intervals[metric])}</td>"
            for metric in COLUMNS
        )
        if gains:
            gain = run.gain
            cells += "<td></td>" if gain is None else f"<td>{100 * gain.value:+.1f}{_interval(gain)}</td>"
        rows.append(f"<tr><td>{escape(run.name + TEACHER * teacher)}</td>{cells}</tr>")
        others = {} if teacher else run.scores["auxiliary"] or {}
        for kind, by_timestep in others.items():
            cells = "".join(f"<td>{_percent(by_timestep['mean'][metric])}</td>" for metric in COLUMNS)
            name = escape(f"teacher as auxiliary at test time ({auxiliary_about(run.scores, kind)})")
            rows.append(f'<tr class="auxiliary"><td>{name}</td>{cells}{"<td></td>" * len(gains)}</tr>')
    return f"<table><thead><tr><th>percent</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cost_table(runs: Sequence[RunView]) -> str:
    """What training took; an older run does not say all of it."""
    titles = ("training", "updates", "images seen", "images/s", "waiting for data", "features read", "memory", "on")
    rows = []
    for run in runs:
        told = run.result
        read = told.get("feature_bytes")
        cells = (
            f"{told['seconds']:,.0f} s",
            f"{told['student_updates']:,}",
            f"{told['images_seen']:,}",
            _told(told, "images_per_second", ",.0f"),
            f"{100 * told['data_wait']:.1f} %" if "data_wait" in told else "–",
            "–" if read is None else f"{read / 1e9:,.2f} GB",
            _told(told, "peak_memory_gb", ".2f", " GB"),
            f"{told.get('processes', 1)} × {told.get('device', '?')}",
        )
        rows.append(f"<tr><td>{escape(run.name)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{title}</th>" for title in titles)
    about = (
        "Waiting is the share of the updates' time in which no batch was there. Features are counted as they are "
        "encoded in the cache; no teacher ran. Memory is the most that was used: of the GPU, or of the process."
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'{table}<p class="soft" style="margin-top: 12px">{about}</p>'


_MAP = (
    '<p class="soft">Every point is a test image. Coloured are the classes that the first run takes most for others. A '
    "plane cannot keep all distances: the share of each image's nearest that are nearest here, too, says how far to "
    "trust it. Sizes of clusters and gaps between them mean nothing.</p>"
)


def _look(look: Look) -> str:
    spread = ", ".join(f"{100 * share:.0f} % at timestep {timestep}" for timestep, share in look.spread.items())
    return (
        f'<section><h2>What {escape(look.run)} looks at</h2><p class="soft">Where the {escape(look.readers)} read the '
        "teacher's tokens, over what the teacher saw: their mean at each timestep, and those that differ most from it. "
        f"One reader reads as if from this share of all places: {spread}; 100 % would be evenly. It shares "
        f"{100 * (1 - look.apart):.0f} % of what it reads with the mean reader. Attention says what is read, not "
        "what the result depends on.</p>"
        f'<img alt="Attention over images" src="{look.figure}"></section>'
    )


def _told(result: dict[str, Any], name: str, form: str, unit: str = "") -> str:
    return f"{result[name]:{form}}{unit}" if name in result else "–"


def _interval(found: Interval | Difference) -> str:
    return f'<br><span class="range">{100 * found.low:.1f} to {100 * found.high:.1f}</span>'


def _notes(runs: Sequence[RunView]) -> str:
    said = "Small: 95 % intervals over classes (bootstrap of whole classes), for gains paired image by image."
    if any(run.scores["auxiliary"] for run in runs):
        said += (
            " The indented rows read the teacher's cached features of the test images, averaged over timesteps; the "
            "students above them see pixels only."
        )
    for run in runs:
        why = not_followed(run.result)
        said += "" if why is None else f" The teacher of {escape(run.name)} was {why}."
    return f'<p class="soft" style="margin-top: 12px">{said}</p>'


def _group(group: Group, page: Page) -> str:
    return f"<h3>{escape(group.title)}</h3>" + "".join(
        f'<div class="example"><figure><img class="query" alt="query" src="{page.images[example.row]}">'
        f"<figcaption>{escape(page.classes[example.row])}</figcaption></figure><div>"
        + "".join(
            f'<div class="row"><span>{escape(name)}</span>'
            + "".join(
                f'<img class="{"hit" if hit.correct else "miss"}" alt="{"hit" if hit.correct else "miss"}" '
                f'title="{escape(page.classes[hit.row], quote=True)}" src="{page.images[hit.row]}">'
                for hit in hits
            )
            + "</div>"
            for name, hits in example.found.items()
        )
        + "</div></div>"
        for example in group.examples
    )


def _config_table(runs: Sequence[RunView]) -> str:
    fields = list(dict.fromkeys(name for run in runs for name in run.config))
    differing = [name for name in fields if len({_setting(run, name) for run in runs}) > 1]
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{escape(_setting(run, name))}</td>" for run in runs) + "</tr>"
        for name in differing
    )
    same = "\n".join(f"{name} = {_setting(runs[0], name)}" for name in fields if name not in differing)
    table = f"<table><thead><tr><th>where the runs differ</th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    shared = "All fields" if len(runs) == 1 else "Fields that all runs share"
    details = f"<details><summary>{shared}</summary><pre>{escape(same)}</pre></details>"
    return (table if differing else "") + details


def _setting(run: RunView, name: str) -> str:
    """A field's value as text; another method may not have the field."""
    return str(run.config.get(name, "–"))


def _mark(best: bool) -> str:
    return ' class="best"' if best else ""


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
