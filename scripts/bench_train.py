"""Training throughput and peak memory, side by side with the recipes that people use today.

usage: python scripts/bench_train.py DATA.jsonl [--examples 64] [--model demo] [--contenders ...]
  loray     this project's loop in one process, int8
  ray       the same through Ray Train, as `loray train` runs it
  seed      HF Trainer + PEFT on int8: gradient checkpointing, padded batches of 8, full logits
  trl       TRL's SFTTrainer with packing (on an fp32 base: with int8 it computes in bf16, which
            CPUs without bf16 units do not finish)
Every contender runs in a process of its own on the same examples, encoded once by this project,
in the same order: one epoch, rank 8, learning rate 3e-4, linear, no warm-up. Prints a table of
real (non-padding) tokens a second over the training steps and of peak resident memory.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ("loray", "ray", "seed", "trl")
BATCH = 8


def main() -> None:
    """Run the contenders one after the other and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("data", type=Path, help="prompt/completion rows, or any format we read")
    parser.add_argument("--examples", type=int, default=64, help="rows taken from the data")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(RUN[options.one](options.work)))
        return
    with tempfile.TemporaryDirectory(prefix="loray-bench-") as name:
        work = Path(name)
        prepare(options, work)
        rows = []
        for contender in options.contenders:
            print(f"running {contender} ...", file=sys.stderr, flush=True)
            rows.append({"contender": contender, **run_alone(contender, options.data, work)})
        print_table(rows)


def prepare(options: argparse.Namespace, work: Path) -> None:
    """Write recipe.json and the encoded examples, in training order, for all contenders."""
    from transformers import AutoTokenizer

    from cluster import config
    from training import dataset, model
    from training.config import TrainRecipe

    rows = options.data.read_text(encoding="utf-8").splitlines()[: options.examples]
    (work / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    tree = {
        "name": "bench",
        "storage": str(work / "runs"),
        "model": {"base": options.model, "quantization": "int8"},
        "data": {
            "train": str(work / "train.jsonl"),
            "max_length": options.max_length,
            "on_bad_row": "skip",
        },
        "lora": {"rank": 8},
        "optim": {
            "learning_rate": 3e-4,
            "warmup": 0,
            "epochs": 1,
            "global_batch_size": BATCH,
        },
        "log": {"to": []},
    }
    recipe = config.build(TrainRecipe, tree, where="bench")
    (work / "recipe.json").write_text(json.dumps(tree))
    directory = model.resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    data = dataset.load(recipe, tokenizer, tokenizer.eos_token_id, vocab_size=len(tokenizer))
    assert data.train is not None
    batches = dataset.SetBatches(data.train, recipe)
    encoded = [e for step in range(batches.num_steps) for _, e in batches.batch(step)]
    examples = [
        {"input_ids": list(map(int, e.input_ids)), "labels": list(map(int, e.labels))}
        for e in encoded
    ]
    body = {"base": str(directory), "examples": examples}
    (work / "examples.json").write_text(json.dumps(body))
    lengths = sorted(len(e["input_ids"]) for e in examples)
    print(
        f"{len(examples)} examples, {sum(lengths)} real tokens, longest {lengths[-1]}, median "
        f"{lengths[len(lengths) // 2]}, {data.train.facts.num_bad} rows left out",
        file=sys.stderr,
    )


def run_alone(contender: str, data: Path, work: Path) -> dict[str, Any]:
    """One contender in a fresh process; its last line of output is its result."""
    command = [sys.executable, __file__, str(data), "--one", contender, "--work", str(work)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, env=environment, timeout=3600
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_loray(work: Path) -> dict[str, Any]:
    """This project's loop in this process."""
    import torch

    from cluster import config
    from training import worker
    from training.config import TrainRecipe
    from training.events import EventReader
    from training.strategy import Workers

    tree = json.loads((work / "recipe.json").read_text())
    recipe = config.build(TrainRecipe, {**tree, "name": "loray"}, where="bench")
    run_dir = Path(recipe.storage) / recipe.name
    run_dir.mkdir(parents=True)
    worker.run(recipe, run_dir, workers=Workers(), device=torch.device("cpu"), workers_here=1)
    events = list(EventReader(run_dir / "events.jsonl").read())
    losses = [event.number("loss") for event in events if event.kind == "step"]
    return summary(events[-1].number("real_tokens"), events[-1].number("train_wall_s"), losses)


def run_ray(work: Path) -> dict[str, Any]:
    """The same through Ray Train; its memory is the worker's."""
    from cluster import config
    from training import run
    from training.config import TrainRecipe

    tree = json.loads((work / "recipe.json").read_text())
    recipe = config.build(TrainRecipe, {**tree, "name": "ray"}, where="bench")
    losses: list[float] = []

    def watch(event: Any) -> None:
        if event.kind == "step":
            losses.append(event.number("loss"))

    result = run.train(recipe, say=lambda _: None, watch=watch)
    row = summary(result["real_tokens"], result["train_wall_s"], losses)
    return {**row, "peak_mb": result["peak_rss_bytes"] / 1e6}


def run_seed(work: Path) -> dict[str, Any]:
    """The 2023 recipe: HF Trainer, PEFT's prepare_model_for_kbit_training, padded batches."""
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training
    from torch.utils.data import SequentialSampler
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    body = json.loads((work / "examples.json").read_text())
    examples: Any = [{**e, "attention_mask": [1] * len(e["input_ids"])} for e in body["examples"]]
    base = AutoModelForCausalLM.from_pretrained(
        body["base"],
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.float16,
        device_map={"": "cpu"},
    )
    model = get_peft_model(
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=True), peer_lora()
    )
    model.config.use_cache = False

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(examples)

    collator = DataCollatorForSeq2Seq(
        AutoTokenizer.from_pretrained(body["base"]),
        pad_to_multiple_of=8,
        return_tensors="pt",
        padding=True,
    )
    arguments = TrainingArguments(per_device_train_batch_size=BATCH, **peer_arguments())
    trainer = InOrder(model=model, train_dataset=examples, args=arguments, data_collator=collator)
    return run_trainer(trainer, examples)


def run_trl(work: Path) -> dict[str, Any]:
    """TRL's SFTTrainer with packing into rows of 1,024 tokens."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    body = json.loads((work / "examples.json").read_text())
    examples = [
        {
            "input_ids": e["input_ids"],
            "completion_mask": [int(label != -100) for label in e["labels"]],
        }
        for e in body["examples"]
    ]
    arguments = SFTConfig(
        per_device_train_batch_size=2, packing=True, max_length=1024, **peer_arguments()
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(body["base"], dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(body["base"]),
        train_dataset=datasets.Dataset.from_list(examples),
        peft_config=peer_lora(),
        args=arguments,
    )
    return run_trainer(trainer, examples)


def peer_lora() -> Any:
    """The adapter of every peer: that of the recipe."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear"
    )


