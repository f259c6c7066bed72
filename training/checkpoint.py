"""Adapter-only checkpoints: commit, find the newest valid one, restore, prune.

A checkpoint is a loadable PEFT directory (adapter_model.safetensors, adapter_config.json) with
optimizer.safetensors and state.json beside it, committed by `cluster.storage`. There is no random
state to keep: the order of the data and dropout are functions of (seed, step).
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cluster import ownership, storage
from cluster.errors import AdapterError, StorageError, superseded
from training.model import ADAPTER
from training.optimizer import Packed

log = logging.getLogger(__name__)

_STEP = re.compile(r"^step-(\d{6,})$")
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Where a run stands after `step` optimiser steps, beside its weights."""

    step: int = 0
    applied_steps: int = 0
    """Steps in which the optimiser moved; fp16 skips one whose gradient overflows."""
    real_tokens: int = 0
    supervised_tokens: int = 0
    train_s: float = 0.0
    """Seconds spent in training steps."""
    first_loss: float | None = None
    last_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    evals_without_gain: int = 0
    scaler: Mapping[str, float] = field(default_factory=dict)
    """GradScaler state; empty unless training in fp16."""


def directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is committed."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def save(
    run_dir: Path,
    model: PeftModel,
    optimizer: Packed,
    state: State,
    *,
    attempt: int,
    info: Mapping[str, Any],
    adapter: str = ADAPTER,
) -> Path:
    """Commit a checkpoint of `state.step`; nothing is there until all of it is on disk.

    Raises StorageError on a full disk, FencedError where a newer attempt owns the run, AdapterError
    where what was written does not read back as a usable adapter.
    """
    final = directory(run_dir, state.step)
    if final.exists():  # a broken one would have been quarantined, so it is this very step
        if not ownership.is_current_attempt(run_dir, attempt):
            raise superseded(f"{final} is there already")
        return final

    def write(temporary: Path) -> None:
        write_adapter(model, temporary, adapter=adapter)
        save_file(dict(optimizer.tensors), temporary / "optimizer.safetensors")
        body = {"state": asdict(state), "optimizer": optimizer.numbers}
        (temporary / "state.json").write_text(json.dumps(body, indent=1), encoding="utf-8")
        check_adapter(temporary, model, must_have_moved=state.applied_steps > 0, adapter=adapter)

    storage.commit(
        final,
        write,
        attempt=str(attempt),
        info=dict(info),
        is_fenced=lambda: not ownership.is_current_attempt(run_dir, attempt),
    )
    return final


def adapter_directory(run_dir: Path, step: int) -> Path:
    """Where the adapter of a checkpoint is kept (`checkpoint.keep_adapters`)."""
    return run_dir / "adapters" / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's directory."""
    return int(path.name.removeprefix("step-"))


def find_latest_valid(run_dir: Path, on_broken: Callable[[str], None] = log.warning) -> Path | None:
    """The newest checkpoint that verifies; broken ones are quarantined and reported.

    This is the only source of a resume.
    """
    for step, path in sorted(_steps(run_dir).items(), reverse=True):
        try:
            storage.verify(path)
            _require_step(path, step)
        except StorageError as error:
            moved = storage.quarantine(path, str(error))
            on_broken(f"checkpoint {path.name} is damaged ({error}); moved to {moved.name}")
        else:
            return path
    return None


def restore(path: Path, model: PeftModel, *, adapter: str = ADAPTER) -> tuple[State, Packed]:
    """Load a verified checkpoint into a model of the same recipe; where it stood, what it steps by.

    Raises AdapterError where its parameters are not those of the model.
    """
    load_adapter(path, model, adapter=adapter)
    body = json.loads((path / "state.json").read_text(encoding="utf-8"))
    packed = Packed(load_file(path / "optimizer.safetensors"), body["optimizer"])
    return State(**body["state"]), packed


def adopt(source: Path, target: Path, *, step: int | None = None) -> int:
    """Give run `target` the newest valid checkpoint of run `source` in place of its own.

    step: the checkpoint to take instead, while there is one. Returns the step that was taken.
    Raises StorageError where `source` has none.
    """
    found = None
    if step is not None:
        with suppress(StorageError):
            storage.verify(directory(source, step))
            found = directory(source, step)
    found = found or find_latest_valid(source)
    if found is None:
        raise StorageError(f"{source} has no checkpoint to go on from")
    final = target / "checkpoints"
    fresh = target / f".tmp-adopt-{found.name}"
    for left in (fresh, target / ".tmp-adopted"):  # of one that was killed
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(found, fresh / found.name)
    if final.exists():
        shutil.rmtree(final.rename(target / ".tmp-adopted"))
    fresh.rename(final)
    return step_of(found)


