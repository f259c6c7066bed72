"""Greedy generation in static batches, for evaluation and for one prompt from the shell.

What is covered: a base, a PeftModel with its active adapter, and one whose adapter is disabled.
What is not covered: sampling, streaming, many adapters at once; that is the serving engine's.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cluster.errors import DataError
from training import adapter as adapters
from training import special_ids


@torch.no_grad()
def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    batch_size: int,
    pad_id: int,
    on_progress: Callable[[int], None] = lambda _: None,
    route: Callable[[Sequence[int]], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> list[str]:
    """The most likely continuation of each prompt, up to a stop id, special tokens left out.

    Prompts of like length share a batch and are padded on the left. `on_progress` gets the number
    of prompts answered so far; `route` the numbers of the prompts of a batch, row by row, to say
    which adapter answers each. Raises DataError for an empty prompt and for one that leaves no
    room for an answer.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    bare = cast(PreTrainedModel, inner)
    limit = getattr(bare.config, "max_position_embeddings", None)
    for number, prompt in enumerate(prompts):
        if not prompt or (limit is not None and len(prompt) >= limit):
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens; allowed: 1 to {(limit or 0) - 1 or '-'}"
                " (the model's context, less one token of answer): shorten it"
            )
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    with _answering(bare, stop_ids, pad_id):
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            length = max(len(prompts[number]) for number in numbers)
            room = max_new_tokens if limit is None else min(max_new_tokens, limit - length)
            with route(numbers):
                new_BL = _continue(model, [prompts[n] for n in numbers], room, pad_id)
            for number, ids in zip(numbers, new_BL, strict=True):
                answers[number] = _decode(tokenizer, ids, stop_ids)
            on_progress(start + len(numbers))
    return answers


def answer(
    adapter: str, prompt: str, *, system: str | None, base: str | None, max_new_tokens: int
) -> str:
    """What the adapter (a directory, or the word `base` for the bare base) says to one prompt."""
    if not prompt.strip():
        raise DataError("the prompt is empty; say something to the model")
    loaded, model = adapters.load(adapter, base=base)
    stops = special_ids.stop_ids(loaded.tokenizer, loaded.generation_eos)
    encoder = adapters.encoder_for(adapter, loaded)
    with loaded.autocast():
        return generate(
            model,
            loaded.tokenizer,
            [encoder.prompt_ids_of_text(prompt, system)],
            max_new_tokens=max_new_tokens,
            stop_ids=stops,
            batch_size=1,
            pad_id=special_ids.choose_pad_id(loaded.tokenizer),
        )[0]


def _continue(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    pad_id: int,
) -> list[list[int]]:
    length = max(map(len, prompts))
    device = next(model.parameters()).device
    ids_BL = torch.full((len(prompts), length), pad_id)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, length - len(prompt) :] = torch.tensor(prompt)
        mask_BL[row, length - len(prompt) :] = 1
    out_BL: Any = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids_BL.to(device),
        attention_mask=mask_BL.to(device),
        max_new_tokens=max_new_tokens,
    )
    return out_BL[:, length:].tolist()


def _decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_ids: Collection[int]
) -> str:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    text = tokenizer.decode(
        list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


@contextmanager
def _answering(model: PreTrainedModel, stop_ids: Collection[int], pad_id: int) -> Iterator[None]:
    """Eval mode, cache and greedy settings inside the block; all as before after it.

    The model's own generation settings are set aside, not overridden: `generate` fills what is
    left open from them, and warns about a temperature that greedy search does not use.
    """
    before = (model.config.use_cache, model.generation_config)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(stop_ids),
        pad_token_id=pad_id,
    )
    try:
        yield
    finally:
        model.config.use_cache, model.generation_config = before
        for module, mode in modes.items():
            module.training = mode
