"""Real jobs on a real cluster, while everything that serves them is killed, one after the other.

The replica with the API, the one that dispatches, drivers of jobs, the head's control service
(whose state Redis keeps) and the database server. Needs root and Linux, for network namespaces.
`-s` shows what was killed.
"""

import json
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import chaos
import psutil
import pytest
import requests
import yaml
from jobs_under_faults import Lookers, Owner, check_all, is_over, statuses
from machines import Cluster, cluster
from netns import Host, wait_for
from openai import OpenAI
from postgres import PostgresServer
from sqlalchemy import select

from cluster.registry import database
from cluster.registry.tables import Model

pytestmark = [pytest.mark.ray, pytest.mark.chaos, chaos.full]

URL = "http://127.0.0.1:8000"
"""At the head: Serve listens there, and where it has put a replica."""
NUM_JOBS = chaos.times(4, 50)
ROUNDS = chaos.times(1, 8)
"""How often each is killed; the head, whose return takes a minute, half as often."""
API, TUNER = "ray::ServeReplica:loray:", "ray::ServeReplica:loray-jobs:"
SETTINGS = {
    "method": {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 5}},
    }
}


def serve_on(here: Cluster, directory: Path, base: Path, url: str) -> "subprocess.Popen[str]":
    """`python -m serving` with fine-tuning, its driver on b."""
    secret = directory / "database"
    secret.touch(0o600)
    secret.write_text(url)
    tree = {
        "model": {"base": str(base), "quantization": "none"},
        "http": {"port": 8000},
        "limits": {"rows": 4, "context_tokens": 256, "kv_tokens": 1024, "prefix_tokens": 256},
        "cpus_per_replica": 1,
        "database": f"file:{secret}",
        "tuning": {
            "storage": str(directory / "runs"),
            "jobs_at_once": 2,
            "attempts": 50,
            "recipe": ["data.max_length=128"],
            "jobs_api": f"http://{here.head.ip}:8265",
        },
    }
    path = directory / "serve.yaml"
    path.write_text(yaml.safe_dump(tree))
    b = here.nodes[0]
    driver = b.start(["serving", str(path), "--address", here.address], log="serve")

    def serves() -> bool:
        assert driver.poll() is None, b.said("serve")
        return f"and the head, listen: now {here.head.ip}" in b.said("serve")

    wait_for(serves, 240, "it serves")
    return driver


def replicas(here: Cluster, name: str) -> list[psutil.Process]:
    return [process for host in (here.head, *here.nodes) for process in host.processes(name)]


def drivers(here: Cluster, runs: Path) -> list[psutil.Process]:
    """Those of jobs, on the head: `python -m training`."""
    found = []
    for process in here.head.processes("python"):
        words = process.cmdline()
        if "training" in words and any(str(runs) in word for word in words):
            found.append(process)
    return found


def on(host: Host, act: Callable[[], object]) -> object:
    """What comes of a call whose sockets are of that machine."""
    results: list[object] = []

    def run() -> None:
        host.enter()
        results.append(act())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(120)
    return results[0]


def submitted(here: Cluster) -> list[str]:
    """Ids of all jobs of ours that the cluster knows, in any state."""
    token = (here.head.directory.parent / "token").read_text().strip()
    answer = requests.get(
        f"http://{here.head.ip}:8265/api/jobs/",
        headers={"Authorization": f"Bearer {token}"},
        timeout=30,
    )
    ids = [job["submission_id"] for job in answer.json()]
    return [id_ for id_ in ids if id_ and id_.startswith("ftjob-")]


class Killer:
    """Kills by name, and says whether there was one."""

    def __init__(self, here: Cluster, server: PostgresServer, runs: Path) -> None:
        self._here, self._server, self._runs = here, server, runs
        self.kills = Counter[str]()
        self._num_heads = 1

    def kill(self, name: str, *, away_s: float) -> bool:
        if name == "database":
            self._server.kill()
            time.sleep(away_s)
            self._server.start()
        elif name == "head":
            self._here.kill_head()
            self._num_heads += 1
            is_back = lambda: self._here.num_starts(self._here.head) >= self._num_heads  # noqa: E731
            wait_for(is_back, 120, "the head is back")
        else:
            victims = {
                "API replica": lambda: replicas(self._here, API),
                "dispatcher": lambda: replicas(self._here, TUNER),
                "job driver": lambda: drivers(self._here, self._runs),
            }[name]()
            for victim in victims:
                victim.kill()
            if not victims:
                return False
        self.kills[name] += 1
        return True


@pytest.mark.timeout(3600)
def test_every_job_over_http_ends_as_it_should_and_once_whatever_is_killed(
    tmp_path: Path, tiny_base: Path, own_postgres: PostgresServer
) -> None:
    dice, runs = random.Random(7), tmp_path / "runs"
    url = own_postgres.make_database(is_local=True)
    names = ["API replica", "dispatcher", "job driver", "database"] * ROUNDS
    names += ["head"] * max(1, ROUNDS // 2)
    dice.shuffle(names)
    opened = database.open_(url)
    with cluster(has_redis=True, has_jobs_api=True) as here:
        b = here.nodes[0]
        serve_on(here, tmp_path, tiny_base, url)
        killer = Killer(here, own_postgres, runs)
        began = time.monotonic()
        owner = Owner(
            URL, tiny_base.name, NUM_JOBS, has_keys=True, settings=SETTINGS, enter=here.head.enter
        )
        lookers = Lookers(URL, period_s=0.5, enter=here.head.enter)
        try:
            deadline = began + chaos.times(900, 3300)
            while not (owner.is_done() and is_over(opened)):
                assert time.monotonic() < deadline, (statuses(opened), killer.kills)
                time.sleep(dice.uniform(2, chaos.times(8, 16)))
                if names and killer.kill(names[-1], away_s=dice.uniform(0.5, 3.0)):
                    names.pop()
        except BaseException:
            print(b.said("serve"))
            raise
        finally:
            owner.end()
            lookers.end()
        took_s = time.monotonic() - began
        known = on(here.head, lambda: submitted(here))
        assert isinstance(known, list)
        check_all(opened, owner.wanted, known, runs)
        client = OpenAI(base_url=f"{URL}/v1", api_key="none")
        with opened.read() as session:
            name = session.scalar(select(Model.name).where(Model.step.is_(None)))
        assert name is not None
        assert on(
            here.head, lambda: client.completions.create(model=name, prompt="a", max_tokens=2)
        )
        print(f"figure: {dict(Counter(owner.wanted.values()))} jobs in {took_s:.0f} s")
        print(f"figure: killed {json.dumps(killer.kills)}; runs started {len(known)}")
        print(f"figure: lists were answered {dict(lookers.answers)}")
    opened.close()
