"""What a search costs: the same trials on one shared base, one by one, and under plain Ray Tune.

usage: python scripts/bench_search.py [DATA.jsonl] [--trials 8] [--steps 8] [--batch 2] ...
  packed    `loray search`: all trials share one int8 base and its passes
  solo      `loray search search.mode=solo`: each trial is an ordinary training job of this project
  tune      plain Ray Tune: a process for each trial with HF Trainer and PEFT on an int8 base of its
            own (prepare_model_for_kbit_training, padded batches), two at a time on a core each
The same ranks, learning rates, examples in the same order and numbers of tokens for all, no early
stopping, one evaluation at the end of each trial. Prints wall time from the command to its end,
the peak of the memory of all processes together (proportional set size, so that shared pages count
once) and the trials' losses. `--scaling` prints instead how one bench grows with its seats.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CONTENDERS = ("packed", "solo", "tune")
RANKS = (8, 16, 32, 64)
RATES = (2e-4, 5e-4, 1e-3, 2e-3)
SCALE = (1, 2, 4, 8, 16)
PASSES = 4
SAMPLE_S = 0.5


def main() -> None:
    """Run the contenders one after the other, or the scaling of one bench."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    recipes = ROOT / "training" / "recipes"
    parser.add_argument("data", type=Path, nargs="?", default=recipes / "tickets_train.jsonl")
    parser.add_argument("--eval", type=Path, default=recipes / "tickets_test.jsonl")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seats", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps of each trial")
    parser.add_argument("--batch", type=int, default=2, help="examples of a step")
    parser.add_argument("--eval-rows", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--no-checkpointing", action="store_true", help="of the peer's activations")
    parser.add_argument("--scaling", action="store_true", help="1, 2, 4, 8 and 16 seats of a bench")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        RUN[options.one](options)
        return
    with tempfile.TemporaryDirectory(prefix="loray-bench-") as name:
        options.work = Path(name)
        for source, target, count in (
            (options.data, "train.jsonl", None),
            (options.eval, "eval.jsonl", options.eval_rows),
        ):
            rows = source.read_text(encoding="utf-8").splitlines()[:count]
            (options.work / target).write_text("\n".join(rows) + "\n", encoding="utf-8")
        if options.scaling:
            scaling(options)
            return
        found = {name: run_alone(name, options) for name in options.contenders}
        print_table(found, options)


def tree(options: argparse.Namespace) -> dict[str, Any]:
    """The search file, as a tree."""
    rows = params(options)
    return {
        "name": "bench",
        "storage": str(options.work / "runs"),
        "model": {"base": options.model, "quantization": "int8"},
        "data": {
            "train": str(options.work / "train.jsonl"),
            "eval": str(options.work / "eval.jsonl"),
            "max_length": options.max_length,
            "on_bad_row": "skip",
        },
        "optim": {"warmup": 0, "max_steps": options.steps, "global_batch_size": options.batch},
        "log": {"to": []},
        "space": {
            "lora.rank": sorted({row["lora.rank"] for row in rows}),
            "optim.learning_rate": sorted({row["optim.learning_rate"] for row in rows}),
        },
        "search": {
            "trials": options.trials,
            "seats": options.seats,
            "scheduler": "fifo",
            "searcher": "grid",
            "report_every_tokens": 10**9,  # one report, at the end
            "finalists": 1,
            "seeds": 1,
        },
    }


def params(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A grid of as many ranks and learning rates as there are trials."""
    rates = RATES[: math.ceil(options.trials / len(RANKS))]
    grid = [{"lora.rank": r, "optim.learning_rate": lr} for r in RANKS for lr in rates]
    return grid[: options.trials]


def run_alone(contender: str, options: argparse.Namespace) -> dict[str, Any]:
    """One contender in a process tree of its own, with the tree's peak memory."""
    print(f"running {contender} ...", file=sys.stderr, flush=True)
    words = [word for word in sys.argv[1:] if word != "--scaling"]
    command = [
        sys.executable, __file__, *words, "--one", contender, "--work", str(options.work)
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = str(ROOT)
    started = time.perf_counter()
    with (options.work / f"{contender}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)  # noqa: S603
        peak, over = [0], threading.Event()
        sampler = threading.Thread(target=sample, args=(process.pid, peak, over))
        sampler.start()
        status = process.wait()
        wall_s = time.perf_counter() - started
        over.set()
        sampler.join()
    if status:
        text = (options.work / f"{contender}.log").read_text(errors="replace")
        sys.exit(f"{contender} failed:\n{text[-3000:]}")
    result = json.loads((options.work / f"{contender}.json").read_text())
    return {**result, "wall_s": wall_s, "peak_bytes": peak[0]}


def sample(pid: int, peak: list[int], over: threading.Event) -> None:
    """Note the largest memory of a process and all its descendants together."""
    root = psutil.Process(pid)
    while not over.wait(SAMPLE_S):
        total = 0
        with suppress(psutil.Error):
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.Error):
                    total += process.memory_full_info().pss
        peak[0] = max(peak[0], total)


def run_search(options: argparse.Namespace) -> None:
    """This project's search, packed or solo; its trials' final losses."""
    import yaml

    from tune_spaces import record as records
    from tune_spaces.__main__ import main as door

    body = tree(options)
    body["name"] = options.one
    body["search"]["mode"] = options.one
    if options.one == "solo":
        body["search"]["seats"] = "auto"
    path = options.work / f"{options.one}.yaml"
    path.write_text(yaml.safe_dump(body))
    if door([str(path), "--json"]):
        sys.exit(1)
    found = records.read(options.work / "runs" / options.one)
    losses = {key(trial.params): trial.value for trial in found.trials}
    result = {"losses": losses, "live": found.seats, "filled": found.mean_seats_filled}
    (options.work / f"{options.one}.json").write_text(json.dumps(result))


def run_tune(options: argparse.Namespace) -> None:
    """Plain Ray Tune, as its documentation shows it: a function trainable with HF and PEFT."""
    import ray
    from ray import tune

    from cluster import session

    body = encoded(options)
    with session.connect(None, num_cpus=2):
        tuner = tune.Tuner(
            tune.with_resources(peer_trial, {"cpu": 1}),
            param_space={
                "row": tune.grid_search(params(options)),
                "body": ray.put(body),
                "batch": options.batch,
                "is_checkpointing": not options.no_checkpointing,
            },
            tune_config=tune.TuneConfig(metric="eval_loss", mode="min", max_concurrent_trials=2),
            run_config=tune.RunConfig(storage_path=str(options.work / "tune"), verbose=0),
        )
        results = tuner.fit()
    if results.num_errors:
        sys.exit(str(results.errors[0]))
    losses = {
        key(r.config["row"]): r.metrics["eval_loss"] for r in results if r.metrics and r.config
    }
    (options.work / "tune.json").write_text(json.dumps({"losses": losses, "live": 2}))


def peer_trial(config: dict[str, Any]) -> None:
    """One trial of plain Ray Tune."""
    import ray
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from ray import tune
    from torch.utils.data import SequentialSampler
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    torch.set_num_threads(1)
    body: Any = ray.get(config["body"])
    row = config["row"]
    base = AutoModelForCausalLM.from_pretrained(
        body["base"],
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.float16,
        device_map={"": "cpu"},
    )
    rank = row["lora.rank"]
    is_checkpointing = config["is_checkpointing"]
    model = get_peft_model(
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=is_checkpointing),
        LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=rank, lora_dropout=0.0,
            target_modules="all-linear",
        ),
    )  # fmt: skip
    model.config.use_cache = False

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: object = None) -> SequentialSampler:
            return SequentialSampler(body["train"])

    trainer = InOrder(
        model=model,
        train_dataset=body["train"],
        eval_dataset=body["eval"],
        data_collator=DataCollatorForSeq2Seq(
            AutoTokenizer.from_pretrained(body["base"]),
            pad_to_multiple_of=8,
            return_tensors="pt",
            padding=True,
        ),
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=config["batch"],
            per_device_eval_batch_size=8,
            num_train_epochs=1,
            learning_rate=row["optim.learning_rate"],
            save_strategy="no",
            report_to="none",
            bf16=False,
            fp16=False,
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        ),
    )
    trainer.train()
    tune.report({"eval_loss": trainer.evaluate()["eval_loss"]})


