"""Continuous batching over a Hugging Face model's own forward, with adapters mixed in the batch.

One thread owns the model. A step prefills a piece of what waits, then takes every running answer
one token further. Requests join and leave between steps; a prompt goes through in chunks, so that
others keep streaming. Which adapter a row uses is `training/routing.py`'s business.

transformers 5.23 has continuous batching of its own, exact with routing but half as fast on CPU
as a static batch (its paged gathers); here rows share columns of one cache (`kv.py`).

B rows, L tokens, V vocabulary.
"""

import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from cluster.errors import LorayError
from serving import head, kv, sampling
from serving.admission import Admission, Answer, End, Job, Step
from serving.config import Limits
from serving.kv import Columns, KeyValues
from serving.prefix import Prefixes
from serving.sampling import Picker, Scored
from serving.waiting import Waiting
from training.routing import Router

T = TypeVar("T")
log = logging.getLogger(__name__)

_IDLE_S = 0.1


@dataclass(kw_only=True, slots=True, eq=False)
class _Filling:
    """Prompts on their way through the model, together in one temporary cache."""

    answers: list[Answer]
    columns: Columns
    pasts: list[int]
    done: int = 0
    """Tokens of a prompt that is alone which are through."""
    scores: list[Scored] = field(default_factory=list)


