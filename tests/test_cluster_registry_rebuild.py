"""A lost registry made anew from storage: what comes back, and what is left out."""

import json
from pathlib import Path

import pytest
import yaml
from processes import call
from sqlalchemy import select

from cluster import storage
from cluster.errors import StorageError
from cluster.registry import cards, database, rebuild
from cluster.registry.cards import Card
from cluster.registry.database import Database
from cluster.registry.rebuild import Report
from cluster.registry.tables import Model


def adapter_of(run_dir: Path, step: int) -> Path:
    return run_dir / "adapters" / f"step-{step:06d}"


def commit(directory: Path) -> None:
    """A small directory with a manifest."""

    def write(temporary: Path) -> None:
        (temporary / "adapter_model.safetensors").write_bytes(b"weights")

    directory.parent.mkdir(parents=True, exist_ok=True)
    storage.commit(directory, write, attempt="1")


def make_run(root: Path, number: int, *, status: str = "succeeded", steps: int = 2) -> Card:
    """A run that a job has left."""
    run_dir = root / f"ftjob-{number}"
    name = f"ft:meta/llama:loray:tickets:{number:08d}"
    card = Card(
        job_id=run_dir.name, project=f"team-{number % 2}", model=name, base="meta/llama",
        created_at=1000.0 + number, status=status,
        checkpoints=tuple((step, f"{name}:ckpt-step-{step}") for step in range(1, steps + 1)),
    )  # fmt: skip
    for step, _ in card.checkpoints:
        commit(adapter_of(run_dir, step))
    if status == "succeeded":
        commit(run_dir / "adapter")
    cards.write(run_dir, card)
    return card


def run(registry: Database, root: Path) -> Report:
    return rebuild.rebuild(registry, root, adapter_of=adapter_of)


def models(registry: Database) -> dict[str, Model]:
    with registry.read() as session:
        return {row.name: row for row in session.scalars(select(Model))}


