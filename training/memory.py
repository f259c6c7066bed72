"""What one micro-batch holds: measured on the loaded model, decided once a run, then kept.

The plan is stored with the run, because another micro-batch would sum the same gradients in
another order, and a resumed run must be bitwise the uninterrupted one.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from cluster import storage
from cluster.errors import ResourceError
from training import packing
from training.config import TrainRecipe
from training.model import Base
from training.objective import CHUNK, Objective
from training.tokens import Encoded

_KILL_NOTE = "killed-for-memory"
PLAN = "memory.json"
"""The plan's file in the run's directory."""
_PARITY_BOUND = 1e-4
"""Largest difference of packed from separate logits, over the largest logit; half gets 50 times."""
TARGET_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens of a micro-batch beyond which a device gains little: on two cores 1,024 are 4 % faster
than 512, for 0.7 GB more with a base of 135M. Not measured on GPUs."""
_TOO_LITTLE = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
"""Words of PyTorch on CPU, of CUDA and of cuBLAS in errors that have no type of their own."""
_USABLE_SHARE = 0.6
"""Of the free memory; the rest is for what is not measured (fragmentation, optimiser, others)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """How a run's batches are laid out."""

    is_packed: bool
    micro_batch_tokens: int
    """Padding included."""
    gradient_checkpointing: bool
    pad_id: int
    activation_bytes: int = 0
    """What one micro-batch takes beside the model and its adapters, about."""
    note: str = ""
    """Why, in one line, for the user."""


def decide(
    recipe: TrainRecipe,
    base: Base,
    objective: Objective,
    *,
    longest_tokens: int,
    pad_id: int,
    workers_here: int,
) -> MemoryPlan:
    """Probe the loaded model and lay out a run's batches.

    longest_tokens: length of the longest example. workers_here: how many share this machine.
    Raises ResourceError where not even one example fits with checkpointing.
    """
    is_packed, packing_note = _choose_packing(recipe, base, objective, pad_id)
    vocab_size = base.model.config.get_text_config().vocab_size
    probe = random_probe(vocab_size, pad_id).to(base.device)
    set_checkpointing(objective, is_on=False)
    plain_bytes = bytes_per_token(objective, base, probe)
    set_checkpointing(objective, is_on=True)
    layers = getattr(base.model.config, "num_hidden_layers", 1)
    frugal_bytes = bytes_per_token(objective, base, probe) + plain_bytes / layers
    fixed = 3 * CHUNK * vocab_size * 4
    budget = _USABLE_SHARE * free_bytes(base.device) / workers_here - fixed
    setting = recipe.memory.gradient_checkpointing
    is_on = setting == "on" or (setting == "auto" and longest_tokens * plain_bytes > budget)
    used = frugal_bytes if is_on else plain_bytes
    if longest_tokens * used > budget:
        raise ResourceError(
            f"the longest example has {longest_tokens} tokens, {used / 1e3:.0f} kB of activations "
            f"each (gradient checkpointing {'on' if is_on else 'off'}), but only "
            f"{max(0.0, budget) / 1e9:.2f} GB of {base.device.type} memory may be used. Lower "
            "data.max_length, set memory.gradient_checkpointing: on, or use a larger machine"
        )
    tokens = recipe.memory.micro_batch_tokens
    if tokens == "auto":
        fitting = int(budget / used)
        tokens = max(longest_tokens, min(TARGET_TOKENS.get(base.device.type, 512), fitting))
    why = "as asked" if setting != "auto" else "does not fit without" if is_on else "fits without"
    note = (
        f"{packing_note}; gradient checkpointing {'on' if is_on else 'off'} ({why}: "
        f"{used / 1e3:.0f} kB a token, {budget / 1e9:.1f} GB usable); "
        f"micro-batches of up to {tokens} tokens"
    )
    return MemoryPlan(
        is_packed=is_packed,
        micro_batch_tokens=tokens,
        gradient_checkpointing=is_on,
        pad_id=pad_id,
        activation_bytes=int(tokens * used + fixed),
        note=note,
    )


