"""Replicas that die and are replaced while clients ask, under Ray Serve."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml
from local_cluster import local_cluster
from openai import APIError, OpenAI
from processes import call, finish, start, wait_until
from test_serving_app import CHAT, wait_for, write
from test_training_adapter import make_adapter

CLIENTS = 8
REPLICA = "ray::ServeReplica:loray"


def replicas(driver: int) -> list[int]:
    """Process ids of the replicas below a process."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(REPLICA):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


class Crowd:
    """Clients that ask over and over, half of them for streams, and note what they got."""

    def __init__(self, url: str, model: str) -> None:
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self._model = model
        self._over = threading.Event()
        self.texts: set[str] = set()
        self.num_answers = 0
        self.broken_streams: list[str] = []
        self.failures: list[str] = []
        self._threads = [
            threading.Thread(target=self._ask, args=(number % 2 == 0,)) for number in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, is_stream: bool) -> None:
        settings: Any = {"model": self._model, "messages": CHAT, "temperature": 0, "max_tokens": 12}
        while not self._over.is_set():
            has_begun = False
            try:
                if is_stream:
                    text = ""
                    for chunk in self._client.chat.completions.create(**settings, stream=True):
                        has_begun = True
                        text += chunk.choices[0].delta.content or ""
                else:
                    answer = self._client.chat.completions.create(**settings)
                    text = answer.choices[0].message.content or ""
                self.texts.add(text)
                self.num_answers += 1
            except APIError as error:
                (self.broken_streams if has_begun else self.failures).append(repr(error))
            except Exception as error:  # a connection that was cut
                self.failures.append(repr(error))

    def wait_for(self, more: int, process: Any) -> None:
        """Until there are so many more answers."""
        target = self.num_answers + more
        wait_until(lambda: self.num_answers >= target, process)

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()


@pytest.mark.ray
@pytest.mark.chaos
def test_a_replica_that_is_killed_costs_its_streams_alone(tmp_path: Path, tiny_base: Path) -> None:
    make_adapter(tmp_path / "first", tiny_base, seed=1)
    path, url = write(
        tmp_path,
        tiny_base,
        adapters=[{"name": "first", "path": str(tmp_path / "first")}],
        replicas=2,
        cpus_per_replica=1,
    )
    process = start(["serving", path.name], tmp_path)
    try:
        wait_for(f"{url}/healthz", process)
        wait_until(lambda: len(replicas(process.pid)) == 2, process)
        crowd = Crowd(url, "first")
        try:
            crowd.wait_for(40, process)
            killed = replicas(process.pid)[0]
            os.kill(killed, signal.SIGKILL)
            crowd.wait_for(40, process)
            wait_until(lambda: len(set(replicas(process.pid)) - {killed}) == 2, process)
            crowd.wait_for(40, process)
        finally:
            crowd.end()
        assert crowd.failures == []
        assert len(crowd.broken_streams) <= CLIENTS // 2
        assert all("has died" in text for text in crowd.broken_streams)
        assert len(crowd.texts) == 1
        # A new adapter is known to both, and to one that comes after it.
        make_adapter(tmp_path / "second", tiny_base, seed=2)
        status, _, err = call(
            ["loray", "adapters", "add", "second", "second", "--url", url], tmp_path
        )
        assert status == 0, err
        for victim in replicas(process.pid):
            os.kill(victim, signal.SIGKILL)
        crowd = Crowd(url, "second")
        try:
            crowd.wait_for(40, process)
        finally:
            crowd.end()
        assert len(crowd.texts) == 1
        assert all("50" in text for text in crowd.failures), crowd.failures
    finally:
        os.kill(process.pid, signal.SIGINT)
        status, _, err = finish(process)
    assert status == 0, err