def encoded(options: argparse.Namespace) -> dict[str, Any]:
    """The examples of every step in our order, tokenised, for the peer."""
    from transformers import AutoTokenizer

    from cluster import config
    from training import dataset, model
    from training.config import TrainRecipe

    body = tree(options)
    del body["space"], body["search"]
    recipe = config.build(TrainRecipe, body, where="bench")
    directory = model.resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    data = dataset.load(recipe, tokenizer, tokenizer.eos_token_id, vocab_size=len(tokenizer))
    assert data.train is not None
    assert data.eval is not None
    batches = dataset.SetBatches(data.train, recipe)
    train = [e for step in range(batches.num_steps) for _, e in batches.batch(step)]
    return {"base": str(directory), "train": plain(train), "eval": plain(list(data.eval))}


def plain(examples: Sequence[Any]) -> list[dict[str, Any]]:
    """Examples as HF Trainer takes them."""
    return [
        {
            "input_ids": list(map(int, e.input_ids)),
            "labels": list(map(int, e.labels)),
            "attention_mask": [1] * len(e.input_ids),
        }
        for e in examples
    ]


def scaling(options: argparse.Namespace) -> None:
    """Speed and memory of one bench with 1, 2, 4, 8 and 16 seats, whose ranks are mixed."""
    import torch

    from cluster import config
    from training.config import TrainRecipe
    from tune_spaces.bench import Bench

    os.environ["HF_HUB_OFFLINE"] = "1"
    body = tree(options)
    del body["space"], body["search"]
    body["optim"]["max_steps"] = 10**6
    directory = options.work / "bench"
    directory.mkdir()
    recipe = config.build(TrainRecipe, body, where="bench")
    bench = Bench(recipe=recipe, directory=directory, device=torch.device("cpu"))
    lengths = bench.data.train.lengths if bench.data.train is not None else []
    print(
        f"examples of {min(lengths)} to {max(lengths)} tokens, mean "
        f"{sum(lengths) / len(lengths):.0f}, {options.batch} to a step"
    )
    print("| seats | real tokens/s | against one | memory | against one |")
    print("|---|---|---|---|---|")
    first: tuple[float, float] | None = None
    for count in SCALE:
        while len(bench.trials) < count:
            name = f"seat{len(bench.trials)}"
            rank = RANKS[len(bench.trials) % len(RANKS)]
            trial = config.build(TrainRecipe, {**body, "lora": {"rank": rank}}, where="bench")
            (directory / name).mkdir()
            bench.join(name, trial, directory / name)
            bench.ask(name, supervised_tokens=10**12)
        bench.turn()
        started, tokens = time.perf_counter(), 0
        for _ in range(PASSES * max(1, count // 4)):
            tokens += bench.turn()
        speed = tokens / (time.perf_counter() - started)
        memory = psutil.Process().memory_info().rss
        first = first or (speed, memory)
        print(
            f"| {count} | {speed:.0f} | {speed / first[0]:.2f} | {memory / 1e6:.0f} MB "
            f"| {memory / first[1]:.2f} |",
            flush=True,
        )


def key(row: Mapping[str, Any]) -> str:
    """A trial's parameters, the same text for all contenders."""
    return f"rank {row['lora.rank']}, lr {row['optim.learning_rate']:g}"


def print_table(found: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Two Markdown tables: cost, and each trial's final loss."""
    first = next(iter(found.values()))
    print(
        f"{options.trials} trials of {options.steps} steps of {options.batch} examples, "
        f"{os.cpu_count()} cores"
    )
    print("| contender | wall time | against the first | peak memory | live trials | for each |")
    print("|---|---|---|---|---|---|")
    for name, row in found.items():
        print(
            f"| {name} | {row['wall_s']:.0f} s | {row['wall_s'] / first['wall_s']:.2f} "
            f"| {row['peak_bytes'] / 1e6:.0f} MB | {row['live']} "
            f"| {row['peak_bytes'] / row['live'] / 1e6:.0f} MB |"
        )
    print(f"\n| trial | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for trial in first["losses"]:
        losses = " | ".join(f"{row['losses'][trial]:.6f}" for row in found.values())
        print(f"| {trial} | {losses} |")
    print(json.dumps(found))


RUN = {"packed": run_search, "solo": run_search, "tune": run_tune}

if __name__ == "__main__":
    main()
