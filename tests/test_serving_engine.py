"""The engine against `generate` alone: every architecture, adapters mixed, joining and leaving."""

import asyncio
import itertools
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_adapter import make_adapter
from tiny import ARCHITECTURES, make_base

from cluster.errors import LorayError
from serving.adapters import Adapters
from serving.admission import NO_ADAPTER, Job, Step
from serving.config import Limits
from serving.engine import Engine
from serving.sampling import Scored
from serving.schema import Sampling
from training import adapter, routing
from training import model as models
from training.config import LoraConfig, ModelConfig
from training.routing import Factors

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0)
LIMITS = Limits(
    rows=4, prefill_tokens=64, prefix_page=4, prefix_tokens=2048, context_tokens=512, kv_tokens=4096
)
LENGTHS = (5, 40, 3, 70, 12, 33, 8, 21, 150, 9)


def prompts_of(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> list[list[int]]:
    words = random.Random(seed)
    return [[words.randrange(250) for _ in range(length)] for length in lengths]


def load(directory: Path, quantization: str = "none") -> models.Base:
    config = ModelConfig(base=str(directory), quantization=quantization)  # pyright: ignore
    base = models.load_base(config, device=CPU)
    for parameter in base.model.parameters():  # random models say the same again and again
        if parameter.is_floating_point():
            parameter.data.mul_(3)
    return base


def generated(model: Any, ids: Sequence[int], num_new: int) -> list[int]:
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=num_new,
        do_sample=False,
        pad_token_id=258,
        eos_token_id=None,
    )
    return out[0, len(ids) :].tolist()


@dataclass
class Listener:
    """What one answer was told."""

    ids: list[int] = field(default_factory=list)
    tokens: list[Scored] = field(default_factory=list)
    prompt: tuple[Scored, ...] = ()
    end: str = ""

    def __call__(self, step: Step) -> None:
        assert not self.end, "told after the end"
        self.prompt = step.prompt or self.prompt
        if step.token is not None:
            self.ids.append(step.token.id)
            self.tokens.append(step.token)
        self.end = step.end or ""


def job(ids: Sequence[int], num_new: int = 20, **settings: Any) -> Job:
    fields = {"sampling": GREEDY, "stop_ids": frozenset(), **settings}
    return Job(prompt_ids=ids, max_new_tokens=num_new, **fields)


def work(engine: Engine) -> None:
    while engine.step():
        pass


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_answer_is_what_generate_says_alone(tmp_path: Path, architecture: str) -> None:
    base = load(make_base(tmp_path / "base", architecture))
    engine = Engine(base.model, LIMITS)
    prompts = prompts_of()
    expected = [generated(base.model, ids, 20 - number) for number, ids in enumerate(prompts)]
    for _ in range(2):  # the second time the prompts' beginnings are there already
        heard = [Listener() for _ in prompts]
        for number, (ids, listener) in enumerate(zip(prompts, heard, strict=True)):
            engine.submit(job(ids, 20 - number), listener)
        work(engine)
        assert [listener.ids for listener in heard] == expected
        assert {listener.end for listener in heard} == {"length"}
    assert engine.prefixes.hits > 0
    assert engine.num_running == engine.kv_tokens == 0


@dataclass
class Room:
    """A live model with adapters."""

    base: models.Base
    adapters: Adapters
    engine: Engine
    paths: Mapping[str, Path]
    alone: Mapping[str, Any]
    """For each name, the model that answers alone."""


def make_room(tmp_path: Path, quantization: str, limits: Limits = LIMITS) -> Room:
    directory = make_base(tmp_path / "base")
    base = load(directory, quantization)
    model, _ = models.attach_lora(base, LoraConfig(rank=1), seed=0, adapter="base")
    router = routing.Router(is_frozen=True)
    routing.attach(model, router)
    engine = Engine(model, limits, router=router)
    paths = {
        f"r{rank}": make_adapter(tmp_path / f"r{rank}", directory, seed=rank, r=rank, lora_alpha=64)
        for rank in (4, 8, 64)
    }
    alone: dict[str, Any] = {NO_ADAPTER: load(directory, quantization).model}
    for name, path in paths.items():
        alone[name] = adapter.attach(load(directory, quantization).model, path)
    return Room(base, Adapters(base, model, router, engine, limits), engine, paths, alone)


@pytest.fixture(params=["none", "int8"])
def room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Room]:
    made = make_room(tmp_path, request.param)
    thread = threading.Thread(target=made.engine.run)
    thread.start()
    yield made
    made.engine.close()
    thread.join(30)
    assert not thread.is_alive()


