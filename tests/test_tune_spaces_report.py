"""The report of a search: what the page says, what the table holds, and what a browser draws."""

import csv
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import StorageError
from tune_spaces import plots, report
from tune_spaces import record as records

RANKS = (8, 16, 32, 64)


def _trial(number: int, *, state: str = "finished", **changes: Any) -> dict[str, Any]:
    """A trial whose loss is least at a learning rate of 3e-4, for every rank nearly the same."""
    rank = RANKS[number % 4]
    at_rank_16 = 2e-5 * 10 ** (number * 2 / 15)
    loss = 1.2 + 0.3 * abs(math.log10(at_rank_16 / 3e-4)) + 0.01 / rank
    num_points = {"finished": 8, "stopped": 3, "failed": 2, "running": 4}[state]
    history = [
        [step * 1000, loss + 2 / step, loss + 1.5 / step, 10.0 * step]
        for step in range(1, num_points + 1)
    ]
    value = history[-1][2] if state in ("finished", "stopped") else None
    tree = {
        "trial": f"t{number:02d}",
        "state": state,
        "reason": {"stopped": "rung 1: not in the best third", "failed": "loss is not finite"}.get(
            state, ""
        ),
        "params": {"lora.rank": rank, "optim.learning_rate_at_rank_16": at_rank_16},
        "rank": rank,
        "learning_rate": at_rank_16 * (16 / rank) ** 0.5,
        "learning_rate_at_rank_16": at_rank_16,
        "value": value,
        "low": None if value is None else value - 0.05,
        "high": None if value is None else value + 0.07,
        "tokens": num_points * 1000,
        "train_s": 12.5 * num_points,
        "bench": "bench-0",
        "history": history,
    }
    return {**tree, **changes}


def _winner(trial: dict[str, Any], **changes: Any) -> dict[str, Any]:
    tree = {name: trial[name] for name in ("trial", "value", "low", "high")}
    test = {"test_value": 1.44, "test_low": 1.4, "test_high": 1.5, "test_n": 100}
    return {**tree, "n": 200, **test, "is_tie": False, "tied_with": [], "why": "Best.", **changes}


def _sixteen() -> list[dict[str, Any]]:
    states = ["stopped", "finished", "stopped", "failed", "stopped", "finished"]
    return [
        _trial(number, state="finished" if number in (8, 9, 10) else states[number % 6])
        for number in range(16)
    ]


def _leave(directory: Path, trials: list[dict[str, Any]], **changes: Any) -> Path:
    """Write what the search's driver leaves."""
    tree = {
        "name": "demo-search",
        "metric": "eval_loss",
        "mode": "min",
        "space": {
            "name": "rank_lr",
            "dimensions": {
                "lora.rank": "one of 8, 16, 32, 64",
                "optim.learning_rate_at_rank_16": "2e-5 to 2e-3, logarithmic",
            },
        },
        "wall_s": 180.0,
        "isolation": "exact",
        "seats": 8,
        "seats_filled": [[0, 0], [2.5, 6], [4.0, 8], [90.0, 7], [95.0, 8], [150.0, 3]],
        "mean_seats_filled": 6.8,
        "base": {"value": 3.21, "low": 3.1, "high": 3.3, "n": 200},
        "winner": None,
        "rungs": [1000, 3000],
        "finalists": [],
        "cost": {"measured_s": 180.0, "one_process_per_trial_s": 810.0, "how": "Two at a time."},
        "versions": {"ray": "2.60.0", "optuna": "5.0.0"},
        "started": "2030-01-02T03:04:05+00:00",
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "search.json").write_text(json.dumps({**tree, **changes}))
    (directory / "trials.jsonl").write_text("".join(json.dumps(one) + "\n" for one in trials))
    return directory


def _full(directory: Path) -> Path:
    trials = _sixteen()
    best = trials[9]
    finalists = [
        {
            "trial": trials[number]["trial"],
            "seeds": [{"seed": seed, "value": 1.38 + 0.01 * seed} for seed in range(3)],
            "mean": 1.39,
            "low": 1.36,
            "high": 1.42,
            "diff_low": None if number == 9 else -0.01,
            "diff_high": None if number == 9 else 0.04,
        }
        for number in (9, 8, 10)
    ]
    winner = _winner(best, is_tie=True, tied_with=["t08"], why="t08 is within its interval.")
    return _leave(directory, trials, winner=winner, finalists=finalists)


