"""Jobs of an engine, what is heard of them, and which of them may join its batch."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.errors import LorayError
from serving.config import Limits
from serving.sampling import Matcher, Picker, Scored
from serving.schema import Sampling
from serving.waiting import Waiting

NO_ADAPTER = ""
"""The name under which rows of the bare base are routed."""
_EXPECTED_TOKENS = 512
"""Of an answer, for which room is kept; a longer one may send another back to the queue."""
End = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one answer is to be."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    stop_ids: frozenset[int]
    adapter: str = NO_ADAPTER
    """What the model calls it; a new version has a new name."""
    model: str = ""
    """What the client calls it."""
    key: str = ""
    """Whose request this is; keys get equal shares of the engine."""
    matcher: Matcher | None = None
    num_prompt_logprobs: int | None = None
    """Score the prompt's own tokens too, with so many of the likeliest beside."""
    deadline: float | None = None
    """On the engine's clock; past it the answer ends as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What an answer's listener hears: a token, the prompt's scores, or the end."""

    token: Scored | None = None
    prompt: tuple[Scored, ...] = ()
    end: End | None = None
    error: LorayError | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class Answer:
    """A job on its way."""

    job: Job
    tell: Callable[[Step], None]
    """Called by the engine's thread; must not block."""
    picker: Picker
    ids: list[int]
    """The prompt, and what was said so far."""
    num_cached: int = 0
    """Of those, tokens whose keys and values were there already when they were prefilled."""
    num_new: int = 0
    is_cancelled: bool = False
    is_over: bool = False


class Admission:
    """Who may join the batch: as many as have room, and, of a full batch, who has nothing there."""

    def __init__(self, limits: Limits, waiting: Waiting[Answer], *, has_window: bool) -> None:
        """has_window: whether attention looks back over so many columns only."""
        self._limits = limits
        self._waiting = waiting
        self._has_window = has_window

    def next(
        self, rows: Sequence[Answer], group: Sequence[Answer], longest: int
    ) -> tuple[Answer | None, Answer | None]:
        """(the next of the queue that may be prefilled together with `group`, or None; of `rows`
        the one that must make way for it, or None).

        Where the batch is full, a key that has no row gets one of the key that has most, and a
        model of a key one of its model that has most: answers which began together end together,
        and whoever asks for little would wait for all of that.

        longest: tokens of the longest of the group.
        """
        limits = self._limits
        taken = [*rows, *group]
        is_full = len(taken) >= limits.rows
        by_key = Counter(answer.job.key for answer in taken)
        by_model = Counter((answer.job.key, answer.job.model) for answer in taken)

        def victim(answer: Answer) -> Answer | None:
            """The newest row of whoever has most, at least two of them."""
            key, model = answer.job.key, answer.job.model
            if by_model[key, model]:
                return None
            if by_key[key]:
                share = {name: count for (owner, name), count in by_model.items() if owner == key}
                most = max(share, key=share.__getitem__)
                count = share[most]
                theirs = [one for one in rows if (one.job.key, one.job.model) == (key, most)]
            else:
                [(most, count)] = by_key.most_common(1)
                theirs = [one for one in rows if one.job.key == most]
            return min(theirs, key=lambda one: one.num_new) if count > 1 and theirs else None

        def fits(answer: Answer) -> bool:
            others = taken
            if is_full:
                gone = victim(answer)
                if gone is None:
                    return False
                others = [one for one in taken if one is not gone]
            most = max(_expected_tokens(one) for one in [*others, answer])
            if (len(others) + 1) * most > limits.kv_tokens and others:
                return False
            if not group:
                return True
            length = max(longest, len(answer.ids))
            return not self.is_alone(answer) and (len(group) + 1) * length <= limits.prefill_tokens

        answer = self._waiting.take(fits)
        return answer, victim(answer) if answer is not None and is_full else None

    def is_alone(self, answer: Answer) -> bool:
        """Whether a prompt must be prefilled by itself: in chunks, scored, or where a window of
        attention would count the gaps between unequal prompts."""
        job = answer.job
        is_long = len(answer.ids) - answer.num_cached > self._limits.prefill_tokens
        return is_long or job.num_prompt_logprobs is not None or self._has_window


def _expected_tokens(answer: Answer) -> int:
    """What an answer may come to; few clients say how long it is to be, and few are long."""
    left = answer.job.max_new_tokens - answer.num_new
    return len(answer.ids) + min(left, _EXPECTED_TOKENS)
