"""The figures of a search for plotly.js: each is a Figure, or a sentence where there is none.

Only SVG traces are used. plotly's own parallel coordinates need WebGL, which remote desktops and
headless browsers lack, so here they are lines over axes drawn by hand.
Text from outside is escaped: plotly reads labels as a small HTML.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, cast

import optuna

from tune_spaces.record import SearchRecord, Trial

_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#555555")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
_WIDE = 8
"""Positive values whose largest is this many times the smallest get a logarithmic axis."""
_MIN_TRIALS = 4
_TOP_SHARE = 0.25
"""PED-ANOVA compares this share of the trials, the best, with all."""
_MAX_TICKS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """What `Plotly.newPlot` takes."""

    data: list[dict[str, object]]
    """Traces."""
    layout: dict[str, object]
    """Axes, legend and shapes."""
    min_width_px: int = 0
    """Narrower screens scroll."""


def by_learning_rate(record: SearchRecord) -> Figure | str:
    """The metric against the learning rate, a colour per rank; stopped trials are open circles."""
    trials = [trial for trial in record.trials if trial.value is not None]
    if not trials:
        return f"No trial reported {record.metric}, so there is nothing to compare."
    data: list[dict[str, object]] = []
    for rank, color in _rank_colors(record).items():
        own = sorted((t for t in trials if t.rank == rank), key=lambda t: t.learning_rate)
        done = [trial for trial in own if trial.state == "finished"]
        cut = [trial for trial in own if trial.state != "finished"]
        for group, mode, symbol in (
            (done, "lines+markers", "circle"),
            (cut, "markers", "circle-open"),
        ):
            if group:
                data.append(
                    {
                        "x": [trial.learning_rate for trial in group],
                        "y": [trial.value for trial in group],
                        "error_y": _error_bars(group),
                        "mode": mode,
                        "marker": {"symbol": symbol, "color": color, "size": 8},
                        "line": {"color": color},
                        "name": f"rank {rank}",
                        "legendgroup": str(rank),
                        "showlegend": group is done or not done,
                        "text": [_label(trial) for trial in group],
                        "hovertemplate": "%{text}<br>%{y:.5g}<extra></extra>",
                    }
                )
    rates = [trial.learning_rate for trial in trials]
    low, high = min(rates) / 1.3, max(rates) * 1.3
    values = [cast(float, trial.value) for trial in trials]
    if record.base is not None:
        data.append(_base_line(record.base.value, values, [low, high]))
    layout = _layout("learning rate", record.metric, is_log=_is_wide(values))
    leads = (1, 2, 5) if high / low < 30 else (1, 3)
    ticks = [
        (lead * 10.0**power, f"{lead}e{power}")
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for lead in leads
    ]
    layout["xaxis"] = {
        "title": {"text": "learning rate"},
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": [value for value, _ in ticks],
        "ticktext": [text for _, text in ticks],
    }
    return Figure(data=data, layout=layout)


def by_tokens(record: SearchRecord, column: int, title: str) -> Figure | str:
    """A column of every trial's history against supervised tokens, with rungs and stops."""
    data: list[dict[str, object]] = []
    colors = _rank_colors(record)
    values: list[float] = []
    stops: dict[str, list[tuple[int, float, str]]] = {"stopped": [], "failed": []}
    named: set[int] = set()
    for trial in sorted(record.trials, key=lambda trial: trial.rank):
        points = [(row[0], row[column]) for row in trial.history if row[column] is not None]
        if not points:
            continue
        is_winner = record.winner is not None and record.winner.trial == trial.trial
        y = [cast(float, value) for _, value in points]
        values += y
        data.append(
            {
                "x": [tokens for tokens, _ in points],
                "y": y,
                "mode": "lines+markers",
                "marker": {"size": 4},
                "line": {"color": colors[trial.rank], "width": 4 if is_winner else 1.5},
                "name": f"rank {trial.rank}",
                "legendgroup": str(trial.rank),
                "showlegend": trial.rank not in named,
                "text": _label(trial),
                "hovertemplate": "%{text}<br>%{x:,} tokens: %{y:.5g}<extra></extra>",
            }
        )
        named.add(trial.rank)
        if trial.state in stops:
            stops[trial.state].append((points[-1][0], y[-1], _label(trial)))
    if not data:
        return f"No trial reported {title}."
    data += [_crosses(state, ends) for state, ends in stops.items() if ends]
    layout = _layout("supervised tokens", title, is_log=_is_wide(values))
    layout["shapes"] = [_line("x", rung) for rung in record.rungs]
    layout["annotations"] = [
        _rung_note(rung, f"rung {number}") for number, rung in enumerate(record.rungs, 1)
    ]
    return Figure(data=data, layout=layout)