@pytest.mark.ray
@pytest.mark.chaos
def test_replicas_share_an_alias_also_with_one_that_comes_later(
    tmp_path: Path, tiny_base: Path
) -> None:
    for seed, name in enumerate(("v7", "v8"), start=1):
        make_adapter(tmp_path / name, tiny_base, seed=seed)
    adapters = [{"name": name, "path": str(tmp_path / name)} for name in ("v7", "v8")]
    path, url = write(tmp_path, tiny_base, adapters=adapters, replicas=2, cpus_per_replica=1)
    process = start(["serving", path.name], tmp_path)
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8, timeout=120)

    def set_(**weights: int) -> None:
        targets = [{"model": model, "weight": weight} for model, weight in weights.items()]
        requests.post(
            f"{url}/v1/aliases", json={"name": "bot", "targets": targets}, timeout=60
        ).raise_for_status()

    def ask(user: str) -> str:
        answer = client.chat.completions.create(model="bot", messages=CHAT, max_tokens=1, user=user)
        return answer.model

    users = [f"user {number}" for number in range(24)]
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            versions = lambda: [*pool.map(ask, users)]  # noqa: E731
            wait_for(f"{url}/healthz", process)
            wait_until(lambda: len(replicas(process.pid)) == 2, process)
            for model in ("v7", "v8"):
                wait_until(lambda name=model: is_served(url, name), process)
            set_(v7=50, v8=50)
            first = versions()  # at once: a replica that has not heard of it asks the registry
            assert set(first) == {"v7", "v8"}
            assert versions() == first
            older = replicas(process.pid)
            for victim in older:  # so that each of the others answers alone for a while
                os.kill(victim, signal.SIGKILL)
                assert versions() == first
                wait_until(lambda gone=victim: is_replaced(process.pid, gone), process)
            assert not set(older) & set(replicas(process.pid))
            assert versions() == first
            set_(v8=1)
            wait_until(lambda: set(versions()) == {"v8"}, process)
            rolled = requests.post(f"{url}/v1/aliases/bot/rollback", json={}, timeout=60)
            rolled.raise_for_status()
            wait_until(lambda: versions() == first, process)
    finally:
        os.kill(process.pid, signal.SIGINT)
        status, _, err = finish(process)
    assert status == 0, err


def is_served(url: str, model: str) -> bool:
    listed = requests.get(f"{url}/v1/models", timeout=60).json()["data"]
    return model in [row["id"] for row in listed]


def is_replaced(driver: int, victim: int) -> bool:
    living = replicas(driver)
    return len(living) == 2 and victim not in living


@pytest.mark.ray
@pytest.mark.chaos
def test_a_deployed_config_is_updated_without_a_failed_request(
    tmp_path: Path, tiny_base: Path
) -> None:
    path, url = write(tmp_path, tiny_base, cpus_per_replica=1)
    status, out, err = call(["loray", "serve", path.name, "--config"], tmp_path)
    assert status == 0, err
    tree = yaml.safe_load(out)
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(tree))
    settings = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.front:middlewares",
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        with local_cluster(num_cpus=4) as cluster:
            words = ["ray.serve.scripts", "deploy", str(plan), "-a", cluster.jobs_address]
            extra = {name: value or "" for name, value in cluster.credentials.items()}
            status, _, err = call(words, tmp_path, extra)
            assert status == 0, err
            deadline = time.monotonic() + 120
            while not answers(url):
                assert time.monotonic() < deadline, "nothing was deployed"
                time.sleep(0.2)
            process = start(["http.server", "0"], tmp_path)  # something that lives on
            crowd = Crowd(url, tiny_base.name)
            try:
                crowd.wait_for(40, process)
                assert capacity(url) == 1024
                tree["applications"][0]["args"]["recipe"]["limits"]["kv_tokens"] = 2048
                plan.write_text(yaml.safe_dump(tree))
                status, _, err = call(words, tmp_path, extra)
                assert status == 0, err
                wait_until(lambda: capacity(url) == 2048, process)
                crowd.wait_for(40, process)
            finally:
                crowd.end()
                process.kill()
                process.communicate()
            assert crowd.failures == []
            assert crowd.broken_streams == []
            assert len(crowd.texts) == 1


def answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/healthz", timeout=5).ok
    except requests.RequestException:
        return False


def capacity(url: str) -> int:
    """Tokens that the cache of the replica that answers has room for."""
    lines = requests.get(f"{url}/metrics", timeout=30).text.splitlines()
    return int(float(next(x for x in lines if x.startswith("loray_kv_capacity")).split()[-1]))
