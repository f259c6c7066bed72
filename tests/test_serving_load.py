"""What a server bears: poisoned adapters, clients that vanish, crawl or send rubbish."""

import gc
import json
import os
import random
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from server import Running, serving, until
from test_training_adapter import edit_config, edit_tensors, make_adapter

CHAT: Any = [{"role": "user", "content": "Say red please"}]
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ROUNDS = 1000
_SLOPE_BYTES = 60 << 20
"""What a thousand requests may leave in an allocator's caches."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("load")
    first = make_adapter(directory / "first", tiny_base, seed=1)
    with serving(directory, tiny_base, adapters=[{"name": "first", "path": str(first)}]) as server:
        yield server


def spoken(running: Running) -> Any:
    """What the base and the good adapter say, to the last bit of their log probabilities."""
    found = []
    for model in (running.replica.service.base.name, "first"):
        answer = running.client.chat.completions.create(
            model=model, messages=CHAT, temperature=0, max_tokens=8, logprobs=True, top_logprobs=5
        )
        assert answer.choices[0].logprobs
        found.append(answer.choices[0].logprobs.model_dump())
    return found


def swap_config(adapter: Path, **fields: Any) -> None:
    edit_config(adapter, **fields)


def claim_much(adapter: Path) -> None:
    entry = {"dtype": "F32", "shape": [200_000, 4096], "data_offsets": [0, 3_276_800_000]}
    header = json.dumps({KEY: entry}).encode()
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def cut(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def link_out(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.safetensors").symlink_to("/etc/passwd")


POISONS: dict[str, Callable[[Path], Any]] = {
    "nan": lambda a: edit_tensors(a, lambda t: t[KEY].fill_(float("nan"))),
    "inf": lambda a: edit_tensors(a, lambda t: t[KEY].fill_(float("inf"))),
    "huge when scaled": lambda a: edit_tensors(
        a, lambda t: [v.fill_(3e38) for k, v in t.items() if "_B" in k]
    ),
    "no-op": lambda a: edit_tensors(a, lambda t: [v.zero_() for k, v in t.items() if "_B" in k]),
    "one matrix less": lambda a: edit_tensors(a, lambda t: t.pop(KEY)),
    "one tensor more": lambda a: edit_tensors(a, lambda t: t.update(x=torch.ones(2))),
    "a shape": lambda a: edit_tensors(a, lambda t: t.update({KEY: torch.ones(4, 31)})),
    "a dtype": lambda a: edit_tensors(a, lambda t: t.update({KEY: t[KEY].int()})),
    "rank": lambda a: swap_config(a, r=1 << 20),
    "target": lambda a: edit_tensors(
        a, lambda t: t.update({k.replace("layers.0", "layers.9"): t.pop(k) for k in list(t)})
    ),
    "pissa": lambda a: swap_config(a, init_lora_weights="pissa_niter_4", r=8),
    "saved modules": lambda a: swap_config(a, modules_to_save=["lm_head"]),
    "another kind": lambda a: swap_config(a, peft_type="LOHA"),
    "claims much": claim_much,
    "half copied": cut,
    "pickled": pickled,
    "link": link_out,
    "no config": lambda a: (a / "adapter_config.json").unlink(),
    "config": lambda a: (a / "adapter_config.json").write_text('{"r": ' * 2000),
}


def test_a_thousand_poisoned_adapters_change_nothing(running: Running, tiny_base: Path) -> None:
    root = Path(running.replica.registry.entries()["first"].path).parent
    for name, poison in POISONS.items():
        poison(Path(shutil.copytree(root / "first", root / "poison" / name)))
    spoken(running)  # from now on the prompt is known, and takes the same way each time
    before = spoken(running)
    names = list(POISONS)
    for round_ in range(ROUNDS):
        name = names[round_ % len(names)]
        answer = running.post("/v1/adapters", {"name": "evil", "path": f"poison/{name}"})
        assert answer.status_code == 400, name
        assert answer.json()["error"]["message"], name
    assert spoken(running) == before
    assert [m.id for m in running.client.models.list()].count("evil") == 0


def raw_request(running: Running, body: dict[str, Any]) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    client = socket.create_connection((host, int(port)), timeout=30)
    client.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: " + str(len(data)).encode() + b"\r\n\r\n" + data
    )
    return client


def long_answer(running: Running, **more: Any) -> dict[str, Any]:
    base = running.replica.service.base
    letter = str(base.tokenizer("A").input_ids[0])
    return {
        "model": base.name, "messages": CHAT, "max_tokens": 450, "stream": True,
        "logit_bias": {letter: 100}, **more,
    }  # fmt: skip


def test_a_hundred_clients_that_vanish_leave_nothing(running: Running) -> None:
    engine = running.replica.service.base.engine
    process = psutil.Process()
    running.client.models.list()
    until(lambda: engine.num_running == 0)
    files = process.num_fds()
    for number in range(100):
        client = raw_request(running, long_answer(running, stream=number % 2 == 0))
        if number % 3:
            until(lambda: engine.num_running > 0)
        client.close()
    until(lambda: engine.num_running == 0 and len(engine.waiting) == 0)
    assert engine.kv_tokens == 0
    until(lambda: process.num_fds() <= files + 2)


def test_a_client_that_never_reads_holds_up_nobody(running: Running) -> None:
    engine = running.replica.service.base.engine
    slow = [raw_request(running, long_answer(running, max_tokens=400)) for _ in range(3)]
    try:
        for _ in range(3):
            spoken(running)
        until(lambda: engine.num_running == 0)  # their answers end all the same
    finally:
        for client in slow:
            client.close()


def rubbish(generator: random.Random, model: str) -> bytes:
    """A body that is near to a good one, or far from it."""
    body: dict[str, Any] = {"model": model, "messages": CHAT, "max_tokens": 2}
    odd: list[Any] = [
        None, -1, 1 << 70, 1e400, "", "x" * 3000, [], {}, [[]], {"type": "x"}, "\udfff", True, -0.5,
        ["stop"] * 9, {"1": 1e9}, {"a": 1},
    ]  # fmt: skip
    fields = [
        "model", "messages", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "tools",
        "logit_bias", "response_format", "stream", "stream_options", "logprobs", "user", "nonsense",
    ]  # fmt: skip
    for _ in range(generator.randint(1, 3)):
        body[generator.choice(fields)] = generator.choice(odd)
    data = json.dumps(body).encode()
    if generator.random() < 0.3:
        place = generator.randrange(len(data))
        data = data[:place] + os.urandom(3) + data[place + 3 :]
    return data


def test_bad_requests_by_the_thousand_are_refused_and_leave_nothing(running: Running) -> None:
    engine = running.replica.service.base.engine
    model = running.replica.service.base.name
    process = psutil.Process()
    statuses: list[int] = []

    def send(seed: int) -> None:
        generator = random.Random(seed)
        with requests.Session() as session:
            for _ in range(ROUNDS // 4):
                answer = session.post(
                    f"{running.url}/v1/chat/completions",
                    data=rubbish(generator, model),
                    headers={"Content-Type": "application/json"},
                    timeout=60,
                )
                statuses.append(answer.status_code)
                if answer.status_code != 200:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
                    assert answer.headers["x-request-id"]

    def wave(start: int) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(send, range(start, start + 4)))

    wave(0)  # caches fill
    gc.collect()
    files, memory = process.num_fds(), process.memory_info().rss
    wave(4)
    gc.collect()
    assert max(statuses) < 500
    assert statuses.count(200) < len(statuses) / 2
    assert process.memory_info().rss - memory < _SLOPE_BYTES
    assert process.num_fds() <= files + 4
    until(lambda: engine.num_running == 0)
    assert (engine.kv_tokens, len(engine.waiting)) == (0, 0)
    assert threading.active_count() < 60
