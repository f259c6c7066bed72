"""Real things, only tiny: a byte-level tokenizer and random models of eight architectures."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB_SIZE = 260

_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2},
    "qwen3": {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": {**_SIZES, "intermediate_size": 64},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},
    "falcon": {**_SIZES, "alibi": True, "new_decoder_architecture": False},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "phi3": {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2},
    "glm": {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
}
"""Model type -> the sizes that make it tiny (about 30,000 parameters)."""


def byte_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0..255), then <|im_start|> 256, <|im_end|> 257 (eos), <|pad|> 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=chat_template,
    )


def make_base(directory: Path, architecture: str = "llama", *, seed: int = 0) -> Path:
    """Write a random base model with its tokenizer as a standard Hugging Face directory."""
    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCAB_SIZE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **ARCHITECTURES[architecture],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