class Engine:
    """`submit` and `cancel` from any thread; `run` in the one that owns the model."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        limits: Limits,
        *,
        router: Router | None = None,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
        clock: Callable[[], float] = time.monotonic,
        on_step: Callable[["Engine", float], None] = lambda engine, seconds: None,
    ) -> None:
        """router: of the model's adapters, if it has any. on_step: told after every step."""
        self.limits = limits
        self.clock = clock
        self._model = model.eval()
        bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._bare: PreTrainedModel = bare
        head.quicken(bare)
        self._router = router
        self._autocast = autocast
        self._on_step = on_step
        self._takes = set(inspect.signature(bare.forward).parameters)
        text = bare.config.get_text_config()
        self.context_tokens = min(
            limits.context_tokens, getattr(text, "max_position_embeddings", None) or 1 << 30
        )
        kinds = getattr(text, "layer_types", None) or ()
        self._device = next(bare.parameters()).device
        self._columns = Columns.for_model(bare)
        self._rows: list[Answer] = []
        self._filling: _Filling | None = None
        self.prefixes = Prefixes(page=limits.prefix_page, max_tokens=limits.prefix_tokens)
        self.waiting: Waiting[Answer] = Waiting(
            max_items=limits.waiting, max_per_key=limits.waiting_per_key,
            max_per_model=limits.waiting_per_model, clock=clock,
        )  # fmt: skip
        self._admission = Admission(
            limits, self.waiting, has_window=any(kind != "full_attention" for kind in kinds)
        )
        self._orders: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self.error: BaseException | None = None
        """What the thread died of."""

    # -- any thread ------------------------------------------------------------------------------

    def submit(self, job: Job, tell: Callable[[Step], None]) -> Answer:
        """Queue a job. Raises `waiting.Full` where there is no room, LorayError where the engine
        is dead."""
        answer = Answer(
            job=job,
            tell=tell,
            picker=Picker(sampling=job.sampling, matcher=job.matcher),
            ids=list(job.prompt_ids),
        )
        with self._changed:
            if self.error is not None or self._is_closed:
                raise LorayError("the engine has stopped")
            self.waiting.put(
                answer,
                key=job.key,
                model=job.model,
                cost=len(job.prompt_ids) + job.max_new_tokens,
                deadline=job.deadline,
            )
            self._changed.notify()
        return answer

    def cancel(self, answer: Answer) -> None:
        """End an answer before the next step; nothing more is told of it but the end."""
        with self._changed:
            answer.is_cancelled = True
            is_waiting = self.waiting.remove(answer)
            self._changed.notify()
        if is_waiting:
            self._end(answer, "cancelled")

    def between_steps(self, what: Callable[[], T]) -> "Future[T]":
        """Have the engine's thread do something while the model rests."""
        future: Future[T] = Future()
        with self._changed:
            if self.error is not None or self._is_closed:
                raise LorayError("the engine has stopped")
            self._orders.append((what, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Stop after the current step."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._bare.config.get_text_config().vocab_size

    @property
    def num_running(self) -> int:
        """Answers that are decoding or being prefilled."""
        return len(self._rows) + (len(self._filling.answers) if self._filling else 0)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the cache of the batch holds now, padding included."""
        return len(self._rows) * self._columns.length

    # -- the engine's thread -----------------------------------------------------------------------

    def run(self) -> None:
        """Step until `close`; whoever still waits then is told."""
        try:
            while not self._is_closed:
                if not self.step():
                    with self._changed:
                        if not (self._orders or len(self.waiting) or self._is_closed):
                            self._changed.wait(_IDLE_S)
        except BaseException as error:
            log.exception("engine=dead")
            self.error = error
        finally:
            self._end_all()

    @torch.inference_mode()
    def step(self) -> bool:
        """One step; whether there was anything to do."""
        started = self.clock()
        self._take_orders()
        self._drop_cancelled()
        self._start_filling()
        has_work = self._filling is not None or bool(self._rows)
        if self._filling is not None:
            self._fill()
        if self._rows:
            self._make_room()
            self._decode()
        if has_work:
            self._on_step(self, self.clock() - started)
        return has_work

    def _take_orders(self) -> None:
        while self._orders:
            what, future = self._orders.popleft()
            if not future.set_running_or_notify_cancel():  # nobody waits for it any more
                continue
            try:
                future.set_result(what())
            except BaseException as error:  # it belongs to whoever gave the order
                future.set_exception(error)

    def _drop_cancelled(self) -> None:
        with self._changed:
            expired = self.waiting.expired()
        for answer in expired:
            self._end(answer, "deadline")
        for row in reversed(range(len(self._rows))):
            end = self._must_end(self._rows[row])
            if end:
                self._leave(row, end)
        filling = self._filling
        if filling is not None and all(map(self._must_end, filling.answers)):
            for answer in filling.answers:
                self._end(answer, self._must_end(answer) or "cancelled")
            self._filling = None

    def _must_end(self, answer: Answer) -> End | None:
        if answer.is_cancelled:
            return "cancelled"
        deadline = answer.job.deadline
        return "deadline" if deadline is not None and self.clock() >= deadline else None

    def _start_filling(self) -> None:
        """Take prompts out of the queue: one, or several short ones, as there is room."""
        if self._filling is not None:
            return
        group: list[Answer] = []
        past: list[KeyValues] = []
        pasts: list[int] = []
        longest = 0
        while True:
            with self._changed:
                answer, victim = self._admission.next(self._rows, group, longest)
            if answer is None:
                break
            if victim is not None:
                self._send_back(self._rows.index(victim))
            if answer.is_cancelled:
                self._end(answer, "cancelled")
                continue
            job = answer.job
            found: list[KeyValues] = []
            if job.num_prompt_logprobs is None:
                found = self.prefixes.find(job.adapter, answer.ids)
            answer.num_cached = len(found) * self.prefixes.page
            group.append(answer)
            past.append(kv.joined(found) if found else [])
            pasts.append(answer.num_cached)
            longest = max(longest, len(answer.ids) - answer.num_cached)
            if self._admission.is_alone(answer):
                break
        if not group:
            return
        columns = Columns.for_model(self._bare)
        for sequence, size in zip(past, pasts, strict=True):
            columns.join(sequence, size)
        self._filling = _Filling(answers=group, columns=columns, pasts=pasts)

    def _fill(self) -> None:
        """The next chunk of the prompts; where it is the last, they join the batch."""
        filling = self._filling
        assert filling is not None
        answers = filling.answers
        rest = [
            answer.ids[past + filling.done :]
            for answer, past in zip(answers, filling.pasts, strict=True)
        ]
        chunks = [ids[: self.limits.prefill_tokens] for ids in rest] if len(rest) == 1 else rest
        length = max(map(len, chunks))
        ids_BL = torch.zeros(len(answers), length, dtype=torch.long)
        places_BL = torch.zeros_like(ids_BL)
        new_BL = torch.zeros_like(ids_BL)
        for row, (chunk, past) in enumerate(zip(chunks, filling.pasts, strict=True)):
            first = length - len(chunk)
            ids_BL[row, first:] = torch.tensor(chunk)
            start = past + filling.done
            places_BL[row, first:] = torch.arange(start, start + len(chunk))
            new_BL[row, first:] = 1
        columns = filling.columns
        mask_BC = torch.cat([columns.mask(0), new_BL], dim=1)
        wants_all = answers[0].job.num_prompt_logprobs is not None
        logits_BLV = self._forward(
            ids_BL, places_BL, mask_BC, columns, [a.job.adapter for a in answers], is_all=wants_all
        )
        columns.advance(length)
        if wants_all:
            self._score_prompt(filling, logits_BLV[0], chunks[0])
        if len(chunks[0]) < len(rest[0]):
            filling.done += len(chunks[0])
            return
        self._filling = None
        self._join(filling, [len(chunk) for chunk in chunks], logits_BLV[:, -1])

    def _score_prompt(self, filling: _Filling, logits_LV: Tensor, chunk: Sequence[int]) -> None:
        """Keep the log probability of each prompt token, which the logits before it give."""
        answer = filling.answers[0]
        ids, num_top = answer.job.prompt_ids, answer.job.num_prompt_logprobs or 0
        if filling.done == 0:
            filling.scores.append(Scored(id=ids[0]))
        following = ids[filling.done + 1 : filling.done + len(chunk) + 1]
        if following:
            filling.scores += sampling.scored(
                logits_LV[: len(following)], following, num_top=num_top
            )

    def _join(self, filling: _Filling, new: Sequence[int], logits_BV: Tensor) -> None:
        """Prefilled prompts become rows of the batch, each with its first token."""
        first = sampling.pick(logits_BV, [answer.picker for answer in filling.answers])
        for row, (answer, token) in enumerate(zip(filling.answers, first, strict=True)):
            job, past = answer.job, filling.pasts[row]
            size = len(answer.ids)
            fresh = filling.columns.sequence(row, start=filling.columns.sizes[row] - new[row])
            if len(filling.answers) == 1:
                whole = filling.columns.sequence(row)
            elif past:
                kept = filling.columns.sequence(row, 0, past)
                whole = kv.joined([kept, fresh])
            else:
                whole = fresh
            if job.num_prompt_logprobs is None or answer.num_new:
                self.prefixes.keep(job.adapter, answer.ids, whole)
            else:
                answer.tell(Step(prompt=tuple(filling.scores)))
            if not self._hear(answer, token):
                self._columns.join(whole, size)
                self._rows.append(answer)

    def _make_room(self) -> None:
        """Send answers back to the queue where the cache has become too long for all of them.

        The newest goes, with what it has said, and goes on from there later. One alone stays.
        """
        while len(self._rows) > 1 and self.kv_tokens + len(self._rows) > self.limits.kv_tokens:
            self._send_back(min(range(len(self._rows)), key=lambda row: self._rows[row].num_new))

    def _send_back(self, row: int) -> None:
        answer = self._rows[row]
        with self._changed:
            job = answer.job
            self.waiting.put_back(answer, key=job.key, model=job.model, deadline=job.deadline)
        self._take_away(row)

    def _decode(self) -> None:
        """Every running answer, one token further."""
        columns = self._columns
        last_B1 = torch.tensor([[answer.ids[-1]] for answer in self._rows])
        places_B1 = torch.tensor([[size] for size in columns.sizes])
        adapters = [answer.job.adapter for answer in self._rows]
        logits_BLV = self._forward(last_B1, places_B1, columns.mask(1), columns, adapters)
        columns.advance(1)
        tokens = sampling.pick(logits_BLV[:, -1], [answer.picker for answer in self._rows])
        over = [
            row
            for row, (answer, token) in enumerate(zip(self._rows, tokens, strict=True))
            if self._hear(answer, token)
        ]
        for row in reversed(over):
            self._take_away(row)

    def _forward(
        self,
        ids_BL: Tensor,
        places_BL: Tensor,
        mask_BC: Tensor,
        columns: Columns,
        adapters: Sequence[str],
        *,
        is_all: bool = False,
    ) -> Tensor:
        """Logits (B, L, V), or (B, 1, V) of the last column where the model can leave the rest."""
        inputs: dict[str, Any] = {
            "input_ids": ids_BL.to(self._device),
            "attention_mask": mask_BC.to(self._device),
            "past_key_values": columns,
            "use_cache": True,
        }
        if "position_ids" in self._takes:
            inputs["position_ids"] = places_BL.to(self._device)
        if not is_all and "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        route = self._router.by_row(adapters) if self._router else nullcontext()
        with route, self._autocast():
            return self._bare(**inputs).logits

    def _hear(self, answer: Answer, token: Scored | LorayError) -> bool:
        """Tell of a token; whether the answer is over with it."""
        if isinstance(token, LorayError):
            self._end(answer, "error", token)
            return True
        answer.num_new += 1
        answer.ids.append(token.id)
        job = answer.job
        if token.id in job.stop_ids:
            self._end(answer, "stop")
        else:
            answer.tell(Step(token=token))
            if answer.num_new >= job.max_new_tokens or answer.is_cancelled:
                self._end(answer, "cancelled" if answer.is_cancelled else "length")
        return answer.is_over

    def _leave(self, row: int, end: End) -> None:
        self._end(self._rows[row], end)
        self._take_away(row)

    def _take_away(self, row: int) -> None:
        moved = self._columns.leave(row)
        self._rows[row] = self._rows[moved]
        self._rows.pop()

    def _end(self, answer: Answer, end: End, error: LorayError | None = None) -> None:
        if not answer.is_over:
            answer.is_over = True
            answer.tell(Step(end=end, error=error))

    def _end_all(self) -> None:
        with self._changed:
            self._is_closed = True
            left = [*self._rows, *(self._filling.answers if self._filling else [])]
            while (answer := self.waiting.take()) is not None:
                left.append(answer)
            orders = list(self._orders)
        gone = LorayError("the engine has stopped")
        for answer in left:
            self._end(answer, "error", gone)
        for _, future in orders:
            if future.set_running_or_notify_cancel():
                future.set_exception(gone)
