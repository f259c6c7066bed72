"""The demo: a 135M model learns to turn a customer's message into a strict JSON ticket.

Searches rank and learning rate through Ray Tune, eight short trials on one shared 8-bit base;
trains an 8-bit LoRA adapter with the winner's settings through Ray Train; evaluates the untouched
base and the adapter on held-out rows by generation; merges, proves the merge, and prints what it
found and where it lies; and serves the adapter, live on the 8-bit base and merged, to the stock
OpenAI client. A second run takes up what the first one left.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import cast

import requests
import typer
import yaml
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cluster import command, config, storage
from training import adapter as adapters
from training import evaluate, examples, merge, run, view
from training.__main__ import Overrides
from training.config import TrainRecipe
from training.evaluate import Estimate, Evaluation
from tune_spaces import config as search_config
from tune_spaces import search
from tune_spaces import view as search_view

RECIPE = Path("training/recipes/tickets.yaml")
SEARCH = Path("tune_spaces/searches/tickets.yaml")
SERVE = Path("runs/serve.yaml")
QUESTION = "Hi, this is Ada. My Juniper lamp broke after a day. Order 4821."
_START_S = 120.0
_STOP_S = 60.0
METRICS = ("json_valid", "exact_match", "rouge_l")
MAX_NEW_TOKENS = 64
console = Console()


def demo(overrides: list[str]) -> None:
    """The whole way, from the recipe to the table."""
    started = time.perf_counter()
    own = [word for word in overrides if word.startswith(("search.", "space"))]
    shared = [word for word in overrides if word not in own]
    chosen = search_config.load(SEARCH, [*shared, *own])
    with search_view.watching(console) as watch:
        found = search.search(chosen, say=say, watch=watch, resume=is_begun(chosen))
    best = config.load(TrainRecipe, Path(found["search_dir"]) / "best.yaml", [])
    winner = [f"lora.rank={best.lora.rank}", f"optim.learning_rate={best.optim.learning_rate}"]
    recipe = config.load(TrainRecipe, RECIPE, [*winner, *shared])
    with view.watching(console) as watch:
        result = run.train(recipe, say=say, watch=watch)
    adapter = Path(result["adapter"])
    before, after = measure(adapter, recipe)
    merged = adapter.parent / "merged"
    if not merged.exists():
        console.print("merging into the fp16 base, and comparing the logits ...")
        merge.merge(adapter, merged)
    serving = serve(adapter, system_message(recipe))
    parity = cast(Mapping[str, float], storage.verify(merged).info["merge"])
    console.print(table(before, after))
    console.print(
        f"training   {result['steps']} steps, {result['real_tokens']} tokens, "
        f"{result['real_tokens_per_s']:.0f} real tokens/s, "
        f"peak memory {result['peak_rss_bytes'] / 1e9:.1f} GB",
        f"search     {found['trials']} trials, {found['stopped']} stopped early, "
        f"{found['wall_s']:.0f} s; winner: rank {best.lora.rank}, "
        f"learning rate {best.optim.learning_rate:.2g}",
        f"report     {Path(found['search_dir']) / 'report.html'}",
        f"recipes    {SEARCH}, {RECIPE}",
        f"adapter    {adapter}",
        f"merged     {merged}",
        f"parity     logits up to {parity['max_logit']:.0f}; merged against live adapter: "
        f"{parity['max_logit_diff_fp16_base']:.3f} on the fp16 base, "
        f"{parity['max_logit_diff_live']:.3f} on the int8 base",
        f"served     live {serving['live']}",
        f"           merged {serving['merged']}",
        f"           {'the same answer' if serving['is_same'] else 'different answers'}",
        f"all of it  {time.perf_counter() - started:.0f} s",
        f"next       .venv/bin/loray serve {SERVE}",
        sep="\n",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def serve(adapter: Path, system: str) -> Mapping[str, object]:
    """Ask the adapter over HTTP, live and merged; what it said, and whether both said the same."""
    from openai import OpenAI

    port = free_port()
    SERVE.parent.mkdir(parents=True, exist_ok=True)
    tree = {
        "model": {"base": "demo"},
        "adapters": [
            {"name": "tickets", "path": str(adapter)},
            {"name": "tickets-merged", "path": str(adapter), "mode": "merged"},
        ],
    }
    SERVE.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    console.print("serving the adapter, live and merged ...")
    words = [sys.executable, "-m", "serving", str(SERVE), f"http.port={port}"]
    process = subprocess.Popen(words, start_new_session=True)  # noqa: S603
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/healthz", process)
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        said = {
            mode: client.chat.completions.create(
                model=name,
                messages=[
                    {"role": "system", "content": system},
                    {"role": "user", "content": QUESTION},
                ],
                temperature=0,
                max_tokens=MAX_NEW_TOKENS,
            )
            .choices[0]
            .message.content
            for mode, name in (("live", "tickets"), ("merged", "tickets-merged"))
        }
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    return {**said, "is_same": said["live"] == said["merged"]}


def wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
    """Until a server answers with 200."""
    deadline = time.monotonic() + _START_S
    while True:
        with suppress(requests.RequestException):
            if requests.get(url, timeout=5).ok:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit("the server did not start; see its messages above")
        time.sleep(0.2)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_begun(chosen: search_config.Search) -> bool:
    """Whether an earlier demo has left something of the search."""
    return (Path(chosen.recipe.storage) / chosen.recipe.name / "tune-0").exists()


def measure(adapter: Path, recipe: TrainRecipe) -> tuple[Evaluation, Evaluation]:
    """Base and adapter on the held-out rows."""
    base, model = adapters.load(str(adapter))
    assert isinstance(model, PeftModel)
    encoder = adapters.encoder_for(str(adapter), base)
    assert recipe.data.eval is not None
    held_out = examples.read(recipe.data.eval).examples
    found: dict[str, Evaluation] = {}
    with Progress(console=console) as progress:
        for name in ("base", "adapter"):
            bar = progress.add_task(
                f"answering {len(held_out)} held-out messages: {name}", total=len(held_out)
            )
            chosen = base.model if name == "base" else model
            with model.disable_adapter() if name == "base" else nullcontext():
                found[name] = evaluate.evaluate(
                    base,
                    chosen,
                    held_out,
                    encoder,
                    METRICS,
                    max_new_tokens=MAX_NEW_TOKENS,
                    on_progress=lambda n, bar=bar: progress.update(bar, completed=n),
                )
    return found["base"], found["adapter"]


def table(before: Evaluation, after: Evaluation) -> Table:
    """Base against adapter, in percent with 95 % intervals."""
    grid = Table(title=f"{len(after.records)} held-out messages, 95 % intervals")
    for column in ("", "base", "adapter", "gain (paired)"):
        grid.add_column(column, justify="left" if not column else "right")
    for metric in METRICS:
        gain = evaluate.paired(
            [record.scores[metric] for record in before.records],
            [record.scores[metric] for record in after.records],
        )
        grid.add_row(
            metric.replace("_", " "),
            percent(before.metrics[metric]),
            percent(after.metrics[metric]),
            percent(gain),
        )
    return grid


def percent(estimate: Estimate) -> str:
    """`84 % (71 to 93)`."""
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:.0f} % ({low:.0f} to {high:.0f})"


def system_message(recipe: TrainRecipe) -> str:
    """What every row of the data tells the model first."""
    assert isinstance(recipe.data.train, str)
    with Path(recipe.data.train).open(encoding="utf-8") as file:
        return json.loads(file.readline())["messages"][0]["content"]


def say(line: str) -> None:
    """One line as it is: data may hold what rich takes for markup."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def main(overrides: Overrides = None) -> None:
    """Search, fine-tune, evaluate, merge and serve the demo adapter."""
    demo(overrides or [])


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    sys.exit(command.run(app))