def importances(record: SearchRecord) -> Figure | str:
    """How much each parameter decides whether a trial is among the best (PED-ANOVA).

    optuna's fANOVA needs scikit-learn; PED-ANOVA needs nothing and looks only at which trials are
    the best, so that the early values of stopped trials do not distort it.
    """
    trials = [trial for trial in record.trials if trial.value is not None]
    if len(trials) < _MIN_TRIALS:
        return f"Importances need {_MIN_TRIALS} trials with a value; there are {len(trials)}."
    names = [
        name
        for name in _varied(trials)
        if all(trial.params.get(name) is not None for trial in trials)
    ]
    if len(names) < 2:
        return "Importances need two parameters that every trial has and that vary."
    if len({trial.value for trial in trials}) == 1:
        return "All trials have the same value, so no parameter made a difference."
    columns = {name: [trial.params[name] for trial in trials] for name in names}
    shares = _importances(
        {name: _distribution(column) for name, column in columns.items()},
        {
            name: column if _is_numeric(column) else [_word(value) for value in column]
            for name, column in columns.items()
        },
        [cast(float, trial.value) for trial in trials],
        "minimize" if record.mode == "min" else "maximize",
    )
    order = sorted(names, key=lambda name: shares[name])
    trace: dict[str, object] = {
        "type": "bar",
        "orientation": "h",
        "x": [shares[name] for name in order],
        "y": [escape(name) for name in order],
        "marker": {"color": _COLORS[0]},
        "hovertemplate": "%{y}: %{x:.0%}<extra></extra>",
    }
    layout = _layout("share", "")
    layout["xaxis"] = {"title": {"text": "share"}, "tickformat": ".0%", "range": [0, 1]}
    layout["yaxis"] = {"type": "category", "automargin": True, "ticksuffix": " "}
    layout["height"] = 140 + 36 * len(order)
    return Figure(data=[trace], layout=layout)


