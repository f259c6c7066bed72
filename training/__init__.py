"""What a fine-tune is: examples, tokens, model, loss, loop, checkpoint, merge."""

import os

# Torch (2.10 to 2.13) reads it at its first allocation: pages of 2 MB instead of 4 kB for large
# tensors on CPU. Activations are given back and taken again with every pass; without it a process
# may spend up to a seventh of its time in page faults, depending on where its heap happens to lie.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
