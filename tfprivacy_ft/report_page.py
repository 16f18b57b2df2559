"""The report as one HTML page: prose and tables from a template, figures as SVG in the page itself.

Promises: the page loads nothing and runs no script, and says so to the browser (Content-Security-Policy); whatever comes
from a ledger or a path is escaped by the template, and no such text reaches a figure. Colours are variables of the page, so
that figures follow light, dark and print. Computes no epsilon.
"""

import dataclasses
import datetime
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tfprivacy_ft import ledger, statement
from tfprivacy_ft.accounting import Account
from tfprivacy_ft.events import Event
from tfprivacy_ft.report import GENERATOR, Line, Run, RunsReport

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

__all__ = ["render"]

_MARKERS = {"example": "o", "user": "^", "client": "s"}
_DASHES = (None, (5, 2), (1.5, 1.5), (7, 2, 1.5, 2))
_COLOURS = 8  # variables --series-0 ... of the page

# What figures are drawn in, to be replaced by variables of the page.
_INK, _FAINT, _LIMIT = "#0a0001", "#0a0002", "#0a0003"


@dataclasses.dataclass(frozen=True)
class _Series:
    """One line of a figure, and its entry in the legend.

    Args:
      label: in the legend.
      x, y: finite numbers; what is infinite cannot be drawn, and stands in the table.
      unit: who its epsilon protects; chooses the marker.
      index: chooses colour and dashes.
      ends: whether the last of the numbers is where the run ended, and is marked.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    unit: str
    index: int
    ends: bool = True

    @property
    def colour(self) -> str:
        return f"--series-{self.index % _COLOURS}"

    @property
    def dashes(self) -> tuple[float, ...] | None:
        return _DASHES[self.index % len(_DASHES)]


@dataclasses.dataclass(frozen=True)
class _Plot:
    """A figure with everything around it.

    Args:
      title: of what it shows.
      svg: the figure; None where there is nothing to draw.
      series: its legend.
      head, rows: the same numbers as a table.
      remarks: sentences below it.
      limit: what the dashed line is, if there is one.
    """

    title: str
    svg: "Markup | None"
    series: tuple[_Series, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...] = ()
    limit: str | None = None


def render(report: RunsReport) -> str:
    """The page, a whole HTML document.

    Args:
      report: what `tfprivacy_ft.report.gather` returned.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tfprivacy_ft"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": statement.figure, "moment": _time, "number": _number, "protects": _protects}
    environment.filters |= {"last_look": _last_look}
    return environment.get_template("report.html.j2").render(
        report=report,
        generator=GENERATOR,
        statement=statement,
        infinity=math.inf,
        no_figure=_NO_FIGURE,
        account_rows=_ACCOUNT_ROWS,
        run_rows=_RUN_ROWS,
        epsilon_plots=[(run, _epsilon_plot(run, f"epsilon-{i}")) for i, run in enumerate(report.intact) if run.lines],
        accuracy=_accuracy_plot(report.intact),
        norms=[(run, _norm_plots(run, f"norms-{i}")) for i, run in enumerate(report.intact) if _norms(run)],
        key=_key,
    )


# Words.


def _time(text: str | None) -> str:
    """A ledger's time to the second; as it is where it is none."""
    try:
        return datetime.datetime.fromisoformat(str(text)).strftime("%Y-%m-%d %H:%M:%S UTC")
    except ValueError:
        return str(text)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def _protects(line: Line | Account) -> str:
    return f"one {line.unit}, {line.relation.replace('_', ' ')}"


def _last_look(run: Run) -> str:
    """The run's last figure, and when it was looked at, if more was released since."""
    text = f"{run.figure}: {_number(run.last_figures[str(run.figure)])}"
    for line in run.lines:
        seen = [point for point in line.points if point.figure is not None]
        if seen and line.points[-1].figure is None:
            return f"{text}, after {seen[-1].releases:,} of {line.points[-1].releases:,} {_releases([line])}"
    return text


