"""What a search found: trials.csv, and report.html, one page that opens with the answer.

`write` reads what `record.py` describes. The page holds plotly.js itself and forbids every request
by its Content-Security-Policy, so it can be mailed and opened anywhere.

What is covered: searches without trials, without a winner and with a single trial; text from
outside, which is escaped. What is not covered: the page without JavaScript has no figures.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from plotly.offline import get_plotlyjs

from cluster import storage
from tune_spaces import plots
from tune_spaces import record as records
from tune_spaces.record import Estimate, SearchRecord, Trial


def write(search_dir: Path) -> Path:
    """Write `trials.csv` and `report.html` into a search directory; the path of the page.

    Raises StorageError where the record cannot be read or the files cannot be written.
    """
    record = records.read(search_dir)
    storage.write_file(search_dir / "trials.csv", _csv(record).encode())
    page = search_dir / "report.html"
    storage.write_file(page, _page(record).encode())
    return page


def answer(record: SearchRecord) -> str:
    """What the search found, in a sentence or a few, as plain text."""
    winner = record.winner
    if winner is None:
        return _no_winner(record)
    text = f"{_named(record.trial(winner.trial))} won: {record.metric} {_estimate(winner)}, "
    if record.base is None:
        text += "the base model was not measured."
    else:
        text += f"the base model {_estimate(record.base)}."
        gain = (record.base.value - winner.value) * (1 if record.mode == "min" else -1)
        if gain <= 0:
            text += " That is no better than the base model."
    if winner.is_tie:
        others = ", ".join(winner.tied_with)
        text += f" It is a tie with {others}; of a tie the smallest rank is taken."
    if winner.test_value is not None:
        test = _interval(winner.test_low, winner.test_high)
        text += (
            f" On the test split, which no decision used: {winner.test_value:.4g}"
            f"{f' (95 % interval {test})' if test else ''}."
        )
    return text


def _no_winner(record: SearchRecord) -> str:
    done = [trial for trial in record.trials if trial.state == "finished"]
    if done:
        return f"No winner was chosen; {len(done)} of {len(record.trials)} trials finished."
    if not record.trials:
        return "No trial finished: none was started."
    ends = Counter((trial.state, trial.reason) for trial in record.trials)
    parts = [
        f"{count} {state}{f' ({reason})' if reason else ''}"
        for (state, reason), count in ends.most_common()
    ]
    return f"No trial finished: {', '.join(parts)}."


def _named(trial: Trial) -> str:
    return f"Trial {trial.trial} (rank {trial.rank}, learning rate {_rate(trial.learning_rate)})"


def _rate(number: float) -> str:
    """3.1e-4, without the zero that Python pads exponents with."""
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _estimate(figure: Estimate) -> str:
    interval = _interval(figure.low, figure.high)
    return f"{figure.value:.4g}" + (f" (95 % interval {interval})" if interval else "")


def _csv(record: SearchRecord) -> str:
    """A row a trial, a column a parameter; empty where a trial has no such figure."""
    names = list(dict.fromkeys(name for trial in record.trials for name in trial.params))
    columns = [name for name in Trial.__slots__ if name not in ("params", "history")]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*columns, *names])
    for trial in record.trials:
        fixed = [getattr(trial, column) for column in columns]
        writer.writerow([*fixed, *(_plain(trial.params.get(name)) for name in names)])
    return stream.getvalue()


def _plain(value: object) -> object:
    return json.dumps(value) if isinstance(value, list | dict | bool) else value


def _sections(record: SearchRecord) -> list[tuple[str, str, plots.Figure | str]]:
    """(title, caption of the figure, figure or what stands in its place) from top to bottom."""
    metric = record.metric
    note = "On the evaluation data, as the scheduler saw it."
    evaluated = [(f"{metric} against tokens", note, plots.by_tokens(record, 2, metric))]
    return [
        ("Leaderboard", "", _leaderboard(record)),
        ("Finalists", "", _finalists(record)),
        (
            "Metric against learning rate",
            "Filled: trained to the end. Open: stopped early, with its last value. "
            "Bars: 95 % interval.",
            plots.by_learning_rate(record),
        ),
        (
            "Training loss against tokens",
            "The winner is thick. Crosses: where a trial ended early; point at one for its reason.",
            plots.by_tokens(record, 1, "train_loss"),
        ),
        *(evaluated if metric != "train_loss" else []),
        (
            "What mattered",
            "How much each parameter decides whether a trial is among the best quarter "
            "(PED-ANOVA). Stopped trials count with their last value; rough for few trials.",
            plots.importances(record),
        ),
        (
            "All parameters at once",
            "A line a trial: blue is best, orange worst, the winner thick.",
            plots.parallel_coordinates(record),
        ),
        (
            "Seats",
            f"{record.mean_seats_filled:.1f} of {record.seats} possible seats taken on average.",
            plots.seats(record),
        ),
        ("Cost", "", _cost(record)),
        ("Settings", "", _settings(record)),
    ]


def _page(record: SearchRecord) -> str:
    sections = _sections(record)
    figures = {
        f"plot-{number}": asdict(content)
        for number, (_, _, content) in enumerate(sections)
        if isinstance(content, plots.Figure)
    }
    body = "".join(
        _section(title, caption, content, f"plot-{number}")
        for number, (title, caption, content) in enumerate(sections)
    )
    # `<` would end the script element that holds the figures.
    data = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
    title = escape(f"Search {record.name}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"{_HEAD}</head><body><main><h1>{title}</h1>"
        f'<p class="answer">{escape(answer(record))}</p>'
        f"{_why(record)}{body}</main>"
        f'<script type="application/json" id="figures">{data}</script>'
        f"<script>{get_plotlyjs()}</script><script>{_DRAW}</script></body></html>\n"
    )


def _section(title: str, caption: str, content: plots.Figure | str, name: str) -> str:
    """A sentence or a table stands where there is no figure, without the figure's caption."""
    head = f"<section><h2>{escape(title)}</h2>"
    if isinstance(content, plots.Figure):
        note = f"<p>{escape(caption)}</p>" if caption else ""
        plot = f'<div id="{name}" style="min-width: {content.min_width_px}px"></div>'
        return f'{head}{note}<div class="wide">{plot}</div></section>'
    inner = content if content.startswith("<") else f"<p>{escape(content)}</p>"
    return f"{head}{inner}</section>"


