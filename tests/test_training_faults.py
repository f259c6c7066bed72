"""What goes wrong below a run, without Ray: memory, numbers, disks, damaged and torn commits."""

import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chaos
import numpy as np
import pytest
import torch
from runs import adapter_bytes, events_of, make_recipe, run_dir_of, train
from safetensors.numpy import load_file

from cluster.errors import ResourceError, StorageError
from training import checkpoint, loop, memory
from training.config import TrainRecipe
from training.objective import Objective
from training.packing import MicroBatch

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("nothing_left")]

ROOT = Path(__file__).resolve().parent.parent


def losses(recipe: TrainRecipe) -> list[float]:
    return [event.number("loss") for event in events_of(recipe, "step")]


def warnings_of(recipe: TrainRecipe) -> list[str]:
    return [event.text("message") for event in events_of(recipe, "warning")]


def limit_memory(
    patch: pytest.MonkeyPatch, tokens: int, error: Callable[[], Exception]
) -> list[int]:
    """Have a forward pass over more than `tokens` run out of memory; the sizes that fitted."""
    fitted: list[int] = []
    real = Objective.measure

    def measure(self: Objective, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        if batch.input_ids_BL.numel() > tokens:
            raise error()
        fitted.append(batch.input_ids_BL.numel())
        return real(self, batch)

    patch.setattr(Objective, "measure", measure)
    return fitted


def allocator_error() -> Exception:
    """What PyTorch really raises on a CPU."""
    try:
        torch.empty(1 << 58, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("so much memory is there")


ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": allocator_error,
    "python": MemoryError,
}


@pytest.mark.parametrize("kind", sorted(ERRORS))
def test_where_memory_ends_the_step_is_taken_in_smaller_micro_batches(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    settings: dict[str, Any] = {
        "lora": {"rank": 4, "dropout": 0.1},
        "data": {"eval": str(tmp_path / "train.jsonl")},
        "optim": {"learning_rate": 1e-2, "max_steps": 6, "global_batch_size": 12},
        "memory": {"micro_batch_tokens": 1024, "gradient_checkpointing": "off"},
    }
    whole = make_recipe(tmp_path, tiny_base, name="whole", **settings)
    train(whole)
    short = make_recipe(tmp_path, tiny_base, name="short", **settings)
    fitted = limit_memory(monkeypatch, 128, ERRORS[kind])
    assert train(short).kind == "finished"
    assert max(fitted) <= 128
    assert np.allclose(losses(short), losses(whole), atol=1e-6, rtol=0)
    ours, theirs = (
        load_file(run_dir_of(recipe) / "adapter" / checkpoint.WEIGHTS) for recipe in (short, whole)
    )
    assert max(float(np.abs(ours[n] - theirs[n]).max()) for n in ours) < 1e-5
    assert len(warnings_of(short)) == 1
    assert "memory did not suffice on 1 of 1 workers" in warnings_of(short)[0]
    assert warnings_of(whole) == []


def test_where_not_even_one_example_fits_the_error_says_what_to_lower(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, tiny_base, memory={"gradient_checkpointing": "off"})
    train(make_recipe(tmp_path, tiny_base, name="plan", memory={"gradient_checkpointing": "off"}))
    run_dir_of(recipe).mkdir(parents=True)
    shutil.copy(tmp_path / "runs" / "plan" / "memory.json", run_dir_of(recipe))
    real = Objective.measure

    def measure(self: Objective, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(Objective, "measure", measure)
    with pytest.raises(ResourceError, match=r"one example .*Lower data\.max_length"):
        train(recipe)
    assert events_of(recipe)[-1].kind == "failed"
    assert not losses(recipe)


def test_other_errors_are_not_taken_for_memory() -> None:
    assert all(memory.is_short(make()) for make in ERRORS.values())
    assert not memory.is_short(RuntimeError("Connection closed by peer"))
    assert not memory.is_short(ValueError("shape"))


_PAIR = """
import json, math, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook
from runs import make_recipe, run_dir_of
from training import worker
from training.objective import Objective
from training.optimizer import Replicated, gradients
from training.strategy import Workers
rank, directory, base = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2
)
steps = 0
def count(*_):
    global steps
    steps += 1
register_optimizer_step_post_hook(count)
real_reduce, real_measure = Replicated.reduce, Objective.measure
def poisoned(value, place):
    def reduce(self, *sums):
        if rank == 1 and steps == 3 and place == "loss":
            sums[0].add_(value)
        if rank == 1 and steps == 3 and place == "gradient":
            gradients(self._parameters)[0].view(-1)[0] = value
        real_reduce(self, *sums)
    return reduce
def short(self, batch):
    if rank == 1 and batch.input_ids_BL.numel() > 128 and torch.is_grad_enabled():
        raise torch.OutOfMemoryError("CUDA out of memory")
    return real_measure(self, batch)
told = {}
def run(name):
    global steps
    steps = 0
    recipe = make_recipe(
        directory, base, name=name, optim={"max_steps": 6, "global_batch_size": 16},
        memory={"micro_batch_tokens": 512, "gradient_checkpointing": "off"},
    )
    run_dir = run_dir_of(recipe)
    run_dir.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    try:
        worker.run(
            recipe, run_dir, workers=Workers(rank=rank, size=2), device=torch.device("cpu"),
            workers_here=2,
        )
        told[name] = ["finished", "", steps]
    except Exception as error:
        told[name] = [type(error).__name__, str(error), steps]
    dist.barrier()
for place in ("loss", "gradient"):
    for value in ("nan", "inf"):
        Replicated.reduce = poisoned(float(value), place)
        run(f"{place}{value}")
Replicated.reduce = real_reduce
run("whole")
dist.barrier()
if rank == 0:
    (directory / "runs" / "short").mkdir(exist_ok=True)
    plan = (directory / "runs" / "whole" / "memory.json").read_text()
    (directory / "runs" / "short" / "memory.json").write_text(plan)
Objective.measure = short
run("short")
print(json.dumps(told))
"""


def test_a_number_that_is_not_finite_on_one_worker_stops_all_and_memory_of_one_concerns_no_other(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Four ways to be not finite; then one worker alone that runs out of memory."""
    make_recipe(tmp_path, tiny_base)  # writes the rows
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", _PAIR, str(rank), str(tmp_path), str(tiny_base)],
            cwd=ROOT / "tests",
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [json.loads(one.communicate(timeout=120)[0].splitlines()[-1]) for one in pair]
    finally:
        for one in pair:
            one.kill()
            one.communicate()
    for place in ("loss", "gradient"):
        for value in ("nan", "inf"):
            name = f"{place}{value}"
            for kind, message, steps in (one[name] for one in told):
                assert kind == "TrainingError", message
                assert message.startswith("step 4: loss ")
                assert steps == 3, "the optimiser has stepped"
            run_dir = tmp_path / "runs" / name
            kept = checkpoint.find_latest_valid(run_dir)
            assert kept is not None
            assert kept.name == "step-000002"
            tensors = load_file(kept / checkpoint.WEIGHTS)
            assert all(np.isfinite(tensor).all() for tensor in tensors.values())
            assert not (run_dir / "adapter").exists()
    assert [one[name][0] for one in told for name in ("whole", "short")] == ["finished"] * 4
    whole, short = (make_recipe(tmp_path, tiny_base, name=name) for name in ("whole", "short"))
    assert np.allclose(losses(short), losses(whole), atol=1e-6, rtol=0)
    assert any("1 of 2 workers" in message for message in warnings_of(short))


def flip(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def cut(path: Path, dice: random.Random) -> None:
    os.truncate(path, dice.randrange(path.stat().st_size))


def swap_inside(path: Path, dice: random.Random) -> None:
    others = sorted(other for other in path.parent.iterdir() if other != path)
    other = dice.choice(others)
    path.rename(path.with_name(".swap"))
    other.rename(path)
    path.with_name(".swap").rename(other)


def swap_with_older(path: Path, dice: random.Random) -> None:
    shutil.copy(path.parent.parent / "step-000002" / path.name, path)


def swap_whole(path: Path, dice: random.Random) -> None:
    shutil.rmtree(path.parent)
    shutil.copytree(path.parent.parent / "step-000002", path.parent)


def blank(path: Path, dice: random.Random) -> None:
    """A block of zeros, as after a power cut on a file system without a journal of data."""
    data = bytearray(path.read_bytes())
    start = dice.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)


def lose(path: Path, dice: random.Random) -> None:
    path.unlink()


DAMAGES = (flip, flip, flip, cut, cut, swap_inside, swap_with_older, swap_whole, blank, lose)


def test_damaged_and_swapped_files_are_all_noticed_and_the_checkpoint_before_is_used(
    tmp_path: Path, tiny_base: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_base, optim={"max_steps": 4})
    train(recipe)
    run_dir = run_dir_of(recipe)
    newest = checkpoint.directory(run_dir, 4)
    pristine = tmp_path / "pristine"
    shutil.copytree(newest, pristine)
    names = sorted(path.name for path in newest.iterdir())
    dice = random.Random(0)
    num_faults = num_same = 0
    while num_faults < 1000:
        victim = newest / dice.choice(names)
        damage = DAMAGES[num_faults % len(DAMAGES)]
        damage(victim, dice)
        is_same = all(
            (newest / name).exists()
            and (newest / name).read_bytes() == (pristine / name).read_bytes()
            for name in names
        )
        told: list[str] = []
        found = checkpoint.find_latest_valid(run_dir, on_broken=told.append)
        assert found is not None
        if is_same:  # the older file was the same, or zeros stood where zeros were written
            assert found == newest
            num_same += 1
        else:
            assert found.name == "step-000002", (damage.__name__, victim.name)
            assert "step-000004" in told[0]
            num_faults += 1
            shutil.rmtree(next((run_dir / "checkpoints").glob(".broken-*")))
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(pristine, newest)
    print(f"figure damage: {num_faults} of {num_faults} noticed; {num_same} more changed no byte")


@pytest.mark.parametrize("which", ["best", "both"])
def test_a_checkpoint_that_is_damaged_before_it_becomes_the_adapter_does_not_become_it(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """The best one is left out with a warning; of the last one the run begins again before it."""
    settings: dict[str, Any] = {
        "data": {"eval": str(tmp_path / "train.jsonl")},
        "optim": {"learning_rate": 0.5, "schedule": "constant", "max_steps": 60},
        "evaluation": {"every_steps": 2, "early_stopping": 2},
    }
    whole = make_recipe(tmp_path, tiny_base, name="whole", **settings)
    end = train(whole)
    best, last_step = int(end.number("adapter_step")), int(end.number("steps"))
    assert best < last_step
    recipe = make_recipe(tmp_path, tiny_base, name="hurt", **settings)
    real = loop.fit

    def fit(job: loop.Job) -> checkpoint.State:
        state = real(job)
        for step in [best] if which == "best" else [best, last_step]:
            flip(checkpoint.directory(job.run_dir, step) / checkpoint.WEIGHTS, random.Random())
        return state

    monkeypatch.setattr(loop, "fit", fit)
    if which == "both":
        with pytest.raises(StorageError, match="set aside; the same command goes on"):
            train(recipe)
        monkeypatch.undo()
    last = train(recipe)
    assert last.number("adapter_step") == last.number("steps") == last_step
    kept, whole_last = (
        checkpoint.directory(run_dir_of(one), last_step) / checkpoint.WEIGHTS
        for one in (recipe, whole)
    )
    assert adapter_bytes(recipe) == kept.read_bytes() == whole_last.read_bytes()
    assert any(f"step-{best:06d}" in message for message in warnings_of(recipe))


_KILLS = """
import json, os, random, resource, signal, sys, time
from contextlib import suppress
from pathlib import Path
import torch
from cluster import ownership, storage
from training import checkpoint, model
from training.checkpoint import State
from training.config import LoraConfig, ModelConfig, OptimConfig
from training.optimizer import Replicated, loss_scaler
from training.strategy import Workers
run_dir, base, num_random = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
loaded = model.load_base(ModelConfig(base=base, quantization="none"), device=torch.device("cpu"))
peft, _ = model.attach_lora(loaded, LoraConfig(rank=4), seed=0)
parameters = model.adapter_parameters(peft)
optimizer = Replicated(
    parameters, OptimConfig(), scaler=loss_scaler(loaded), workers=Workers()
)
run_dir.mkdir(parents=True)

def write(step, value):
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(value)
            parameter.grad = torch.full_like(parameter, value)
    optimizer.step(0.0)

def child(end, how):
    attempt = ownership.next_attempt(run_dir)
    if (run_dir / "checkpoints").is_dir():
        storage.clean_leftovers(run_dir / "checkpoints")
    found = checkpoint.find_latest_valid(run_dir)
    state = State()
    if found:
        state, packed = checkpoint.restore(found, peft)
        optimizer.load(packed)
        assert all(bool((p == state.step).all()) for p in parameters.values()), "torn weights"
    os.write(end, f"from {state.step}\\n".encode())
    how()
    while True:
        state = State(step=state.step + 1, applied_steps=state.step + 1)
        write(state.step, float(state.step))
        checkpoint.save(run_dir, peft, optimizer.pack(), state, attempt=attempt, info={})
        os.write(end, f"done {state.step}\\n".encode())
        checkpoint.prune(run_dir, keep=2, best_step=None)
        os.write(end, f"pruned {state.step}\\n".encode())

def attempt(how, sleep_s=None, rounds=None):
    '''Fork one that saves; kill it after a time, or let it die; what it has said.'''
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            child(writing, how)
        except BaseException as error:
            os.write(writing, f"error {type(error).__name__} {error}\\n".encode())
        os._exit(1)
    os.close(writing)
    said = b""
    killed = False
    while True:
        block = os.read(reading, 65536)
        if not block:
            break
        said += block
        if b"from" in said and sleep_s is not None and not killed:
            time.sleep(sleep_s)
            os.kill(pid, signal.SIGKILL)
            killed = True
        if rounds is not None and said.count(b"pruned") >= rounds and not killed:
            os.kill(pid, signal.SIGKILL)
            killed = True
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    lines = [line.split(b" ", 1) for line in said.splitlines()]
    assert not any(kind == b"error" for kind, _ in lines), said
    assert lines and lines[0][0] == b"from", (said, status)
    return int(lines[0][1]), max([int(n) for kind, n in lines if kind == b"done"], default=None)

acknowledged = 0
counts = {"random": 0, "point": 0, "byte": 0}
def check(result):
    global acknowledged
    began, done = result
    assert began in (acknowledged, acknowledged + 1), (began, acknowledged)
    acknowledged = began if done is None else done
    assert not list((run_dir / "checkpoints").glob(".broken-*")), "a half checkpoint was found"

dice = random.Random(0)
started = time.monotonic()
check(attempt(lambda: None, rounds=20))
each_s = (time.monotonic() - started) / 20
for _ in range(num_random):
    check(attempt(lambda: None, sleep_s=dice.uniform(0, 4 * each_s)))
    counts["random"] += 1

names = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir")
def points(stop_at):
    '''Die at the so-manieth look at the disk: before each, and before and after each fsync.'''
    def how():
        seen = 0
        def pass_by():
            nonlocal seen
            seen += 1
            if seen == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(lambda event, _: pass_by() if event in names else None)
        real = os.fsync
        def fsync(descriptor):
            pass_by()
            real(descriptor)
            pass_by()
        os.fsync = fsync
    return how
stop_at = 0
while True:
    stop_at += 1
    result = attempt(points(stop_at), rounds=1)
    check(result)
    counts["point"] += 1
    if result[1] is not None and result[1] > result[0] + 0 and stop_at > 20:
        if not (run_dir / "checkpoints" / f"step-{result[1] - 2:06d}").exists():
            break  # it lived through a whole save and prune

def limited(num_bytes):
    def how():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    return how
newest = checkpoint.find_latest_valid(run_dir)
largest = max(path.stat().st_size for path in newest.iterdir())
for num_bytes in range(0, largest, max(1, largest // 40)):
    check(attempt(limited(num_bytes), rounds=1))
    counts["byte"] += 1
print(json.dumps({**counts, "last": acknowledged, "commit_ms": round(each_s * 1e3, 1)}))
"""


@pytest.mark.timeout(900)
def test_a_save_that_is_killed_at_any_point_or_time_leaves_the_newest_whole_checkpoint(
    tmp_path: Path, tiny_base: Path
) -> None:
    """At each open, rename, mkdir, remove and fsync, at byte k of a write, and at random times."""
    words = [sys.executable, "-c", _KILLS, str(tmp_path / "run"), str(tiny_base)]
    done = subprocess.run(
        [*words, str(chaos.times(40, 200))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["random"] == chaos.times(40, 200)
    assert counts["point"] > 40
    assert counts["byte"] >= 40
    print(f"figure kills of a save: {counts}")


def whole_run(directory: Path, base: Path) -> bytes:
    recipe = make_recipe(directory, base, name="whole")
    train(recipe)
    return adapter_bytes(recipe)


def error_of(recipe: TrainRecipe) -> str:
    """Run a recipe; the message of the storage's error that ended it, empty where none did."""
    try:
        train(recipe)
    except (StorageError, ResourceError) as error:
        return str(error)
    return ""


def assert_kept_and_goes_on(recipe: TrainRecipe, before: int, whole: bytes) -> None:
    """Whatever was committed verifies, and the same run comes to the same end."""
    found = checkpoint.find_latest_valid(run_dir_of(recipe), on_broken=pytest.fail)
    assert (0 if found is None else checkpoint.step_of(found)) >= before
    assert train(recipe).kind == "finished"
    assert adapter_bytes(recipe) == whole


def test_a_disk_that_is_full_at_any_byte_keeps_what_was_committed(
    tmp_path: Path, tiny_base: Path
) -> None:
    """From no room at all to room for the whole run."""
    whole = whole_run(tmp_path, tiny_base)
    block = os.sysconf("SC_PAGE_SIZE")
    need = sum(p.stat().st_size for p in (tmp_path / "runs").rglob("*") if p.is_file())
    rooms = np.linspace(0, 4 * need, chaos.times(6, 60)).astype(int) // block * block
    num_failed = 0
    with chaos.small_disk(tmp_path / "disk", 8 << 20) as disk:
        for number, room in enumerate(rooms):
            recipe = make_recipe(tmp_path, tiny_base, name=f"run{number}", storage=str(disk))
            run_dir_of(recipe).mkdir()
            filler = chaos.fill(disk, leave=int(room))
            told = error_of(recipe)
            if told:
                assert "the disk or quota is full" in told or "checkpoints of the adapter" in told
                num_failed += 1
            before = max([0, *(int(e.number("step")) for e in events_of(recipe, "checkpoint"))])
            filler.unlink()
            assert_kept_and_goes_on(recipe, before, whole)
            shutil.rmtree(run_dir_of(recipe))
    assert 0 < num_failed < len(rooms)
    print(f"figure full disk: {len(rooms)} sizes, {num_failed} runs ended by it, all resumed")


def test_an_io_error_at_any_fsync_keeps_what_was_committed(tmp_path: Path, tiny_base: Path) -> None:
    whole = whole_run(tmp_path, tiny_base)
    dice = random.Random(0)
    real = os.fsync
    fail_at = range(1, 200) if chaos.IS_FULL else sorted(dice.sample(range(1, 34), 5))
    num_failed = 0
    for number in fail_at:
        recipe = make_recipe(tmp_path, tiny_base, name=f"run{number}")
        calls = 0

        def fsync(descriptor: int, number: int = number) -> None:
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(descriptor)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            told = error_of(recipe)
        if told:
            assert "Input/output error" in told
            num_failed += 1
        if calls < number:
            break
        before = max([0, *(int(e.number("step")) for e in events_of(recipe, "checkpoint"))])
        assert_kept_and_goes_on(recipe, before, whole)
        shutil.rmtree(run_dir_of(recipe))
    assert num_failed >= 4
    print(f"figure EIO: at each of {num_failed} fsyncs; all kept their checkpoints and resumed")


_LIMITED = """
import sys
from pathlib import Path
import torch
procs, directory, base = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
import os
procs.write_text(str(os.getpid()))
from runs import make_recipe, train
torch.set_num_threads(1)
recipe = make_recipe(
    directory, base, optim={"max_steps": 2, "global_batch_size": 2048}, data={"max_length": 128},
    memory={"micro_batch_tokens": 200000, "gradient_checkpointing": "off"},
)
print(train(recipe).kind)
"""


@pytest.fixture
def memory_group() -> Any:
    """A cgroup whose processes may have 0.8 GB in all; its cgroup.procs."""
    root = Path("/sys/fs/cgroup")
    version_1 = root / "memory" / "memory.limit_in_bytes"
    group = (root / "memory" if version_1.exists() else root) / f"loray-{os.getpid()}"
    limit = "memory.limit_in_bytes" if version_1.exists() else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(800 << 20))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield group / "cgroup.procs"
    group.rmdir()


@chaos.full
@pytest.mark.timeout(900)
def test_a_worker_that_the_kernel_kills_for_memory_comes_through_with_smaller_micro_batches(
    tmp_path: Path, tiny_base: Path, memory_group: Path
) -> None:
    """Each attempt is a process under a real limit; the policy that Ray Train asks decides."""
    from ray.train import FailureConfig
    from ray.train.v2.api.exceptions import WorkerGroupError
    from runs import write_rows

    from training.failures import FailurePolicy

    write_rows(tmp_path / "train.jsonl", num_rows=2048)
    run_dir = tmp_path / "runs" / "run"
    run_dir.mkdir(parents=True)
    policy = FailurePolicy(FailureConfig(max_failures=10), run_dir)
    sizes = []
    for _ in range(10):
        done = subprocess.run(
            [sys.executable, "-c", _LIMITED, str(memory_group), str(tmp_path), str(tiny_base)],
            cwd=ROOT / "tests",
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        stored = memory.stored(run_dir)
        sizes.append(None if stored is None else stored.micro_batch_tokens)
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr[-2000:]
        policy.make_decision(WorkerGroupError("died", {0: RuntimeError("End of file")}))
        assert memory.was_killed(run_dir)
    assert done.stdout.strip() == "finished"
    assert len(sizes) > 1
    recipe = make_recipe(tmp_path, tiny_base)
    assert any("killed for memory" in message for message in warnings_of(recipe))
    assert all(math.isfinite(loss) for loss in losses(recipe))
    print(f"figure kernel kills: micro-batches of {sizes} tokens, the last one finished")