def parallel_coordinates(record: SearchRecord) -> Figure | str:
    """A line a trial over one axis per varied parameter and the metric; blue is best."""
    trials = [trial for trial in record.trials if trial.value is not None]
    names = _varied(trials)
    if not names:
        return "No parameter varied between trials that have a value."
    columns = {name: [trial.params.get(name) for trial in trials] for name in names}
    columns[record.metric] = [trial.value for trial in trials]
    data: list[dict[str, object]] = []
    heights: list[list[float]] = []
    ticks: list[dict[str, object]] = []
    for place, column in enumerate(columns.values()):
        positions, marks = _scale(column)
        heights.append(positions)
        ticks += [_tick(place, height, text) for height, text in marks]
    for number, trial in enumerate(trials):
        badness = heights[-1][number] if record.mode == "min" else 1 - heights[-1][number]
        is_winner = record.winner is not None and record.winner.trial == trial.trial
        data.append(
            {
                "x": list(range(len(columns))),
                "y": [column[number] for column in heights],
                "mode": "lines",
                "line": {
                    "color": f"hsl({210 - 180 * badness:.0f}, 75%, 45%)",
                    "width": 4 if is_winner else 1.5,
                },
                "text": _label(trial),
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    layout = _layout("", "")
    layout["shapes"] = [_line("x", place) for place in range(len(columns))]
    layout["showlegend"] = False
    layout["annotations"] = ticks
    layout["yaxis"] = {"visible": False, "range": [-0.05, 1.05], "fixedrange": True}
    layout["xaxis"] = {
        "tickvals": list(range(len(columns))),
        "ticktext": [escape(name).replace(".", ".<br>", 1) for name in columns],
        "tickangle": 0,
        "range": [-0.35, len(columns) - 0.65],
        "showgrid": False,
        "zeroline": False,
        "fixedrange": True,
    }
    return Figure(data=data, layout=layout, min_width_px=170 * len(columns))


def seats(record: SearchRecord) -> Figure | str:
    """How many seats were taken over time."""
    if not record.seats_filled:
        return "No seat was ever taken."
    times = [time_s for time_s, _ in record.seats_filled]
    filled = [count for _, count in record.seats_filled]
    trace: dict[str, object] = {
        "x": [*times, max(record.wall_s, times[-1])],
        "y": [*filled, filled[-1]],
        "mode": "lines",
        "line": {"shape": "hv", "color": _COLORS[0]},
        "fill": "tozeroy",
        "hovertemplate": "%{x:.0f} s: %{y} seats<extra></extra>",
    }
    layout = _layout("seconds", "seats taken")
    layout["showlegend"] = False
    layout["yaxis"] = {"title": {"text": "seats taken"}, "range": [0, record.seats * 1.15]}
    layout["shapes"] = [
        _line("y", record.mean_seats_filled, f"mean {record.mean_seats_filled:.1f}"),
        _line("y", record.seats, f"possible {record.seats}"),
    ]
    return Figure(data=[trace], layout=layout)


def _rank_colors(record: SearchRecord) -> dict[int, str]:
    ranks = sorted({trial.rank for trial in record.trials})
    return {rank: _COLORS[number % len(_COLORS)] for number, rank in enumerate(ranks)}


def _label(trial: Trial) -> str:
    """What the pointer shows of a trial, the reason of its end included."""
    lines = [
        f"trial {trial.trial}",
        f"rank {trial.rank}, learning rate {trial.learning_rate:.2e} "
        f"({trial.learning_rate_at_rank_16:.2e} at rank 16)",
        *textwrap.wrap(f"{trial.state}: {trial.reason}" if trial.reason else trial.state, 60),
    ]
    return "<br>".join(escape(line) for line in lines)


def _error_bars(trials: Sequence[Trial]) -> dict[str, object]:
    up = [0 if t.high is None else t.high - cast(float, t.value) for t in trials]
    down = [0 if t.low is None else cast(float, t.value) - t.low for t in trials]
    return {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "thickness": 1,
        "visible": any(up) or any(down),
    }


def _varied(trials: Sequence[Trial]) -> list[str]:
    """Parameters with more than one value, in the order of their first appearance."""
    names = dict.fromkeys(name for trial in trials for name in trial.params)
    return [name for name in names if len({str(t.params.get(name)) for t in trials}) > 1]


def _word(value: object) -> str:
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return "none" if value is None else str(value)


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= _WIDE


def _is_numeric(column: Sequence[object]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in column)


def _distribution(column: Sequence[object]) -> optuna.distributions.BaseDistribution:
    if not _is_numeric(column):
        return optuna.distributions.CategoricalDistribution(sorted({_word(v) for v in column}))
    numbers = [float(value) for value in cast(Sequence[float], column)]
    low, high = min(numbers), max(numbers)
    return optuna.distributions.FloatDistribution(low, high, log=_is_wide(numbers))


def _importances(
    distributions: dict[str, optuna.distributions.BaseDistribution],
    columns: dict[str, Sequence[object]],
    values: Sequence[float],
    direction: Literal["minimize", "maximize"],
) -> dict[str, float]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # It announces even a study in memory.
    try:
        study = optuna.create_study(direction=direction)
        for number, value in enumerate(values):
            params = {name: column[number] for name, column in columns.items()}
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions=distributions, value=value)
            )
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_TOP_SHARE)
        return optuna.importance.get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _scale(column: Sequence[object]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in 0..1 of a column's values, and the marks of its axis."""
    if not _is_numeric(column):
        words = [_word(value) for value in column]
        order = sorted(set(words))
        heights = {word: n / max(len(order) - 1, 1) for n, word in enumerate(order)}
        return [heights[word] for word in words], [(heights[word], word) for word in order]
    numbers = [float(value) for value in cast(Sequence[float], column)]
    low, high = min(numbers), max(numbers)
    if low == high:
        return [0.5] * len(numbers), [(0.5, f"{low:.3g}")]
    move, back = (math.log, math.exp) if _is_wide(numbers) else (float, float)
    start, span = move(low), move(high) - move(low)
    marks = sorted(set(numbers))
    if len(marks) > _MAX_TICKS:
        marks = [low, back(start + span / 2), high]
    return (
        [(move(number) - start) / span for number in numbers],
        [((move(mark) - start) / span, f"{mark:.3g}") for mark in marks],
    )


def _crosses(state: str, ends: Sequence[tuple[int, float, str]]) -> dict[str, object]:
    """Where trials ended early, with the reason under the pointer."""
    return {
        "x": [tokens for tokens, _, _ in ends],
        "y": [value for _, value, _ in ends],
        "text": [text for _, _, text in ends],
        "mode": "markers",
        "marker": {"symbol": "x", "size": 9, "color": "#c00" if state == "failed" else "#333"},
        "name": state,
        "hovertemplate": "%{text}<extra></extra>",
    }


def _rung_note(tokens: int, text: str) -> dict[str, object]:
    return {
        "x": tokens,
        "y": 1,
        "yref": "paper",
        "xanchor": "right",
        "yanchor": "top",
        "text": text,
        "textangle": -90,
        "showarrow": False,
        "font": {"size": 11, "color": "#555"},
    }


def _tick(place: int, height: float, text: str) -> dict[str, object]:
    return {
        "x": place,
        "y": height,
        "text": escape(textwrap.shorten(text, 24, placeholder="…")),
        "showarrow": False,
        "xanchor": "left",
        "xshift": 4,
        "bgcolor": "rgba(255,255,255,0.9)",
        "font": {"size": 11},
    }


def _base_line(value: float, values: Sequence[float], span: list[float]) -> dict[str, object]:
    """Hidden until its legend is clicked where it is so far off that it would flatten the rest."""
    spread = 2 * (max(values) - min(values))
    is_far = not min(values) - spread <= value <= max(values) + spread
    return {
        "x": span,
        "y": [value, value],
        "mode": "lines",
        "line": {"color": "#555", "dash": "dash"},
        "name": f"base model: {value:.4g}" + (" (click to show)" if is_far else ""),
        "visible": "legendonly" if is_far else True,
        "hovertemplate": "base model: %{y:.5g}<extra></extra>",
    }


def _line(axis: str, value: float, text: str = "") -> dict[str, object]:
    """A dashed line across the plot at a value of one axis."""
    across = "x" if axis == "y" else "y"
    return {
        "type": "line",
        f"{axis}0": value,
        f"{axis}1": value,
        f"{across}0": 0,
        f"{across}1": 1,
        f"{across}ref": "paper",
        "line": {"color": "#777", "width": 1, "dash": "dash"},
        "label": {"text": text, "textposition": "end", "font": {"size": 11, "color": "#555"}},
    }


def _layout(x: str, y: str, *, is_log: bool = False) -> dict[str, object]:
    return {
        "height": 420,
        "margin": {"l": 50, "r": 20, "t": 30, "b": 50},
        "xaxis": {"title": {"text": x}, "automargin": True},
        "yaxis": {
            "title": {"text": escape(y)},
            "automargin": True,
            "type": "log" if is_log else "linear",
        },
        "legend": {"orientation": "h", "y": -0.2},
        "hovermode": "closest",
        "font": {"family": "system-ui, sans-serif", "size": 13},
    }
