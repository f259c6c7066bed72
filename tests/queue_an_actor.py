"""Fills a node, has a second actor wait for it, and frees it once told:
`python -m queue_an_actor HOST:PORT NODE_IP`. Says `waits`, and how long the second then took.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import ray


@ray.remote(num_cpus=1)
class Tenant:
    def ping(self) -> None:
        pass


def main(address: str, node_ip: str) -> None:
    ray.init(address, logging_level=logging.ERROR)
    actor: Any = Tenant
    tenant = actor.options(resources={f"node:{node_ip}": 0.001})
    first = tenant.remote()
    ray.get(first.ping.remote())
    second = tenant.remote()
    time.sleep(3)
    print("waits", flush=True)
    while not Path("go").exists():
        time.sleep(0.1)
    began = time.monotonic()
    ray.kill(first)
    ray.get(second.ping.remote(), timeout=240)
    print(f"answered {time.monotonic() - began:.1f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