def _why(record: SearchRecord) -> str:
    return f"<p>{escape(record.winner.why)}</p>" if record.winner and record.winner.why else ""


def _leaderboard(record: SearchRecord) -> str:
    """Finished trials and the base model by value, then stopped ones, then those without."""
    sign = 1 if record.mode == "min" else -1
    winner = record.winner
    tied = winner.tied_with if winner else ()
    rows: list[tuple[tuple[int, float], list[object]]] = []
    for trial in record.trials:
        mark = "winner" if winner and trial.trial == winner.trial else ""
        mark = "tie" if trial.trial in tied else mark
        value = trial.value
        group = 2 if value is None else 0 if trial.state == "finished" else 1
        cells: list[object] = [
            trial.trial,
            mark or trial.state,
            "" if value is None else f"{value:.4g}",
            _interval(trial.low, trial.high),
            trial.rank,
            _rate(trial.learning_rate),
            _rate(trial.learning_rate_at_rank_16),
            f"{trial.tokens:,}",
            f"{trial.train_s:.0f}",
            trial.reason,
        ]
        rows.append(((group, 0 if value is None else sign * value), cells))
    if record.base is None:
        base: list[object] = ["base model", "not measured", *[""] * 8]
        rows.append(((3, 0), base))
    else:
        interval = _interval(record.base.low, record.base.high)
        base = ["base model", "untrained", f"{record.base.value:.4g}", interval, *[""] * 6]
        rows.append(((0, sign * record.base.value), base))
    head = ["trial", "state", record.metric, "95 % interval", "rank", "learning rate"]
    head += ["at rank 16", "supervised tokens", "seconds", "reason"]
    return _table(head, [cells for _, cells in sorted(rows, key=lambda row: row[0])])