def test_csv_has_a_row_a_trial_and_a_column_a_parameter(tmp_path: Path) -> None:
    other = _trial(1, state="failed", params={"lora.target_modules": ["q", "v"], "lora.rank": 16})
    report.write(_leave(tmp_path, [_trial(0), other]))
    with (tmp_path / "trials.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["trial"] for row in rows] == ["t00", "t01"]
    assert rows[0]["state"] == "finished"
    assert float(rows[0]["value"]) == _trial(0)["value"]
    assert float(rows[0]["optim.learning_rate_at_rank_16"]) == 2e-5
    assert rows[0]["lora.target_modules"] == ""
    assert rows[1]["value"] == ""
    assert rows[1]["reason"] == "loss is not finite"
    assert json.loads(rows[1]["lora.target_modules"]) == ["q", "v"]
    assert "history" not in rows[0]


def test_answer_names_the_winner_its_interval_the_base_and_the_test_split(tmp_path: Path) -> None:
    best = _trial(2, value=1.234, low=1.2, high=1.27, learning_rate=3.1e-4)
    record = records.read(_leave(tmp_path, [best], winner=_winner(best)))
    assert report.answer(record) == (
        "Trial t02 (rank 32, learning rate 3.1e-4) won: eval_loss 1.234 (95 % interval 1.2 to "
        "1.27), the base model 3.21 (95 % interval 3.1 to 3.3). On the test split, which no "
        "decision used: 1.44 (95 % interval 1.4 to 1.5)."
    )


def test_answer_says_that_a_tie_went_to_the_smaller_rank(tmp_path: Path) -> None:
    best = _trial(0)
    winner = _winner(best, is_tie=True, tied_with=["t01", "t02"], test_value=None)
    record = records.read(_leave(tmp_path, [best], winner=winner, base=None))
    text = report.answer(record)
    assert text.endswith("It is a tie with t01, t02; of a tie the smallest rank is taken.")
    assert "the base model was not measured" in text


@pytest.mark.parametrize(("mode", "value"), [("min", 3.21), ("min", 4.0), ("max", 3.0)])
def test_answer_says_when_the_winner_is_no_better_than_the_base(
    tmp_path: Path, mode: str, value: float
) -> None:
    best = _trial(0, value=value)
    record = records.read(_leave(tmp_path, [best], winner=_winner(best), mode=mode))
    assert "no better than the base model" in report.answer(record)


def test_answer_without_a_finished_trial_counts_the_reasons(tmp_path: Path) -> None:
    trials = [_trial(0, state="failed"), _trial(1, state="stopped"), _trial(2, state="failed")]
    assert report.answer(records.read(_leave(tmp_path / "a", trials))) == (
        "No trial finished: 2 failed (loss is not finite), "
        "1 stopped (rung 1: not in the best third)."
    )
    nothing = records.read(_leave(tmp_path / "b", []))
    assert report.answer(nothing) == "No trial finished: none was started."
    undecided = records.read(_leave(tmp_path / "c", [_trial(0), *trials[1:]]))
    assert report.answer(undecided) == "No winner was chosen; 1 of 3 trials finished."


def test_leaderboard_sorts_by_value_with_the_base_model_among_them(tmp_path: Path) -> None:
    trials = [
        _trial(0, value=0.2),
        _trial(1, state="failed"),
        _trial(2, value=0.9),
        _trial(3, state="stopped", value=0.95),
    ]
    base = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    page = report.write(_leave(tmp_path, trials, mode="max", base=base)).read_text()
    table = page[page.index("Leaderboard") : page.index("Finalists")]
    assert re.findall(r"<tr><td>(.*?)</td>", table) == ["t02", "base model", "t00", "t03", "t01"]
    assert "train_loss against tokens" not in page
    page = report.write(_leave(tmp_path, trials, base=None)).read_text()
    assert "<td>base model</td><td>not measured</td>" in page


def test_cost_is_compared_only_where_it_was_measured(tmp_path: Path) -> None:
    page = report.write(_full(tmp_path)).read_text()
    assert "one process per trial takes 810 s, 4.5 times as long. Two at a time." in page
    for cost in (None, {"measured_s": 180.0, "one_process_per_trial_s": None, "how": ""}):
        page = report.write(_leave(tmp_path, [], cost=cost)).read_text()
        assert "This search took 180 s; one process per trial was not measured." in page


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_text_from_outside_is_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    evil = "<script>evil()</script>"
    best = _trial(0, trial=evil, reason=evil, params={evil: evil}, bench=evil)
    page = report.write(
        _leave(
            tmp_path,
            [best, _trial(1, params={evil: 3})],
            name=evil,
            metric=evil,
            space={"name": evil, "dimensions": {evil: evil}},
            winner=_winner(best, why=evil, tied_with=[evil], is_tie=True),
            versions={evil: evil},
            cost={"measured_s": 1.0, "one_process_per_trial_s": 2.0, "how": evil},
            started=evil,
        )
    ).read_text()
    assert evil not in page
    assert "&lt;script&gt;evil()" in page
    elements = _Elements()
    elements.feed(page)
    assert [tag for tag, _ in elements.seen].count("script") == 4
    assert not [tag for tag, attrs in elements.seen if attrs.keys() & {"src", "href"}]
    assert not [tag for tag, _ in elements.seen if tag in ("link", "iframe", "img", "object")]
    figures = re.search(r'id="figures">(.*?)</script>', page)
    assert figures is not None
    assert evil not in json.dumps(json.loads(figures[1]))


@pytest.mark.parametrize(
    ("trials", "sentences"),
    [
        ([], ["nothing to compare", "No trial reported train_loss", "No parameter varied"]),
        ([_trial(0, state="failed", history=[])], ["nothing to compare", "there are 0"]),
        ([_trial(0)], ["Importances need 4 trials with a value; there are 1", "No parameter"]),
        ([_trial(0, trial=f"t{n}") for n in range(5)], ["two parameters that every trial has"]),
        ([_trial(n, value=1.0) for n in range(5)], ["All trials have the same value"]),
    ],
    ids=["none", "failed", "one", "constant", "equal"],
)
def test_what_cannot_be_drawn_is_said(
    tmp_path: Path, trials: list[dict[str, Any]], sentences: list[str]
) -> None:
    page = report.write(_leave(tmp_path, trials, seats_filled=[])).read_text()
    assert "No seat was ever taken." in page
    for sentence in sentences:
        assert sentence in page


def test_the_parameter_that_matters_is_the_important_one(tmp_path: Path) -> None:
    trials = [_trial(number) for number in range(16)]
    figure = plots.importances(records.read(_leave(tmp_path, trials)))
    assert isinstance(figure, plots.Figure)
    assert figure.data[0]["y"] == ["lora.rank", "optim.learning_rate_at_rank_16"]
    shares = figure.data[0]["x"]
    assert isinstance(shares, list)
    assert shares[1] > 0.7
    assert sum(shares) == pytest.approx(1)


def test_figure_that_is_not_finite_is_read_as_null(tmp_path: Path) -> None:
    trial = _trial(0, state="failed", value=float("nan"), history=[[10, float("inf"), None, 1.0]])
    record = records.read(_leave(tmp_path, [trial]))
    assert record.trials[0].value is None
    assert record.trials[0].history == ((10, None, None, 1.0),)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seat": 3}, ["'seat' is unknown", "Did you mean 'seats'?"]),
        ({"mode": "least"}, ["mode is 'least'"]),
        ({"seats": True}, ["seats is 'True'"]),
        ({"seats_filled": [[1.0]]}, ["seats_filled[0] is '[1.0]'"]),
        ({"base": {"value": 1.0}}, ["base: 'high' is missing"]),
        ({"winner": _winner(_trial(7))}, ["names trial 't07'", "Did you mean 't00'?", "resume"]),
    ],
)
def test_record_that_no_search_wrote_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    _leave(tmp_path, [_trial(0)], **changes)
    with pytest.raises(StorageError) as caught:
        records.read(tmp_path)
    for word in [str(tmp_path), *words]:
        assert word in str(caught.value)