_NO_FIGURE = (
    "No run here recorded a held-out figure: give model.fit validation_data= beside plan.callbacks(), or call "
    'plan.record_figures({"accuracy": ...}) after it.'
)

# What the table of runs says of an account or a run, one line of a cell each.
_ACCOUNT_ROWS: tuple[tuple[str, Callable[[Account], list[str]]], ...] = (
    ("unit", lambda account: [account.unit]),
    ("relation", lambda account: [account.relation.replace("_", " ")]),
    ("delta", lambda account: [f"{account.delta:g}"]),
    ("epsilon by PLD", lambda account: [_bound(account.epsilon_pld)]),
    ("epsilon by RDP", lambda account: [_bound(account.epsilon_rdp)]),
    ("without amplification", lambda account: [_bound(account.epsilon_without_amplification)]),
    ("sampler", lambda account: [event.sampler for event in account.events]),
    ("q or cohort", lambda account: [statement.sampling_rate(event) for event in account.events]),
    ("steps or rounds", lambda account: [f"{event.count:,}" for event in account.events]),
    ("mechanism", lambda account: [event.mechanism for event in account.events]),
    ("noise multiplier", lambda account: [f"{event.noise_multiplier:g}" for event in account.events]),
    ("clip", lambda account: [_clip(event) for event in account.events]),
)
_RUN_ROWS: tuple[tuple[str, Callable[[Run], list[str]]], ...] = (
    ("target epsilon", lambda run: [_number(run.target_epsilon)] if run.target_epsilon else []),
    ("last figures", lambda run: [f"{name}: {_number(value)}" for name, value in run.last_figures.items()]),
    ("started", lambda run: [_time(run.contents.started)] if run.contents.started else []),
    ("last record", lambda run: [_time(run.contents.written)] if run.contents.written else []),
    ("software", lambda run: [f"{name} {version}" for name, version in run.contents.software.items()]),
)


def _bound(epsilon: float | None) -> str:
    return "no bound is known" if epsilon is None else statement.figure(epsilon)


def _clip(event: Event) -> str:
    return "not one number" if event.l2_norm_clip is None else f"{event.l2_norm_clip:g}"


def _releases(lines: Iterable[Line]) -> str:
    words = dict.fromkeys("rounds" if line.unit == "client" else "steps" for line in lines)
    return " or ".join(words)


# Figures.


def _epsilon_plot(run: Run, name: str) -> _Plot:
    series, rows, is_infinite = [], [], False
    for i, line in enumerate(run.lines):
        drawn = [point for point in line.points if math.isfinite(point.epsilon)]
        ends = len(drawn) == len(line.points)
        is_infinite |= not ends
        if not any(point.releases for point in drawn):
            drawn = []  # the origin alone would look like an epsilon of 0
        xs, ys = tuple(float(point.releases) for point in drawn), tuple(point.epsilon for point in drawn)
        series.append(_Series(_protects(line), xs, ys, line.unit, i, ends))
        rows += [
            (f"{point.releases:,}", statement.figure(point.epsilon), _protects(line), _time(point.time))
            for point in line.points
        ]
    releases = _releases(run.lines)
    remarks = [statement.SIDE_BY_SIDE] if len(run.lines) > 1 else []
    if is_infinite:
        remarks.append("Where epsilon is infinite there is nothing to draw: something was released without noise.")
    title = f"Epsilon over {releases}"
    return _Plot(
        title=title,
        svg=_lines_svg(series, name, title, x=releases, y="epsilon", limit=run.target_epsilon, from_zero=True),
        series=tuple(series) if len(series) > 1 else (),
        head=(releases, "epsilon", "protects", "time"),
        rows=tuple(rows),
        remarks=tuple(remarks),
        limit=None if run.target_epsilon is None else f"target, {statement.figure(run.target_epsilon)}",
    )


