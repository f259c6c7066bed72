"""TrainRecipe: every word of a training recipe, with its unit, its default and its checks."""

from dataclasses import dataclass, field
from typing import Literal

from cluster import remote
from cluster.errors import ConfigError


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}; allowed: {allowed}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The base model, which stays frozen."""

    base: str
    """`demo`, a local directory, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    quantization: Literal["int8", "nf4", "none"] = "int8"
    """How the frozen linear weights are stored."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Compute type; auto is fp16 on CUDA and fp32 on CPU."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""

    def __post_init__(self) -> None:
        _require(bool(self.base.strip()), "model.base", self.base, "demo, a directory or a hub id")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the examples come from and which of their tokens are learned."""

    train: str | tuple[str, ...]
    """File, glob, list of those, `save_to_disk` directory, or hub id."""
    eval: str | tuple[str, ...] | None = None
    """The same for held-out examples; null trains without evaluation."""
    format: Literal[
        "auto", "messages", "alpaca", "sharegpt", "prompt_completion", "text", "preference"
    ] = "auto"
    """Shape of a row; auto looks at its keys, and is preference for objective.kind: dpo."""
    template: Literal["auto", "chat", "alpaca", "plain"] = "auto"
    """How a row becomes text; auto is the tokenizer's chat template, or alpaca without one."""
    mask: Literal["completion", "all", "last_turn"] = "completion"
    """Which tokens are supervised: all assistant turns, every token, or the last turn."""
    max_length: int = 1024
    """Longest example, in tokens; longer ones are cut on the right and counted."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Several examples in one row; auto where the parity probe passes, else padding."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A bad row stops the run, or is skipped, counted and listed."""
    streaming: bool = False
    """Read rows as they are needed, rather than tokenise all beforehand; needs optim.max_steps."""

    def __post_init__(self) -> None:
        _require(bool(self.train), "data.train", self.train, "a file, glob, directory or hub id")
        _require(8 <= self.max_length <= 1 << 20, "data.max_length", self.max_length, "8..1048576")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What is learned of an example."""

    kind: Literal["supervised", "dpo"] = "supervised"
    """The answers themselves, or, of two answers, which one is preferred (arXiv 2305.18290)."""
    beta: float = 0.1
    """dpo: how dear it is to move away from the base; the smaller, the further it goes."""

    def __post_init__(self) -> None:
        _require(0 < self.beta <= 2, "objective.beta", self.beta, "above 0, to 2")

    @property
    def num_sequences(self) -> int:
        """Token sequences of one example, which are trained together."""
        return 2 if self.kind == "dpo" else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """The adapter."""

    rank: int = 16
    """Rank of the update of each target layer."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; null is alpha = rank."""
    dropout: float = 0.0
    """Probability that an input of the adapter is zeroed in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear`, or names of linear layers such as [q_proj, v_proj]."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """rslora scales by alpha / sqrt(rank); dora learns a magnitude for each output."""

    def __post_init__(self) -> None:
        _require(1 <= self.rank <= 4096, "lora.rank", self.rank, "1..4096")
        if self.alpha is not None:
            _require(0 < self.alpha <= 65536, "lora.alpha", self.alpha, "null, or above 0 to 65536")
        _require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "0 to below 1")
        _require(
            bool(self.target_modules),
            "lora.target_modules",
            self.target_modules,
            "all-linear, or a list of layer names",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The optimiser, its schedule and the order of the data."""

    learning_rate: float = 3.0e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    """After warm-up: flat, linear to 0, cosine to 0, or flat with a linear last fifth."""
    warmup: float = 0.03
    """Steps of linear warm-up: a fraction of all steps below 1, a number of steps from 1."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 turns clipping off."""
    epochs: float = 3
    """Passes over the training examples; ignored where max_steps is given."""
    max_steps: int | None = None
    """Optimiser steps in all."""
    stop_after: int | None = None
    """Steps after which training ends, though the schedule goes on; null trains to its end."""
    global_batch_size: int = 16
    """Examples per optimiser step, over all workers."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """torch AdamW, or bitsandbytes AdamW with 8-bit state."""
    seed: int = 0
    """Seeds the adapter's init, the order of the data and dropout."""

    def __post_init__(self) -> None:
        _require(
            0 < self.learning_rate <= 10,
            "optim.learning_rate",
            self.learning_rate,
            "above 0, to 10",
        )
        _require(0 <= self.warmup <= 1e9, "optim.warmup", self.warmup, "0 or more")
        _require(0 <= self.weight_decay <= 10, "optim.weight_decay", self.weight_decay, "0 to 10")
        _require(
            0 <= self.max_grad_norm <= 1e6, "optim.max_grad_norm", self.max_grad_norm, "0 to 1e6"
        )
        _require(0 < self.epochs <= 1e5, "optim.epochs", self.epochs, "above 0, to 100000")
        if self.max_steps is not None:
            _require(
                1 <= self.max_steps <= 10**9, "optim.max_steps", self.max_steps, "null, or 1 to 1e9"
            )
        if self.stop_after is not None:
            _require(
                1 <= self.stop_after <= 10**9,
                "optim.stop_after",
                self.stop_after,
                "null, or 1 to 1e9",
            )
        _require(
            1 <= self.global_batch_size <= 1 << 20,
            "optim.global_batch_size",
            self.global_batch_size,
            "1..1048576",
        )
        _require(0 <= self.seed < 1 << 31, "optim.seed", self.seed, "0..2147483647")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """What is traded for memory."""

    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute activations in the backward pass; auto where they would not fit."""
    micro_batch_tokens: int | Literal["auto"] = "auto"
    """Tokens (padding included) in one forward pass of one worker."""

    def __post_init__(self) -> None:
        if self.micro_batch_tokens != "auto":
            _require(
                1 <= self.micro_batch_tokens <= 1 << 24,
                "memory.micro_batch_tokens",
                self.micro_batch_tokens,
                "auto, or 1..16777216",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleConfig:
    """How many Ray Train workers there are, and what each gets."""

    workers: int | tuple[int, ...] = 1
    """Ray Train workers; [2, 8] takes as many as the cluster has room for, and goes on from the
    last checkpoint with more or fewer as nodes come and go."""
    cpus_per_worker: int | Literal["auto"] = "auto"
    """CPU cores of a worker; auto shares out the cluster's."""
    gpus_per_worker: int | Literal["auto"] = "auto"
    """GPUs of a worker; auto is 1 where the cluster has enough, else 0."""
    strategy: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3"] = "auto"
    """How gradients and optimiser state are spread; auto is single for 1 worker, ddp for more."""
    offload_optimizer: bool = False
    """Keep the state of the optimiser in the memory of the host; zero1, zero2 and zero3 only."""
    max_failures: int = 3
    """Restarts from the newest valid checkpoint after a lost worker; -1 is no limit."""

    def __post_init__(self) -> None:
        least, most = self.least_workers, self.most_workers
        is_range = self.workers == (least, most) and least < most
        _require(
            (is_range or not self.is_elastic) and least >= 1 and most <= 4096,
            "scale.workers",
            self.workers,
            "1..4096, or [least, most]",
        )
        if self.cpus_per_worker != "auto":
            _require(
                1 <= self.cpus_per_worker <= 1024,
                "scale.cpus_per_worker",
                self.cpus_per_worker,
                "auto, or 1..1024",
            )
        if self.gpus_per_worker != "auto":
            _require(
                0 <= self.gpus_per_worker <= 1,
                "scale.gpus_per_worker",
                self.gpus_per_worker,
                "auto, 0 or 1",
            )
        _require(
            -1 <= self.max_failures <= 1000,
            "scale.max_failures",
            self.max_failures,
            "-1 (no limit) to 1000",
        )

    @property
    def least_workers(self) -> int:
        """Fewer than these do not train."""
        return self.workers if isinstance(self.workers, int) else min(self.workers, default=0)

    @property
    def most_workers(self) -> int:
        """More than these are not started."""
        return self.workers if isinstance(self.workers, int) else max(self.workers, default=0)

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change during a run."""
        return not isinstance(self.workers, int)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the run can be taken up again."""

    every_steps: int = 100
    """Optimiser steps between checkpoints; there is always one at the end."""
    keep: int = 2
    """Newest checkpoints kept, beside the best one."""
    keep_adapters: bool = False
    """Keep the adapter of every checkpoint in `<run>/adapters/step-N`, ready to be served."""

    def __post_init__(self) -> None:
        _require(
            1 <= self.every_steps <= 10**9, "checkpoint.every_steps", self.every_steps, "1 or more"
        )
        _require(
            2 <= self.keep <= 10**6,
            "checkpoint.keep",
            self.keep,
            "2 or more (one may turn out damaged)",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Evaluation on data.eval during training."""

    every_steps: int | None = None
    """Optimiser steps between evaluations; null evaluates once, at the end."""
    metrics: tuple[Literal["loss", "exact_match", "json_valid", "rouge_l"], ...] = ("loss",)
    """What is measured at the end; during the run it is the loss, unless metrics_during_run."""
    metrics_during_run: bool = False
    """Measure all metrics at every evaluation; answers take time to generate."""
    best: Literal["loss", "last"] = "loss"
    """Which checkpoint becomes the adapter: the lowest eval loss, or the last step."""
    early_stopping: int | None = None
    """Stop after this many evaluations without a better loss; null never stops."""

    def __post_init__(self) -> None:
        for name, value in (
            ("every_steps", self.every_steps),
            ("early_stopping", self.early_stopping),
        ):
            if value is not None:
                _require(1 <= value <= 10**9, f"evaluation.{name}", value, "null, or 1 or more")
        if self.early_stopping and not self.every_steps:
            raise ConfigError("evaluation.early_stopping needs evaluation.every_steps")
        if self.metrics_during_run and not self.every_steps:
            raise ConfigError("evaluation.metrics_during_run needs evaluation.every_steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """Who else hears of the run, beside events.jsonl."""

    to: tuple[Literal["tensorboard"], ...] = ("tensorboard",)
    """Extra sinks; tensorboard writes into <run>/tensorboard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRecipe:
    """One training run."""

    name: str
    """The run's directory is <storage>/<name>."""
    storage: str = "runs"
    """What holds runs: a directory that all nodes share, or a URL such as s3://bucket/runs."""
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        plain_name = self.name.replace("-", "").replace("_", "").replace(".", "")
        is_safe = plain_name.isascii() and plain_name.isalnum() and self.name[0] != "."
        _require(
            is_safe and len(self.name) <= 100,
            "name",
            self.name,
            "up to 100 letters, digits, '-', '_' and '.', not starting with '.'",
        )
        if remote.is_url(self.storage):
            remote.require_url(self.storage)
            if self.checkpoint.keep_adapters:
                raise ConfigError("checkpoint.keep_adapters needs storage that is a directory")
        if self.data.streaming and self.optim.max_steps is None:
            raise ConfigError("data.streaming needs optim.max_steps: a stream has no known length")
        self._check_objective()
        if self.evaluation.every_steps and not self.data.eval:
            raise ConfigError("evaluation.every_steps needs data.eval: name the held-out examples")
        workers = self.scale.most_workers
        if self.optim.global_batch_size < workers:
            raise ConfigError(
                f"optim.global_batch_size is {self.optim.global_batch_size} for "
                f"{workers} workers; give every worker at least one example"
            )
        if self.scale.strategy == "single" and workers > 1:
            raise ConfigError(
                f"scale.strategy is single with {workers} workers; use ddp (or auto), or one worker"
            )

    @property
    def row_format(
        self,
    ) -> Literal[
        "auto", "messages", "alpaca", "sharegpt", "prompt_completion", "text", "preference"
    ]:
        """`data.format`, where auto is preference for dpo."""
        return "preference" if self.objective.kind == "dpo" else self.data.format

    def _check_objective(self) -> None:
        if self.objective.kind == "supervised":
            if self.data.format == "preference":
                raise ConfigError(
                    "data.format is preference, which objective.kind: supervised cannot learn "
                    "from; set objective.kind: dpo"
                )
            return
        if self.data.format not in ("auto", "preference"):
            raise ConfigError(
                f"objective.kind is dpo with data.format {self.data.format}; dpo learns from "
                "preferences: set data.format: preference, or leave it out"
            )
        if self.data.mask == "all":
            raise ConfigError(
                "objective.kind is dpo with data.mask all; only the two answers are compared: "
                "leave data.mask out"
            )
        if self.data.streaming:
            raise ConfigError(
                "objective.kind is dpo with data.streaming, which reads examples one by one, not "
                "in pairs; leave data.streaming out"
            )
