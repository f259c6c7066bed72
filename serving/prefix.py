"""Keys and values of prompts that were seen before, page by page.

A page's name is a hash over the adapter, all tokens before it and its own, so the same words under
two adapters never share (transformers 5.23 hashes tokens only, and answers with the wrong cache).
An adapter's new version has a new name, so what the old one left is never found, and ages out.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from serving.kv import KeyValues


class Prefixes:
    """The pages that were used last, up to a number of tokens."""

    def __init__(self, *, page: int, max_tokens: int) -> None:
        """page: tokens of a page."""
        self.page = page
        self._max_pages = max_tokens // page
        self._pages: OrderedDict[bytes, KeyValues] = OrderedDict()
        self.hits = 0
        """Tokens that were found."""

    def find(self, adapter: str, prompt_ids: Sequence[int]) -> list[KeyValues]:
        """The pages that a prompt begins with. The last token is never among them: it must go
        through the model to be answered."""
        names: list[bytes] = []
        for name, stop in self._names(adapter, prompt_ids):
            if stop >= len(prompt_ids) or name not in self._pages:
                break
            names.append(name)
        for name in reversed(names):
            self._pages.move_to_end(name)
        found = [self._pages[name] for name in names]
        self.hits += len(found) * self.page
        return found

    def keep(self, adapter: str, prompt_ids: Sequence[int], sequence: KeyValues) -> None:
        """Keep the whole pages of a prompt, which `sequence` holds; they are copied."""
        for name, stop in reversed([*self._names(adapter, prompt_ids)]):  # the last age first
            if name not in self._pages:
                part = slice(stop - self.page, stop)
                self._pages[name] = [
                    (keys[:, part].clone(), values[:, part].clone()) for keys, values in sequence
                ]
            self._pages.move_to_end(name)
        while len(self._pages) > self._max_pages:
            self._pages.popitem(last=False)

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept."""
        return len(self._pages) * self.page

    def _names(self, adapter: str, ids: Sequence[int]) -> Iterator[tuple[bytes, int]]:
        """Name of each whole page, and the number of tokens up to its end."""
        if not self._max_pages:
            return
        name = hashlib.blake2b(adapter.encode(), digest_size=16).digest()
        for stop in range(self.page, len(ids) + 1, self.page):
            body = np.asarray(ids[stop - self.page : stop], dtype=np.int64).tobytes()
            name = hashlib.blake2b(name + body, digest_size=16).digest()
            yield name, stop