def stored(run_dir: Path) -> MemoryPlan | None:
    """The plan that the run was started with."""
    path = run_dir / PLAN
    return MemoryPlan(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def store(run_dir: Path, plan: MemoryPlan) -> None:
    """Keep the plan for every later attempt of the run."""
    storage.write_file(run_dir / PLAN, json.dumps(asdict(plan), indent=1).encode())


def is_short(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, on a CPU or a GPU."""
    is_typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_typed or any(words in str(error) for words in _TOO_LITTLE)


def halved(plan: MemoryPlan, tokens: int, *, smallest: int = 1) -> MemoryPlan:
    """The plan with micro-batches of half of `tokens`, but not below `smallest` tokens.

    Raises ResourceError where `tokens` is that small already, which is one example.
    """
    if tokens <= smallest:
        raise ResourceError(
            f"memory does not suffice for a micro-batch of one example (micro_batch_tokens "
            f"{plan.micro_batch_tokens}, gradient checkpointing "
            f"{'on' if plan.gradient_checkpointing else 'off'}). Lower data.max_length or "
            "lora.rank, set memory.gradient_checkpointing: on or model.quantization: nf4, use "
            "fewer workers on this machine, or a larger one"
        )
    return replace(plan, micro_batch_tokens=max(smallest, tokens // 2))


def note_kill(run_dir: Path) -> None:
    """Have the next attempt of the run use less memory than the one that was killed for it."""
    storage.write_file(run_dir / _KILL_NOTE, b"")


def was_killed(run_dir: Path) -> bool:
    """Whether the last attempt of the run was killed for memory."""
    return (run_dir / _KILL_NOTE).exists()


def shrink(run_dir: Path, plan: MemoryPlan, *, longest_tokens: int, most_tokens: int) -> MemoryPlan:
    """The stored plan, halved for good, since the last attempt was killed for memory.

    longest_tokens: of one example. most_tokens: that a worker has in a step. Raises ResourceError
    where a micro-batch holds but one example already.
    """
    smaller = halved(
        plan, min(plan.micro_batch_tokens, most_tokens), smallest=max(1, longest_tokens)
    )
    store(run_dir, smaller)
    (run_dir / _KILL_NOTE).unlink()
    return smaller


def num_kernel_kills() -> int:
    """Processes that the kernel has killed for memory: in this container, else on this machine."""
    for path in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        with suppress(OSError):
            for line in path.read_text(encoding="ascii").splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
    return 0


def set_checkpointing(objective: Objective, *, is_on: bool) -> None:
    """Turn non-reentrant activation checkpointing on or off; the KV cache is off in training."""
    model: Any = objective.model.get_base_model()
    model.config.use_cache = False
    if is_on:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()


def bytes_per_token(objective: Objective, base: Base, batch: packing.MicroBatch) -> float:
    """Bytes that the forward pass keeps for the backward pass, for each token of `batch`.

    Counts storages once, and leaves out parameters and buffers, which are there anyway.
    """
    model = objective.model
    resident = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage_ = tensor.untyped_storage()
        if storage_.data_ptr() not in resident:
            kept[storage_.data_ptr()] = storage_.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), base.autocast():
        loss = objective.losses(batch).sum()
    del loss
    return sum(kept.values()) / batch.input_ids_BL.numel()


def _choose_packing(
    recipe: TrainRecipe, base: Base, objective: Objective, pad_id: int
) -> tuple[bool, str]:
    if recipe.data.packing == "off":
        return False, "padding (data.packing: off)"
    vocab_size = base.model.config.get_text_config().vocab_size
    bound = _PARITY_BOUND * (1 if base.precision == "fp32" else 50)
    objective.model.eval()
    with torch.no_grad(), base.autocast():
        difference = packing.parity_probe(
            lambda batch: objective.logits(batch.to(base.device)),
            vocab_size=vocab_size,
            pad_id=pad_id,
        )
    if difference <= bound:
        return True, f"packing (parity {difference:.1e})"
    reason = (
        f"{base.model.config.model_type} gives other logits in packed rows "
        f"(difference {difference:.1e}, bound {bound:.0e})"
    )
    if recipe.data.packing == "on":
        raise ResourceError(f"data.packing is on, but {reason}; set it to auto or off")
    return False, f"padding, since {reason}"


def random_probe(vocab_size: int, pad_id: int) -> packing.MicroBatch:
    """A row of 128 random tokens, all supervised."""
    ids = np.random.default_rng(0).integers(vocab_size, size=128, dtype=np.int32)
    row = Encoded(id="probe", input_ids=ids, labels=ids, is_truncated=False, has_end=False)
    return packing.plan([row], micro_batch_tokens=128, is_packed=True, pad_id=pad_id)[0]


def fitting(free: float, each: float) -> int:
    """How many things of `each` bytes the usable share of `free` bytes holds."""
    return max(0, int(_USABLE_SHARE * free / each))


def free_bytes(device: torch.device) -> float:
    """Memory that a worker on `device` could still take; a container's limit counts."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return float(min(free, int(limit.read_text()) - int(used.read_text())))
    except (OSError, ValueError):  # no cgroup, or no limit ("max")
        return float(free)
