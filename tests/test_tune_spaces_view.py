"""What a person sees of a search, on a terminal and elsewhere."""

import io

from rich.console import Console

from training.events import Event
from tune_spaces import view


def result(trial: str, tokens: int, value: float, **fields: object) -> Event:
    about = {"rank": 8, "learning_rate": 1e-3, "train_loss": value + 0.1, "reason": ""}
    told = {"supervised_tokens": tokens, "value": value, "is_finished": False, "trial": trial}
    return Event(kind="result", time_s=0.0, fields={**about, **told, **fields})


STARTED = Event(
    kind="started", time_s=0.0, fields={"metric": "eval_loss", "trials": 3, "budget": 100}
)
EVENTS = (
    STARTED,
    result("aaa", 50, 2.0),
    result("bbb", 50, 3.0, reason="diverged: eval loss 9.1, the base model's is 3.0"),
    result("aaa", 100, 1.5, is_finished=True),
    Event(kind="trial_failed", time_s=0.0, fields={"trial": "ccc", "message": "its process died"}),
    result("ddd", 25, float("nan")),
    result("eee", 25, 4.0),
    Event(kind="stopped", time_s=0.0, fields={"trial": "eee", "reason": "by asha"}),
)


def test_elsewhere_each_report_is_a_line_and_each_stop_has_its_reason() -> None:
    out = io.StringIO()
    with view.watching(Console(file=out, width=120)) as watch:
        for event in EVENTS:
            watch(event)
    lines = out.getvalue().splitlines()
    assert lines[0] == "trial aaa  rank 8  lr 1.00e-03  50 tokens  loss 2.1000  eval_loss 2.0000"
    assert lines[1] == "trial bbb stopped: diverged: eval loss 9.1, the base model's is 3.0"
    assert lines[2].endswith("finished")
    assert lines[3] == "trial ccc failed: its process died"
    assert lines[-1] == "trial eee stopped: by asha"


def test_on_a_terminal_there_is_a_table_and_a_bar() -> None:
    out = io.StringIO()
    with view.watching(Console(file=out, width=120, force_terminal=True)) as watch:
        for event in EVENTS:
            watch(event)
    text = out.getvalue()
    for word in ("aaa", "finished", "bbb", "stopped", "ddd", "running", "nan", "3 of 3 trials"):
        assert word in text, word
    assert "diverged: eval loss 9.1" in text