def peer_arguments() -> dict[str, Any]:
    """Trainer arguments that every peer shares."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "num_train_epochs": 1,
        "learning_rate": 3e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }


def run_trainer(trainer: Any, examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Train with a peer's trainer, timed around its train() alone."""
    real = sum(len(e["input_ids"]) for e in examples)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return summary(real, seconds, losses)


def summary(real_tokens: float, seconds: float, losses: list[float]) -> dict[str, Any]:
    """What every contender reports."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 * 1.048576
    return {
        "tokens_per_s": real_tokens / seconds,
        "seconds": seconds,
        "peak_mb": peak,
        "losses": losses,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """A Markdown table, each figure also as a ratio to the first contender's."""
    import bitsandbytes
    import peft
    import torch
    import transformers

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}, bitsandbytes {bitsandbytes.__version__}"
    )
    print("| contender | real tokens/s | ours / theirs | peak memory | ours / theirs | losses |")
    print("|---|---|---|---|---|---|")
    first = next(row for row in rows if "error" not in row)
    for row in rows:
        if "error" in row:
            print(f"| {row['contender']} | failed: {row['error']} | | | | |")
            continue
        losses = ", ".join(f"{loss:.3f}" for loss in row["losses"][:8])
        print(
            f"| {row['contender']} | {row['tokens_per_s']:.1f} "
            f"| {first['tokens_per_s'] / row['tokens_per_s']:.2f} "
            f"| {row['peak_mb']:.0f} MB | {first['peak_mb'] / row['peak_mb']:.2f} | {losses} |"
        )


RUN = {"loray": run_loray, "ray": run_ray, "seed": run_seed, "trl": run_trl}

if __name__ == "__main__":
    main()