def test_missing_and_torn_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"search\.json cannot be read"):
        records.read(tmp_path)
    _leave(tmp_path, [_trial(0)])
    with (tmp_path / "trials.jsonl").open("a") as stream:
        stream.write('{"trial": "t0')
    with pytest.raises(StorageError, match=r"trials\.jsonl: not JSON"):
        records.read(tmp_path)


def _drawn(page: Path, profile: Path) -> tuple[dict[str, Any], str]:
    """What headless Chromium drew of a page, and what it logged."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--window-size=1200,900"]
    flags += ["--virtual-time-budget=10000", "--dump-dom"]
    result = subprocess.run(
        [chromium, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r'<pre [^>]*id="drawn"[^>]*>(.*?)</pre>', result.stdout)
    assert found is not None, result.stderr
    return json.loads(found[1]), result.stderr


@pytest.mark.browser
def test_browser_draws_every_plot_without_an_error(tmp_path: Path) -> None:
    state, log = _drawn(report.write(_full(tmp_path / "search")), tmp_path / "profile")
    assert state["errors"] == []
    assert "CONSOLE" not in log
    assert state["plots"] == {
        "plot-2": 7,  # finished and stopped trials of the four ranks, and the base model
        "plot-3": 18,  # 16 trials, where they stopped, where they failed
        "plot-4": 18,
        "plot-5": 1,
        "plot-6": 14,  # the trials that have a value
        "plot-7": 1,
    }


@pytest.mark.browser
def test_browser_opens_the_page_of_a_search_without_trials(tmp_path: Path) -> None:
    page = report.write(_leave(tmp_path / "search", [], seats_filled=[]))
    state, log = _drawn(page, tmp_path / "profile")
    assert state == {"plots": {}, "errors": []}
    assert "CONSOLE" not in log
