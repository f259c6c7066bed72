"""A run without a model: `python fake_run.py RECIPE ADAPTER STEP_S` does what `python -m training`
does to a run's directory, and publishes copies of a ready-made adapter. With the file of a search
it does as `python -m tune_spaces` does, with two trials."""

import json
import shutil
import sys
import time
from pathlib import Path

from cluster import ownership, storage
from training.events import EventLog

STEPS = 6
EVERY = 2


def main(recipe: dict, adapter: Path, step_s: float) -> int:
    run_dir = Path(recipe["storage"]) / recipe["name"]
    with ownership.RunLock(run_dir):
        stop = run_dir / "stop-requested"  # loop.stop_file, without torch
        stop.unlink(missing_ok=True)
        events = EventLog(run_dir / "events.jsonl")
        place = run_dir / "checkpoints" / "fake-step"
        storage.make_directory(place.parent)
        done = int(place.read_text()) if place.exists() else 0
        if not Path(recipe["data"]["train"]).exists():
            events.write("failed", code="invalid_training_file", message="no file")
            return 1
        if not adapter.exists():
            events.write("failed", code="storage_error", message=f"{adapter}: no such directory")
            return 1
        step = done
        events.write("started", from_step=done, num_steps=STEPS, attempt=1)
        if recipe["data"].get("eval"):
            events.write("warning", message=f"{recipe['data']['train']}:3 is cut")
        for step in range(done + 1, STEPS + 1):
            time.sleep(step_s)
            loss = 2.0 / step
            events.write(
                "step", step=step, num_steps=STEPS, loss=loss, lr=1e-3, step_s=step_s,
                train_mean_token_accuracy=0.5,
            )  # fmt: skip
            is_asked = stop.exists()
            if step % EVERY == 0 or is_asked:
                if recipe["data"].get("eval"):
                    events.write("eval", step=step, loss=loss + 0.1, valid_mean_token_accuracy=0.25)
                publish(adapter, run_dir / "adapters" / f"step-{step:06d}")
                storage.write_file(place, str(step).encode())
                events.write("checkpoint", step=step)
            if is_asked:
                break
        publish(adapter, run_dir / "adapter")
        was_stopped = step < STEPS
        events.write("finished", steps=step, was_stopped=was_stopped, real_tokens=100 * step)
        return 130 if was_stopped else 0


def search(recipe: dict, adapter: Path, step_s: float) -> int:
    directory = Path(recipe["storage"]) / recipe["name"]
    with ownership.RunLock(directory):
        storage.write_file(directory / "config.json", b"{}")
        events = EventLog(directory / "events.jsonl")
        events.write("started", metric=recipe["search"]["metric"], trials=2, budget=100)
        if not Path(recipe["data"]["train"]).exists():
            events.write("failed", code="invalid_training_file", message="no file")
            return 1
        for tokens in (50, 100):
            for trial, rank in (("aaa", 8), ("bbb", 16)):
                time.sleep(step_s)
                value = 2.0 / rank + 10 / tokens
                events.write(
                    "result", trial=trial, supervised_tokens=tokens, step=tokens // 10,
                    num_steps=10, rank=rank, learning_rate=6e-4, train_loss=value,
                    eval_loss=value, value=value, reason="", is_finished=tokens == 100,
                )  # fmt: skip
            if tokens == 50:
                events.write("trial_failed", trial="ccc", message="its process died")
        publish(adapter, directory / "best")
        storage.write_file(directory / "trials.csv", b"trial,rank\naaa,8\nbbb,16\n")
        result = {
            "best_trial": "bbb", "best_config": {"lora.rank": 16}, "learning_rate": 6e-4,
            "best_metric": 0.225, "base_metric": 3.0, "trials": 3, "real_tokens": 400,
        }  # fmt: skip
        storage.write_file(directory / "result.json", json.dumps(result).encode())
        return 0


def publish(source: Path, final: Path) -> None:
    if final.exists():
        return
    storage.make_directory(final.parent)
    temporary = final.parent / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    temporary.rename(final)


if __name__ == "__main__":
    chosen = json.loads(Path(sys.argv[1]).read_text())
    act = search if "search" in chosen else main
    sys.exit(act(chosen, Path(sys.argv[2]), float(sys.argv[3])))