async def ask(room: Room, name: str, ids: Sequence[int], num_new: int, **settings: Any) -> Listener:
    version = await room.adapters.acquire(name) if name else None
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    listener = Listener()

    def tell(step: Step) -> None:
        listener(step)
        if step.end:
            loop.call_soon_threadsafe(over.set)

    routed_as = version.routed_as if version else NO_ADAPTER
    room.engine.submit(job(ids, num_new, adapter=routed_as, model=name, **settings), tell)
    await asyncio.wait_for(over.wait(), 60)
    if version:
        room.adapters.release(version)
    return listener


def test_base_and_adapters_of_all_ranks_mixed_answer_as_each_alone(room: Room) -> None:
    async def everything() -> None:
        for name, path in room.paths.items():
            await room.adapters.put(name, path)
        names = list(itertools.islice(itertools.cycle(["", *room.paths]), 12))
        prompts = prompts_of((9, 30, 4, 100, 17, 25, 60, 3, 12, 80, 41, 6))
        heard = await asyncio.gather(
            *(
                ask(room, n, ids, 8 + i)
                for i, (n, ids) in enumerate(zip(names, prompts, strict=True))
            )
        )
        for i, (name, ids, listener) in enumerate(zip(names, prompts, heard, strict=True)):
            assert listener.ids == generated(room.alone[name], ids, 8 + i), (name, len(ids))

    asyncio.run(everything())


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_an_adapter_whose_numbers_break_harms_nobody(room: Room, value: float) -> None:
    prompts = prompts_of((9, 30, 4, 12, 8, 5))

    async def everything() -> None:
        for name, path in room.paths.items():
            await room.adapters.put(name, path)
        good = next(iter(room.adapters._loaded.values()))
        model = room.adapters._model
        factors = {
            path: Factors(
                A_RI=torch.full_like(layer.lora_A[good.routed_as].weight, value),
                B_OR=layer.lora_B[good.routed_as].weight.detach().clone(),
                scaling=1.0,
            )
            for path, layer in model.get_base_model().named_modules()
            if hasattr(layer, "lora_A") and good.routed_as in layer.lora_A
        }
        hang = room.engine.between_steps(lambda: routing.hang(model, "evil", factors))
        await asyncio.wrap_future(hang)
        running = [
            asyncio.create_task(ask(room, name, ids, 60))
            for name, ids in zip(("", "r4", "r8"), prompts, strict=False)
        ]
        evil = Listener()
        room.engine.submit(job(prompts[3], 30, adapter="evil"), evil)
        while not evil.end:
            await asyncio.sleep(0.01)
        late = await ask(room, "", prompts[4], 10)  # where the broken numbers were
        heard = [*(await asyncio.gather(*running)), late]
        assert evil.end == "error"
        for name, ids, listener in zip(("", "r4", "r8"), prompts, heard, strict=False):
            assert listener.ids == generated(room.alone[name], ids, 60), name
        assert late.ids == generated(room.alone[""], prompts[4], 10)

    asyncio.run(everything())


def test_the_same_words_under_other_adapters_share_nothing(room: Room) -> None:
    ids = prompts_of((200,))[0]

    async def everything() -> None:
        for name, path in room.paths.items():
            await room.adapters.put(name, path)
        for _ in range(2):
            for name in ("", *room.paths):
                listener = await ask(room, name, ids, 12)
                assert listener.ids == generated(room.alone[name], ids, 12), name
        assert room.engine.prefixes.hits == 4 * 196
        await room.adapters.put("r4", room.paths["r64"])  # a new version under an old name
        assert (await ask(room, "r4", ids, 12)).ids == generated(room.alone["r64"], ids, 12)

    asyncio.run(everything())