def _accuracy_plot(runs: Sequence[Run]) -> _Plot | None:
    """The figure of every run against its epsilon; None where no run has any."""
    series: list[_Series] = []
    rows, shown = [], []
    for run in runs:
        for line in run.lines:
            seen = [point for point in line.points if point.figure is not None]
            if not seen:
                continue
            shown.append((run, line))
            drawn = [(point.epsilon, point.figure) for point in seen if math.isfinite(point.epsilon)]
            xs, ys = zip(*drawn, strict=True) if drawn else ((), ())
            last = seen[-1]
            label = (
                f"{run.name}: {run.figure} {_number(last.figure)} at epsilon {statement.figure(last.epsilon)}, delta "
                f"{run.report.delta:g} for {_protects(line)}"
            )
            series.append(_Series(label, xs, ys, line.unit, len(series), math.isfinite(last.epsilon)))
            rows += [
                (run.name, statement.figure(point.epsilon), _number(point.figure), str(run.figure), _protects(line))
                for point in seen
            ]
    if not shown:
        return None
    what = "accuracy" if all("accuracy" in str(run.figure) for run, _ in shown) else "held-out figure"
    title = f"{what.capitalize()} against epsilon"
    return _Plot(
        title=title,
        svg=_lines_svg(series, "accuracy", title, x="epsilon", y=what),
        series=tuple(series),
        head=("run", "epsilon", "figure", "its name", "protects"),
        rows=tuple(rows),
        remarks=tuple(_caveats(shown, runs)),
    )


def _caveats(shown: Sequence[tuple[Run, Line]], runs: Sequence[Run]) -> list[str]:
    """What keeps the points of the figure from being compared."""
    differ = [
        word
        for word, values in (
            ("who is protected (unit)", {line.unit for _, line in shown}),
            ("what is hidden of them (relation)", {line.relation for _, line in shown}),
            ("delta", {run.report.delta for run, _ in shown}),
            ("the name of the figure", {run.figure for run, _ in shown}),
        )
        if len(values) > 1
    ]
    caveats = [f"Not to be compared as they stand, since they differ in {' and in '.join(differ)}."] if differ else []
    without = [run.name for run in runs if run not in [one for one, _ in shown]]
    if without:
        caveats.append(f"No such figure was recorded by {', '.join(without)}.")
    went_on = [run.name for run, _ in shown if any(line.points[-1].figure is None for line in run.lines)]
    if went_on:
        names = ", ".join(dict.fromkeys(went_on))
        caveats.append(
            f"More was released after the last figure of {names}: the epsilon here is that of the figure's moment."
        )
    if any(math.isinf(point.epsilon) for _, line in shown for point in line.points):
        caveats.append("What has an infinite epsilon stands in the table only.")
    return caveats


def _norms(run: Run) -> list[tuple[str, ledger.GradientNorms]]:
    moments = run.contents.history
    return [(moment.time, moment.gradient_norms) for moment in moments if moment.gradient_norms is not None]


def _norm_plots(run: Run, name: str) -> list[_Plot]:
    """The last histogram, and how the share that was clipped went."""
    norms = _norms(run)
    _, last = norms[-1]
    clips = sorted({e.l2_norm_clip for account in run.report.accounts for e in account.events if e.l2_norm_clip})
    clip = clips[0] if len(clips) == 1 else None
    title = "Gradient norms before the clip, at the last look"
    histogram = _Plot(
        title=title,
        svg=_histogram_svg(last, clip, f"{name}-histogram", title),
        series=(),
        head=("from", "to", "examples"),
        rows=tuple(
            (f"{low:.3g}", f"{high:.3g}", f"{count:,}")
            for low, high, count in zip(last.edges, last.edges[1:], last.counts, strict=False)
        ),
        limit=None if clip is None else f"clip, {clip:g}",
    )
    shares = [norm.clipped / norm.examples if norm.examples else 0.0 for _, norm in norms]
    title = "Share of examples that was clipped"
    looks = tuple(float(i + 1) for i in range(len(norms)))
    share = _Plot(
        title=title,
        svg=_lines_svg(
            [_Series("", looks, tuple(shares), "example", 0)],
            f"{name}-share",
            title,
            x="look",
            y="share",
            from_zero=True,
        ),
        series=(),
        head=("time", "clipped", "examples", "share"),
        rows=tuple(
            (_time(time), f"{norm.clipped:,}", f"{norm.examples:,}", f"{100 * part:.1f} %")
            for (time, norm), part in zip(norms, shares, strict=True)
        ),
    )
    return [histogram, share]