def test_models_and_checkpoints_come_back_as_they_were(registry: Database, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    whole, half = make_run(root, 1), make_run(root, 2, status="running", steps=1)
    (root / "files").mkdir()
    (root / "a-run-of-somebody").mkdir()
    report = run(registry, root)
    assert report.broken == ()
    assert set(report.added) == {
        whole.model, *(name for _, name in (*whole.checkpoints, *half.checkpoints)),
    }  # fmt: skip
    rows = models(registry)
    row = rows[whole.model]
    assert (row.project, row.job_id, row.base) == ("team-1", whole.job_id, "meta/llama")
    assert (row.step, row.path) == (None, str(root / "ftjob-1" / "adapter"))
    assert (row.created_at, row.deleted_at) == (1001.0, None)
    row = rows[f"{half.model}:ckpt-step-1"]
    assert (row.step, row.path) == (1, str(adapter_of(root / "ftjob-2", 1)))


def test_a_second_time_nothing_changes_and_deleted_models_stay_deleted(
    registry: Database, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    card = make_run(root, 1)
    run(registry, root)
    with registry.write() as session:
        session.scalars(select(Model).where(Model.name == card.model)).one().deleted_at = 5.0
    report = run(registry, root)
    assert (report.added, report.num_known, report.broken) == ((), 3, ())
    assert models(registry)[card.model].deleted_at == 5.0


def test_what_is_broken_is_told_and_left_out(registry: Database, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    cut, gone, torn, good = (make_run(root, number) for number in range(4))
    (root / "ftjob-0" / "adapter" / "adapter_model.safetensors").write_bytes(b"weighty")
    (root / "ftjob-1" / "adapter" / "adapter_model.safetensors").unlink()
    (root / "ftjob-2" / "card.json").write_text('{"job_id": ')
    (adapter_of(root / "ftjob-3", 1) / storage.MANIFEST).unlink()
    report = run(registry, root)
    told = "\n".join(report.broken)
    assert f"{cut.model}: " in told
    assert "is altered" in told
    assert f"{gone.model}: " in told
    assert "is missing" in told
    assert "ftjob-2/card.json is damaged" in told
    assert f"{good.model}:ckpt-step-1: " in told
    assert len(report.broken) == 4
    known = models(registry)
    assert torn.model not in known
    assert {good.model, f"{cut.model}:ckpt-step-1", f"{good.model}:ckpt-step-2"} < set(known)
    (adapter_of(root / "ftjob-3", 1)).rename(tmp_path / "away")
    commit(adapter_of(root / "ftjob-3", 1))
    assert run(registry, root).added == (f"{good.model}:ckpt-step-1",)


def test_models_that_were_deleted_before_the_loss_stay_deleted(
    registry: Database, tmp_path: Path
) -> None:
    card, other = make_run(tmp_path / "runs", 1), make_run(tmp_path / "runs", 2)
    run_dir = tmp_path / "runs" / card.job_id
    cards.mark_deleted(run_dir / "adapter")
    cards.mark_deleted(adapter_of(run_dir, 1))
    cards.write(run_dir, card)  # as the dispatcher does, at any time
    report = run(registry, tmp_path / "runs")
    assert (len(report.added), report.num_known, report.num_deleted) == (4, 0, 2)
    gone = {card.model, f"{card.model}:ckpt-step-1"}
    assert not gone & set(models(registry))
    assert other.model in models(registry)
    assert (run_dir / "adapter" / storage.MANIFEST).exists()
    cards.mark_deleted(tmp_path / "runs" / "removed" / "adapter")
    assert not (tmp_path / "runs" / "removed").exists()


@pytest.mark.parametrize("status", ["failed", "cancelled", "queued"])
def test_a_job_without_a_result_gives_its_checkpoints_alone(
    registry: Database, tmp_path: Path, status: str
) -> None:
    card = make_run(tmp_path / "runs", 1, status=status)
    report = run(registry, tmp_path / "runs")
    assert (report.added, report.broken) == (tuple(name for _, name in card.checkpoints), ())


def test_a_result_that_the_card_does_not_know_yet_comes_back(
    registry: Database, tmp_path: Path
) -> None:
    card = make_run(tmp_path / "runs", 1, status="running")
    commit(tmp_path / "runs" / card.job_id / "adapter")
    assert card.model in run(registry, tmp_path / "runs").added


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"checkpoints": 3}', "\x00"])
def test_a_card_that_cannot_be_read_is_one_line(
    registry: Database, tmp_path: Path, text: str
) -> None:
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "card.json").write_text(text)
    report = run(registry, tmp_path / "runs")
    assert [("card.json is damaged" in line) for line in report.broken] == [True]


def test_a_storage_that_is_not_there_is_told(registry: Database, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        run(registry, tmp_path / "nowhere")


def test_a_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    card = make_run(tmp_path, 7)
    assert cards.read(tmp_path / "ftjob-7") == card
    assert cards.read(tmp_path) is None
    assert json.loads((tmp_path / "ftjob-7" / "card.json").read_text())["job_id"] == "ftjob-7"


def test_a_registry_is_rebuilt_by_command(tmp_path: Path, tiny_base: Path) -> None:
    card = make_run(tmp_path / "runs", 1)
    path = tmp_path / "serve.yaml"
    tree = {"model": {"base": str(tiny_base)}, "tuning": {"storage": str(tmp_path / "runs")}}
    path.write_text(yaml.safe_dump(tree))
    for words in (
        "3 models added, 0 known, 0 deleted, 0 left out",
        "0 models added, 3 known, 0 deleted, 0 left out",
    ):
        status, out, err = call(["loray", "registry", "rebuild", path.name], tmp_path)
        assert (status, out.strip()) == (0, words), err
    opened = database.open_(database.sqlite_url(tmp_path / ".loray/serve/serve/registry.db"))
    assert card.model in models(opened)
    opened.close()
