"""Which token ids stop generation, which one fills rows, and whether they fit the model."""

from typing import cast

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from cluster.errors import ModelError


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, generation_eos: int | list[int] | None
) -> frozenset[int]:
    """Ids at which generation stops: the tokenizer's eos and the generation config's."""
    return frozenset({*_listed(tokenizer.eos_token_id), *_listed(generation_eos)})


def choose_pad_id(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None) -> int:
    """The id that fills rows: the tokenizer's pad token unless it is its eos, else another special
    token that is not its eos, else eos after all. No token is ever added.

    Nothing depends on the choice but how a row looks: labels are set by position, and padding is
    masked or behind everything real. `vocab_size` (rows of the embedding) excludes ids beyond it.
    """
    eos = tokenizer.eos_token_id

    def is_usable(token_id: object) -> bool:
        is_inside = vocab_size is None or (isinstance(token_id, int) and token_id < vocab_size)
        return isinstance(token_id, int) and token_id >= 0 and token_id != eos and is_inside

    if is_usable(tokenizer.pad_token_id):
        return cast(int, tokenizer.pad_token_id)
    added = sorted(
        (token_id, token.content.lower())
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and is_usable(token_id)
    )
    for word in ("pad", "reserved", "unused"):
        for token_id, content in added:
            if word in content:
                return token_id
    for token_id in (tokenizer.unk_token_id, *(token_id for token_id, _ in added)):
        if is_usable(token_id):
            return cast(int, token_id)
    return cast(int, eos) if isinstance(eos, int) else 0


def check_special_ids(
    tokenizer: PreTrainedTokenizerBase,
    model_config: PretrainedConfig,
    generation_eos: int | list[int] | None,
) -> None:
    """Raise ModelError where tokenizer and model disagree on bos or eos, or an id is out of range.

    The wrong ids of early Llama conversions trained models that never stopped (alpaca-lora #279).
    An id that is None on either side is no disagreement, nor is an eos that is one of several.
    """
    config = model_config.get_text_config()
    advice = (
        "use the tokenizer that belongs to this model, or correct config.json or "
        "tokenizer_config.json, whichever is wrong"
    )
    for name, given, known in (
        ("bos", tokenizer.bos_token_id, _listed(getattr(config, "bos_token_id", None))),
        (
            "eos",
            tokenizer.eos_token_id,
            _listed(getattr(config, "eos_token_id", None)) + _listed(generation_eos),
        ),
    ):
        if given is not None and known and given not in known:
            wanted = " or ".join(map(str, dict.fromkeys(known)))
            raise ModelError(
                f"the tokenizer's {name}_token_id is {given}, the model's is {wanted}; {advice}"
            )
    for token_id in sorted(
        {*stop_ids(tokenizer, generation_eos), *_listed(tokenizer.bos_token_id)}
    ):
        if not 0 <= token_id < config.vocab_size:
            raise ModelError(
                f"special token id {token_id} is outside the model's vocabulary "
                f"(0..{config.vocab_size - 1}); {advice}"
            )


def _listed(ids: object) -> list[int]:
    """The ids in one, several or none."""
    several = ids if isinstance(ids, list | tuple) else (ids,)
    return [token_id for token_id in several if isinstance(token_id, int)]
