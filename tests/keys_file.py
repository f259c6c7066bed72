"""Keys files as an operator writes them."""

import secrets
from pathlib import Path
from typing import Any

import yaml

from cluster.registry.keys import hash_of


def add_key(path: Path, name: str, **fields: Any) -> str:
    """Write one more key into a file, which is made if need be; the key."""
    id_, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    rows = yaml.safe_load(path.read_text())["keys"] if path.exists() else []
    rows.append({"id": id_, "name": name, "hash": hash_of(secret), **fields})
    path.touch(0o600)
    path.write_text(yaml.safe_dump({"keys": rows}))
    return f"sk-loray-{id_}-{secret}"


def remove_key(path: Path, key: str) -> None:
    """Take a key out of a file."""
    id_ = key.split("-")[2]
    rows = yaml.safe_load(path.read_text())["keys"]
    path.write_text(yaml.safe_dump({"keys": [row for row in rows if row["id"] != id_]}))


def change_first(path: Path, **fields: object) -> None:
    """Change fields of the first key of a file."""
    tree = yaml.safe_load(path.read_text())
    tree["keys"][0].update(fields)
    path.write_text(yaml.safe_dump(tree))