def prune(run_dir: Path, *, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    steps = _steps(run_dir)
    for step in sorted(steps)[:-keep]:
        if step != best_step:
            _remove(steps[step])


def keep_only(run_dir: Path, step: int | None) -> None:
    """Remove all checkpoints but that of `step`; None removes all."""
    for other, path in _steps(run_dir).items():
        if other != step:
            _remove(path)


def rewind(run_dir: Path, *, step: int) -> Path:
    """Make the checkpoint of `step` the newest, by removing those after it; its directory.

    Raises StorageError where it is missing or damaged; nothing is removed then.
    """
    kept = directory(run_dir, step)
    storage.verify(kept)
    for later, path in sorted(_steps(run_dir).items(), reverse=True):
        if later > step:
            _remove(path)
    return kept


def export(
    source: Path,
    final: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    attempt: int,
    info: Mapping[str, Any],
    is_fenced: Callable[[], bool],
) -> None:
    """Commit `final`, the adapter to use, out of a checkpoint: weights, settings and tokenizer."""

    def write(target: Path) -> None:
        for name in (WEIGHTS, "adapter_config.json"):
            shutil.copyfile(source / name, target / name)
        tokenizer.save_pretrained(target)

    storage.commit(
        final, write, attempt=str(attempt), info=dict(info), is_fenced=is_fenced, replace=True
    )


def is_export_of(final: Path, source: Path) -> bool:
    """Whether a committed adapter holds the weights of a checkpoint."""
    try:
        entries = [storage.read_manifest(path).files[WEIGHTS] for path in (final, source)]
    except (StorageError, KeyError):
        return False
    return entries[0] == entries[1]


def write_adapter(model: PeftModel, target: Path, *, adapter: str = ADAPTER) -> None:
    """Write the adapter as PEFT's two files; no embeddings, no model card, no network."""
    tensors = _adapter_tensors(model, adapter)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    model.peft_config[adapter].save_pretrained(str(target))
    path = target / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():  # PEFT writes sets, in another order in each process
        if name in ("target_modules", "modules_to_save") and isinstance(value, list):
            settings[name] = sorted(value)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def check_adapter(
    target: Path, model: PeftModel, *, must_have_moved: bool, adapter: str = ADAPTER
) -> None:
    """Reopen a written adapter: keys and shapes of the model, finite, not all of lora_B zero.

    Raises AdapterError (alpaca-lora #293: 443-byte adapters that nobody noticed).
    """
    expected = _adapter_tensors(model, adapter)
    moved = False
    with safe_open(target / WEIGHTS, framework="pt") as file:
        if set(file.keys()) != set(expected):
            raise AdapterError(f"{target.name}: the saved adapter lacks tensors of the model")
        for name, tensor in expected.items():
            saved = file.get_tensor(name)
            if saved.shape != tensor.shape or not torch.isfinite(saved).all():
                raise AdapterError(f"{target.name}: {name} is misshapen or not finite")
            moved = moved or ("lora_B" in name and bool(saved.any()))
    if must_have_moved and not moved:
        raise AdapterError(f"{target.name}: every lora_B is zero; nothing was learned")


def load_adapter(path: Path, model: PeftModel, *, adapter: str = ADAPTER) -> None:
    """Copy a checkpoint's adapter weights into `model`, in place."""
    tensors = load_file(path / WEIGHTS)
    own = _adapter_tensors(model, adapter)
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in own.items()}:
        raise AdapterError(f"{path}: its parameters are not those of this recipe's adapter")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _adapter_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """By PEFT's file names, which do not say what the adapter is called."""
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def _require_step(path: Path, step: int) -> None:
    """Raise StorageError where a whole checkpoint lies under the name of another."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))["state"]
    if state["step"] != step:
        raise StorageError(f"{path} holds step {state['step']}: it was moved there from elsewhere")


def clean(run_dir: Path) -> None:
    """Remove what earlier attempts left behind that were killed while they saved."""
    for place in (run_dir, run_dir / "checkpoints", run_dir / "adapters"):
        if place.is_dir():
            storage.clean_leftovers(place)


def _remove(path: Path) -> None:
    """Renamed first: a crash in between must not leave half a checkpoint to be found."""
    shutil.rmtree(path.rename(path.parent / f".tmp-prune-{path.name}"))


def _steps(run_dir: Path) -> dict[int, Path]:
    found = (run_dir / "checkpoints").glob("step-*")
    matches = ((_STEP.match(path.name), path) for path in found)
    return {int(match.group(1)): path for match, path in matches if match}
