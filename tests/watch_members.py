"""Prints the head's table whenever it changes: `python -m watch_members HOST:PORT`.

One JSON object a line: seconds since 1970, and how many nodes of each address are alive.
"""

import json
import sys
import time
from collections import Counter

from cluster import members
from cluster.errors import ClusterError


def main(address: str) -> None:
    seen: object = None
    while True:
        try:
            table = members.ask(address, timeout_s=1.0)
            alive = dict(Counter(row.host for row in table if row.is_alive))
        except ClusterError:
            alive = None
        if alive != seen:
            print(json.dumps({"time": time.time(), "alive": alive}), flush=True)
            seen = alive
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1])