def _finalists(record: SearchRecord) -> str:
    if not record.finalists:
        return "No trial was repeated with more seeds."
    rows = [
        [
            finalist.trial,
            f"{finalist.mean:.4g}",
            _interval(finalist.low, finalist.high),
            _interval(finalist.diff_low, finalist.diff_high) or "-",
            ", ".join(f"{one.value:.4g} (seed {one.seed})" for one in finalist.seeds),
        ]
        for finalist in record.finalists
    ]
    head = ["trial", f"mean {record.metric}", "95 % interval", "difference to the best", "seeds"]
    return _table(head, rows)


def _cost(record: SearchRecord) -> str:
    cost = record.cost
    if cost is None or cost.one_process_per_trial_s is None:
        measured = record.wall_s if cost is None else cost.measured_s
        how = f" {cost.how}" if cost else ""
        return f"This search took {measured:.0f} s; one process per trial was not measured.{how}"
    ratio = cost.one_process_per_trial_s / max(cost.measured_s, 1e-9)
    words = f"{ratio:.1f} times as long" if ratio >= 1 else f"less: {ratio:.2f} of it"
    return (
        f"This search took {cost.measured_s:.0f} s; one process per trial takes "
        f"{cost.one_process_per_trial_s:.0f} s, {words}. {cost.how}"
    )


def _settings(record: SearchRecord) -> str:
    isolation = {
        "exact": "exact: a trial's result does not depend on its neighbours",
        "coupled": "coupled: LLM.int8's outliers are shared by all rows, so neighbours can matter",
    }[record.isolation]
    measured = record.winner or record.base
    rows = [
        ["metric", f"{record.metric} ({record.mode})"],
        ["space", record.space.name],
        *([name, text] for name, text in record.space.dimensions.items()),
        *([["evaluation items", f"{measured.n:,}"]] if measured else []),
        ["rungs", ", ".join(f"{rung:,}" for rung in record.rungs) or "none"],
        ["isolation", isolation],
        ["started", record.started],
        ["wall time", f"{record.wall_s:.0f} s"],
        *([f"{name} (version)", version] for name, version in record.versions.items()),
    ]
    return _table(["setting", "value"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th")}{body}</table></div>'


_HEAD = """
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';
 script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<style>
body { margin: 0; background: #f4f5f7; color: #1d2129; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: auto; padding: 16px; }
h1 { font-size: 1.5rem; margin: 8px 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 4px; overflow-wrap: anywhere; }
p { margin: 4px 0 8px; overflow-wrap: anywhere; }
.answer { font-size: 1.2rem; }
section { background: #fff; border: 1px solid #dfe2e6; border-radius: 8px; padding: 16px;
 margin: 16px 0; }
section p { color: #545b66; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid #e8eaed;
 vertical-align: top; }
th, td { white-space: nowrap; }
td:last-child { white-space: normal; min-width: 10em; }
</style>
<script>
const state = {plots: {}, errors: []};
addEventListener("error", event => state.errors.push(String(event.message)));
addEventListener("unhandledrejection", event => state.errors.push(String(event.reason)));
document.addEventListener("securitypolicyviolation",
  event => state.errors.push(`${event.violatedDirective} ${event.blockedURI}`));
</script>"""

# The hidden element is how the page's test sees what was really drawn.
_DRAW = """
const drawn = document.createElement("pre");
drawn.hidden = true;
drawn.id = "drawn";
document.body.append(drawn);
const tell = () => { drawn.textContent = JSON.stringify(state); };
const figures = JSON.parse(document.getElementById("figures").textContent);
for (const [id, figure] of Object.entries(figures)) {
  Plotly.newPlot(id, figure.data, figure.layout, {responsive: true, displaylogo: false})
    .then(plot => {
      const has_size = mark => Math.max(mark.getBBox().width, mark.getBBox().height) > 0;
      const is_drawn = trace =>
        [...trace.querySelectorAll("path.point, .point path, .js-line")].some(has_size);
      state.plots[id] = [...plot.querySelectorAll(".trace")].filter(is_drawn).length;
      tell();
    });
}
addEventListener("error", tell);
tell();
"""
