"""`python -m ask_over_and_over URL MODEL`: ask a server ten times a second, one line an answer.

A JSON list a line: seconds since 1970, and the status, or the name of what went wrong.
"""

import json
import sys
import time

import requests


def main(url: str, model: str) -> None:
    chat = [{"role": "user", "content": "Say red please"}]
    body = {"model": model, "messages": chat, "max_tokens": 4}
    while True:
        asked = time.time()
        try:
            answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=5)
            status: object = answer.status_code
        except requests.RequestException as error:
            status = type(error).__name__
        print(json.dumps([asked, status]), flush=True)
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