def _key(series: _Series) -> str:
    """The dashes of a series, for its entry in the legend."""
    return " ".join(f"{2 * length:g}" for length in series.dashes or ())


def _new_figure() -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 2.9))
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.15, right=0.98, bottom=0.19, top=0.965)  # room for the labels
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=11, length=3)
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, color=_INK, fontsize=11.5)
    axes.set_ylabel(y, color=_INK, fontsize=11.5)


def _lines_svg(
    series: Sequence[_Series],
    name: str,
    title: str,
    *,
    x: str,
    y: str,
    limit: float | None = None,
    from_zero: bool = False,
) -> "Markup | None":
    if not any(one.x for one in series):
        return None
    figure, axes = _new_figure()
    for one in series:
        axes.plot(
            one.x, one.y, color=_sentinel(one.index), linewidth=1.8, dashes=one.dashes or (None, None),
            marker=_MARKERS.get(one.unit, "o"), markersize=3 if len(one.x) > 1 else 6,
        )  # fmt: skip
        if one.x and one.ends:
            axes.plot(
                one.x[-1:], one.y[-1:], color=_sentinel(one.index), marker=_MARKERS.get(one.unit, "o"), markersize=6
            )
    if limit is not None:
        axes.axhline(limit, color=_LIMIT, linewidth=1.2, dashes=(4, 3))
    axes.set_xlim(left=0)
    if from_zero:
        axes.set_ylim(bottom=0)
    _label(axes, x, y)
    return _svg(figure, name, title)


def _histogram_svg(norms: ledger.GradientNorms, clip: float | None, name: str, title: str) -> "Markup":
    """Bins of one width each, since their edges may lie far apart; the edges are written below them."""
    figure, axes = _new_figure()
    axes.bar([i + 0.5 for i in range(len(norms.counts))], norms.counts, width=0.9, color=_sentinel(0))
    every = max(1, round(len(norms.edges) / 6))
    axes.set_xticks(range(0, len(norms.edges), every), [f"{edge:.2g}" for edge in norms.edges[::every]])
    for low, (left, right) in enumerate(zip(norms.edges, norms.edges[1:], strict=False)):
        if clip is not None and left <= clip < right:
            axes.axvline(low + (clip - left) / (right - left), color=_LIMIT, linewidth=1.2, dashes=(4, 3))
    _label(axes, "norm", "examples")
    return _svg(figure, name, title)


def _sentinel(index: int) -> str:
    return f"#0b00{index % _COLOURS:02x}"


def _svg(figure: "Figure", name: str, title: str) -> "Markup":
    """The figure to put into the page: colours are variables, text is text, and names are its own."""
    import matplotlib
    from markupsafe import Markup, escape

    buffer = io.StringIO()
    # Text as text follows the page's font, and can be read aloud; a fixed salt makes the same figure the same text.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    variables = {_INK: "var(--ink)", _FAINT: "var(--faint)", _LIMIT: "var(--limit)"}
    variables |= {_sentinel(i): f"var(--series-{i})" for i in range(_COLOURS)}
    for sentinel, variable in variables.items():
        text = text.replace(sentinel, variable)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    _, _, rest = text.partition(">")
    size = re.search(r'viewBox="[^"]*"', text)
    # Nothing of a ledger is in it: titles and labels are this module's own words, ticks are numbers.
    opening = f'<svg {size[0] if size else ""} role="img" aria-labelledby="{name}-title"><title id="{name}-title">'
    return Markup(f"{opening}{escape(title)}</title>{rest}")