def test_scores_are_those_of_the_model(tmp_path: Path) -> None:
    base = load(make_base(tmp_path / "base"))
    engine = Engine(base.model, LIMITS)
    ids = prompts_of((150,))[0]
    heard = Listener()
    asked = Sampling(temperature=0, num_logprobs=3)
    engine.submit(job(ids, 5, num_prompt_logprobs=2, sampling=asked), heard)
    work(engine)
    whole = torch.tensor([[*ids, *heard.ids]])
    with torch.no_grad():
        logprobs_LV = base.model(whole).logits[0].log_softmax(-1)
    assert [token.id for token in heard.prompt] == ids
    assert heard.prompt[0].logprob is None
    for place, token in enumerate([*heard.prompt, *heard.tokens]):
        if place:
            expected = logprobs_LV[place - 1]
            assert token.logprob == pytest.approx(expected[token.id].item(), abs=1e-4)
            best = expected.topk(len(token.top))
            assert [i for i, _ in token.top] == best.indices.tolist()
            assert [v for _, v in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert {len(token.top) for token in heard.prompt[1:]} == {2}
    assert {len(token.top) for token in heard.tokens} == {3}


def test_a_seed_gives_the_same_answer_in_any_company(tmp_path: Path) -> None:
    base = load(make_base(tmp_path / "base"))
    asked = Sampling(temperature=1.2, top_p=0.9, top_k=50, seed=7)
    ids = prompts_of((20,))[0]
    alone = Listener()
    engine = Engine(base.model, LIMITS)
    engine.submit(job(ids, sampling=asked), alone)
    work(engine)
    engine = Engine(base.model, LIMITS)
    heard, others = Listener(), [Listener() for _ in range(6)]
    for number, other in enumerate(others):
        engine.submit(job(prompts_of((30,), number)[0], sampling=Sampling(seed=number)), other)
    engine.submit(job(ids, sampling=asked), heard)
    work(engine)
    assert heard.ids == alone.ids
    assert heard.ids != generated(base.model, ids, 20)


def test_stop_ids_end_an_answer_and_are_not_told(tmp_path: Path) -> None:
    base = load(make_base(tmp_path / "base"))
    engine = Engine(base.model, LIMITS)
    ids = prompts_of((20,))[0]
    whole = generated(base.model, ids, 20)
    heard = Listener()
    engine.submit(job(ids, stop_ids=frozenset({whole[7]})), heard)
    work(engine)
    assert heard.ids == whole[: whole.index(whole[7])]
    assert heard.end == "stop"


def test_who_is_cancelled_frees_its_place_and_the_others_go_on(tmp_path: Path) -> None:
    base = load(make_base(tmp_path / "base"))
    engine = Engine(base.model, LIMITS)
    prompts = prompts_of((30, 300, 25, 20, 10, 8))
    heard = [Listener() for _ in prompts]
    answers = [
        engine.submit(job(p, 40), listener) for p, listener in zip(prompts, heard, strict=True)
    ]
    for _ in range(3):
        engine.step()
    for gone in (0, 1, 5):  # one that runs, a long prompt on its way, one in the queue
        engine.cancel(answers[gone])
    engine.step()
    assert {heard[gone].end for gone in (0, 1)} == {"cancelled"}
    work(engine)
    assert heard[5].end == "cancelled"
    assert not heard[1].ids
    for kept in (2, 3, 4):
        assert heard[kept].ids == generated(base.model, prompts[kept], 40)
    assert engine.num_running == engine.kv_tokens == len(engine.waiting) == 0


def test_past_its_deadline_an_answer_ends_as_it_is(tmp_path: Path) -> None:
    now = [0.0]
    engine = Engine(load(make_base(tmp_path / "base")).model, LIMITS, clock=lambda: now[0])
    running, waiting = Listener(), [Listener() for _ in range(6)]
    engine.submit(job(prompts_of()[0], 50, deadline=10.0), running)
    engine.step()
    for listener in waiting:
        engine.submit(job(prompts_of()[0], 50, deadline=10.0), listener)
    now[0] = 11.0
    work(engine)
    assert running.end == "deadline"
    assert len(running.ids) >= 1
    assert {listener.end for listener in waiting} == {"deadline"}
    assert engine.num_running == len(engine.waiting) == 0


def test_long_prompts_do_not_stop_others_from_streaming(tmp_path: Path) -> None:
    engine = Engine(load(make_base(tmp_path / "base")).model, LIMITS)
    quick, slow = Listener(), Listener()
    engine.submit(job(prompts_of((5,))[0], 30), quick)
    engine.step()
    engine.submit(job(prompts_of((400,))[0], 5), slow)
    before = len(quick.ids)
    while not slow.ids:
        engine.step()
    assert len(quick.ids) - before >= 400 // LIMITS.prefill_tokens


def test_an_engine_that_breaks_tells_everybody_and_takes_nothing_more(tmp_path: Path) -> None:
    base = load(make_base(tmp_path / "base"))
    engine = Engine(base.model, LIMITS)
    heard = [Listener() for _ in range(6)]
    for listener in heard:
        engine.submit(job(prompts_of()[0]), listener)
    base.model.forward = None  # pyright: ignore
    engine.run()
    assert engine.error is not None
    assert {listener.end for listener in heard} == {"error"}
    with pytest.raises(LorayError, match="stopped"):
        engine.submit(job(prompts_of()[0]), Listener())
    with pytest.raises(LorayError, match="stopped"):
        engine.between_steps(lambda: None)


def test_answers_that_outgrow_the_cache_take_turns_and_end_as_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.admission._EXPECTED_TOKENS", 10)
    base = load(make_base(tmp_path / "base"))
    engine = Engine(base.model, replace(LIMITS, kv_tokens=240))
    prompts = prompts_of((30, 25, 40, 10, 35))
    heard = [Listener() for _ in prompts]
    for ids, listener in zip(prompts, heard, strict=True):
        engine.submit(job(ids, 100, sampling=Sampling(temperature=0, num_logprobs=0)), listener)
    most = most_rows = 0
    while engine.step():
        most, most_rows = max(most, engine.kv_tokens), max(most_rows, engine.num_running)
    assert most <= 240
    assert most_rows > 2
    for ids, listener in zip(prompts, heard, strict=True):
        assert listener.ids == generated(base.model, ids, 100)
        assert len(listener.tokens) == 100


@pytest.mark.parametrize(
    ("crowd", "guest", "makes_way"),
    [
        ([("a", "m")] * 4, ("b", "m"), True),
        ([("a", f"m{number}") for number in range(4)], ("b", "m0"), True),
        ([("a", "m")] * 4, ("a", "n"), True),
        ([("a", "m"), ("a", "n"), ("a", "n"), ("b", "o")], ("a", "p"), True),
        ([("a", "m")] * 4, ("a", "m"), False),
        ([(key, "m") for key in "abcd"], ("e", "m"), False),
        ([("a", f"m{number}") for number in range(4)], ("a", "n"), False),
    ],
)
def test_whoever_has_most_of_a_full_batch_makes_way_for_who_has_nothing(
    tmp_path: Path, crowd: list[tuple[str, str]], guest: tuple[str, str], makes_way: bool
) -> None:
    base = load(make_base(tmp_path / "base"))
    engine = Engine(base.model, LIMITS)
    prompts = prompts_of((30, 25, 40, 10, 35))
    heard = [Listener() for _ in prompts]

    def ask(number: int, whose: tuple[str, str], num_new: int) -> None:
        key, model = whose
        engine.submit(job(prompts[number], num_new, key=key, model=model), heard[number])

    for number, whose in enumerate(crowd):
        ask(number, whose, 60)
        engine.step()
    for _ in range(5):
        engine.step()
    ask(4, guest, 3)
    for _ in range(2):
        engine.step()
    assert bool(heard[4].end) == makes_way
    assert engine.num_running == LIMITS.rows - makes_way
    assert len(engine.waiting) == 1
    work(engine)
    for ids, listener in zip(prompts, heard, strict=True):
        assert listener.end == "length"
        assert listener.ids == generated(base.model, ids, len(listener.ids))
    assert [len(listener.ids) for listener in heard] == [60, 60, 60, 60, 3]


def test_guests_without_end_do_not_keep_who_made_way_from_ending(tmp_path: Path) -> None:
    base = load(make_base(tmp_path / "base"))
    engine = Engine(base.model, LIMITS)
    crowd = [Listener() for _ in range(5)]
    for listener in crowd:
        engine.submit(job(prompts_of()[0], 40, key="a"), listener)
    for number in range(1000):
        engine.submit(job(prompts_of()[2], 1, key=f"guest{number}"), Listener())
        engine.step()
        if all(listener.end for listener in crowd):
            break
    assert number < 400


def test_an_order_that_nobody_waits_for_is_left_out_and_harms_nobody(tmp_path: Path) -> None:
    engine = Engine(load(make_base(tmp_path / "base")).model, LIMITS)
    done: list[str] = []
    gone = engine.between_steps(lambda: done.append("gone"))
    assert gone.cancel()
    kept = engine.between_steps(lambda: done.append("kept"))
    engine.step()
    assert kept.done()
    assert done == ["kept"]


def test_many_threads_submit_and_cancel_and_nothing_is_left(tmp_path: Path) -> None:
    engine = Engine(load(make_base(tmp_path / "base")).model, LIMITS)
    thread = threading.Thread(target=engine.run)
    thread.start()
    ends: list[str] = []

    def client(number: int) -> None:
        over = threading.Event()
        listener = Listener()

        def tell(step: Step) -> None:
            listener(step)
            if step.end:
                ends.append(listener.end)
                over.set()

        answer = engine.submit(job(prompts_of((3 + number % 50,), number)[0], 10), tell)
        if number % 3 == 0:
            engine.cancel(answer)
        assert over.wait(60)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(client, range(60)))
    engine.close()
    thread.join(30)
    assert len(ends) == 60
    assert set(ends) <= {"length", "cancelled"}
    assert engine.num_running == engine.kv_tokens == len(engine.waiting) == 0
