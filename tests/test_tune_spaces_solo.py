"""Solo searches: trials that are training runs of their own."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from local_cluster import local_cluster
from processes import ROOT, call
from runs import make_recipe, run_dir_of, train
from test_tune_spaces_search import result_of, write_search

from cluster import config
from cluster.errors import ClusterError, ResourceError, TrainingError
from training import loop
from training.config import ScaleConfig
from training.events import Event, EventLog, EventReader
from tune_spaces import record as records
from tune_spaces.actor import BenchActor
from tune_spaces.solo import Node, Run, SoloTrial, runs_at_once, scale_of
from tune_spaces.solo_hall import live_spans, score


@pytest.mark.ray
def test_solo_and_packed_searches_find_the_same(tmp_path: Path, tiny_base: Path) -> None:
    settings: dict[str, Any] = {
        "model": {"base": str(tiny_base), "quantization": "none"},
        "search": {
            "trials": 2,
            "seats": 2,
            "scheduler": "fifo",
            "finalists": 1,
            "fill_window_s": 0,
            "report_every_tokens": 160,
        },
    }
    found = {}
    for mode in ("packed", "solo"):
        settings["search"]["mode"] = mode
        path = write_search(tmp_path, tiny_base, name=mode, **settings)
        status, out, err = call(["tune_spaces", path.name, "--json"], tmp_path)
        assert status == 0, err
        found[mode] = (result_of(out), records.read(Path(result_of(out)["search_dir"])))
    packed, solo = (
        {json.dumps(dict(trial.params)): trial for trial in found[mode][1].trials}
        for mode in ("packed", "solo")
    )
    assert packed.keys() == solo.keys()
    for params, trial in packed.items():
        assert solo[params].value == pytest.approx(trial.value, abs=1e-5)
        assert solo[params].tokens == trial.tokens
        assert len(solo[params].history) > 2
    results = [found[mode][0] for mode in ("packed", "solo")]
    assert results[0]["best_config"] == results[1]["best_config"]
    assert results[0]["best_metric"] == pytest.approx(results[1]["best_metric"], abs=1e-5)
    assert results[0]["base_metric"] == pytest.approx(results[1]["base_metric"], abs=1e-5)
    assert 0 < results[1]["mean_seats_filled"] <= found["solo"][1].seats
    winners = [found[mode][1].winner for mode in ("packed", "solo")]
    assert winners[0].test_value == pytest.approx(winners[1].test_value, abs=1e-5)


@pytest.mark.ray
def test_a_solo_trial_that_diverges_ends_with_its_reason(tmp_path: Path, tiny_base: Path) -> None:
    path = write_search(
        tmp_path,
        tiny_base,
        space={"optim.learning_rate": [9.0], "data.mask": ["all"]},
        search={"mode": "solo", "searcher": "grid", "scheduler": "fifo", "seats": 1},
    )
    status, _, err = call(["tune_spaces", path.name, "optim.max_grad_norm=0"], tmp_path)
    assert status == 1
    assert "no trial finished: step " in err
    assert "the optimiser did not step" in err
    [trial] = records.read(tmp_path / "runs" / "found").trials
    assert (trial.state, trial.value) == ("stopped", None)


@pytest.mark.ray
def test_a_search_runs_as_a_ray_job(tmp_path: Path, tiny_base: Path) -> None:
    """Packed by `ray job submit`, solo by `loray search --submit`; both find what is on disk."""
    short = {"trials": 1, "scheduler": "fifo", "seeds": 1, "finalists": 1, "fill_window_s": 0}
    paths = {
        mode: str(write_search(tmp_path, tiny_base, name=mode, search={**short, "mode": mode}))
        for mode in ("packed", "solo")
    }
    with local_cluster() as cluster:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token}
        address = ["--address", cluster.jobs_address]
        ray = ["ray.scripts.scripts", "job", "submit", *address, "--working-dir", "."]
        words = [*ray, "--", "python", "-m", "tune_spaces", paths["packed"], "--json"]
        status, out, err = call(words, ROOT, token)
        assert status == 0, out + err
        assert '"search_dir"' in out
        words = ["loray", "search", "--submit", *address, paths["solo"], "--json"]
        status, out, err = call(words, tmp_path, token)
        assert status == 0, out + err
        assert result_of(out)["finished"] == 1
        again = call([*words, "--resume"], tmp_path, token)
        assert again[0] == 0, again
        assert result_of(again[1])["best_metric"] == result_of(out)["best_metric"]
    values = [records.read(tmp_path / "runs" / mode).trials[0].value for mode in paths]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


class Script:
    """A run as its events tell it: each step counts, and the report waits to be let pass."""

    def __init__(self, run_dir: Path, *, num_steps: int, every: int, is_evaluated: bool) -> None:
        self.run_dir = run_dir
        self.num_steps = num_steps
        self.every = every
        self.is_evaluated = is_evaluated
        self.fails_at: dict[int, Exception] = {}
        self.starts: list[int] = []

    def __call__(self) -> None:
        loop.stop_file(self.run_dir).unlink(missing_ok=True)
        state = self.run_dir / "state"
        step = int(state.read_text()) if state.exists() else 0
        self.starts.append(step)
        with closing(EventLog(self.run_dir / "events.jsonl")) as events:
            events.write("started", from_step=step, **self._totals(step))
            while step < self.num_steps:
                if step % self.every == 0 and not loop._may_pass(self.run_dir, step):
                    return
                step += 1
                if step in self.fails_at:
                    raise self.fails_at.pop(step)
                fields = {"num_steps": self.num_steps, "loss": 1 / step}
                events.write("step", step=step, supervised_tokens=step, **fields)
                if step % self.every == 0 or step == self.num_steps:
                    if self.is_evaluated:
                        events.write("eval", step=step, loss=2 / step, is_best=True, rouge_l=0.5)
                    state.write_text(str(step))
                    events.write("checkpoint", step=step, **self._totals(step))

    @staticmethod
    def _totals(step: int) -> dict[str, float]:
        tokens = step * (step + 1) // 2
        return {"total_real_tokens": tokens, "total_supervised_tokens": tokens, "total_train_s": 1}


class ScriptedTrial(SoloTrial):
    """A SoloTrial whose run is a Script."""

    script: ClassVar[Script]

    def _start(self) -> Run:
        return Run(self.script, self._run_dir)


@pytest.fixture
def trial_in(tmp_path: Path, tiny_base: Path) -> Iterator[Callable[..., ScriptedTrial]]:
    made: list[ScriptedTrial] = []

    def make(name: str = "a", **spec: Any) -> ScriptedTrial:
        shared = make_recipe(tmp_path, tiny_base, data={"eval": str(tmp_path / "train.jsonl")})
        plain = {
            "recipe": config.plain(shared),
            "directory": str(tmp_path / "trials"),
            "namespace": "",
            "benches": [],
            "metric": "eval_loss",
            "is_lr_scaled": True,
            "report_every": 80,
            "budget": None,
            "tokens_per_example": 10.0,
            "base_loss": None,
            "mode": "solo",
            **spec,
        }
        file = tmp_path / "spec.json"
        file.write_text(json.dumps(plain))
        trial = ScriptedTrial.__new__(ScriptedTrial)
        trial._trial_info = SimpleNamespace(trial_id=name)  # what Tune says of a trial
        trial.setup({"spec": str(file), "params": {"lora.rank": 2}})
        made.append(trial)
        return trial

    run_dir = tmp_path / "trials" / "a"
    ScriptedTrial.script = Script(run_dir, num_steps=5, every=2, is_evaluated=True)
    yield make
    for trial in made:
        trial.cleanup()


def test_a_report_says_exactly_what_has_been_trained(
    trial_in: Callable[..., ScriptedTrial],
) -> None:
    trial = trial_in()
    reports = [trial.step() for _ in range(3)]
    assert [r["step"] for r in reports] == [2, 4, 5]
    assert [r["supervised_tokens"] for r in reports] == [3, 10, 15]
    assert [r["eval_loss"] for r in reports] == [1.0, 0.5, 0.4]
    assert reports[1]["train_loss"] == pytest.approx((3 * (1 / 3) + 4 * (1 / 4)) / 7)
    assert [r["done"] for r in reports] == [False, False, True]
    assert [r["is_finished"] for r in reports] == [False, False, True]
    assert {"rank", "learning_rate", "learning_rate_at_rank_16", "reason"} <= set(reports[0])
    assert reports[0]["rouge_l"] == 0.5


def test_a_run_waits_at_its_report_until_the_trial_goes_on(
    trial_in: Callable[..., ScriptedTrial], tmp_path: Path
) -> None:
    trial = trial_in()
    trial.step()
    trial.cleanup()  # the scheduler has stopped it
    events = EventReader(tmp_path / "trials" / "a" / "events.jsonl").read()
    kinds = [(event.kind, event.number("step")) for event in events]
    assert ("checkpoint", 2.0) in kinds
    assert not any(kind == "step" and step > 2 for kind, step in kinds)


def test_a_trial_goes_on_in_another_process_where_it_was(
    trial_in: Callable[..., ScriptedTrial], tmp_path: Path
) -> None:
    first = trial_in()
    assert first.step()["step"] == 2
    first.save_checkpoint(str(tmp_path))
    assert first.step()["step"] == 4  # which Tune does not hear of any more
    first.cleanup()
    second = trial_in()
    second.load_checkpoint(str(tmp_path))
    assert [second.step()["supervised_tokens"] for _ in range(2)] == [10, 15]
    assert ScriptedTrial.script.starts == [0, 4]


def test_a_run_without_evaluation_reports_its_checkpoints(
    trial_in: Callable[..., ScriptedTrial], tmp_path: Path
) -> None:
    trial = trial_in(metric="train_loss")
    trial._reports.is_evaluated = ScriptedTrial.script.is_evaluated = False
    assert [trial.step()["eval_loss"] for _ in range(3)] == [None, None, None]


def test_a_broken_run_is_a_reason_and_any_other_error_is_raised(
    trial_in: Callable[..., ScriptedTrial],
) -> None:
    trial = trial_in()
    trial.step()
    ScriptedTrial.script.fails_at = {3: TrainingError("loss nan"), 4: ClusterError("gone")}
    ended = trial.step()
    assert (ended["reason"], ended["done"], ended["is_finished"]) == ("loss nan", True, False)
    assert ended["supervised_tokens"] == 3
    trial._run = None
    with pytest.raises(ClusterError, match="gone"):
        trial.step()
    assert trial.step()["step"] == 4  # Tune tries again


def test_a_trial_that_adopts_another_forgets_what_it_was(
    trial_in: Callable[..., ScriptedTrial], tmp_path: Path, tiny_base: Path
) -> None:
    source = make_recipe(tmp_path, tiny_base, name="b", optim={"max_steps": 4})
    train(source)  # checkpoints at 2 and 4
    trial = trial_in()
    trial.step()
    trial.step()
    run_dir = tmp_path / "trials" / "a"
    (run_dir / "adapter").mkdir()
    (run_dir / "recipe.json").write_text("{}")
    note = {"trial": "b", "run_dir": str(run_dir_of(source)), "step": 2, "tokens": 3}
    (tmp_path / "seat.json").write_text(json.dumps(note))
    trial.load_checkpoint(str(tmp_path))
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000002"]
    assert not (run_dir / "adapter").exists()
    assert not (run_dir / "recipe.json").exists()
    (run_dir / "state").write_text("2")
    assert [trial.step()["step"] for _ in range(2)] == [4, 5]


def test_a_trial_s_recipe_reports_as_often_as_asked_and_keeps_its_last_adapter(
    trial_in: Callable[..., ScriptedTrial],
) -> None:
    trial = trial_in(metric="rouge_l", base_loss=0.1)
    recipe = trial._recipe
    assert recipe.evaluation.every_steps == recipe.checkpoint.every_steps == 2
    assert recipe.evaluation.metrics == ("loss", "rouge_l")
    assert recipe.evaluation.metrics_during_run
    assert recipe.evaluation.best == "last"
    assert "diverged: eval loss 1.000" in trial.step()["reason"]


def test_the_cluster_is_shared_out_among_runs() -> None:
    cpu, gpu = [Node(cpus=8, gpus=0)] * 2, [Node(cpus=8, gpus=2), Node(cpus=4, gpus=1)]
    auto, two, small = ScaleConfig(), ScaleConfig(workers=2), ScaleConfig(cpus_per_worker=3)
    assert [runs_at_once(s, cpu, None) for s in (auto, two, small)] == [2, 1, 4]
    assert [runs_at_once(s, gpu, None) for s in (auto, two, small)] == [3, 1, 3]
    assert runs_at_once(auto, cpu, 16) == 16
    shares = [scale_of(auto, cpu, 4), scale_of(two, cpu, 1), scale_of(auto, gpu, 3)]
    assert [(s.cpus_per_worker, s.gpus_per_worker) for s in shares] == [(4, 0), (8, 0), (4, 1)]
    with pytest.raises(ResourceError, match=r"search\.seats is 17: .* has room for 16; lower"):
        runs_at_once(auto, cpu, 17)
    with pytest.raises(ResourceError, match=r"search\.seats is auto: 1 runs"):
        runs_at_once(ScaleConfig(workers=17), cpu, None)


def test_live_trials_are_counted_from_their_events() -> None:
    kinds = ["seated", "step", "left", "step", "seated", "step", "seated", "left", "seated", "eval"]
    events = [Event(kind=kind, time_s=float(i)) for i, kind in enumerate(kinds)]
    assert live_spans(events) == [(0, 2), (4, 5), (6, 7), (8, 9)]


def test_a_model_is_scored_as_a_bench_scores_it(tmp_path: Path, tiny_base: Path) -> None:
    data = {"eval": str(tmp_path / "train.jsonl"), "max_length": 128}
    recipe = make_recipe(tmp_path, tiny_base, data=data, optim={"max_steps": 4})
    train(recipe)
    run_dir_of(recipe).joinpath("attempt").unlink()
    actor = BenchActor(
        config.plain(recipe),
        str(tmp_path),
        largest=config.plain(recipe),
        seats=1,
        most=1,
        threads=1,
        fill_window_s=0,
        name="x",
    )
    adapters = {"base": None, "run": str(run_dir_of(recipe) / "adapter")}
    try:
        actor.join("run", config.plain(recipe), str(run_dir_of(recipe)))
        for metric in ("eval_loss", "rouge_l"):
            packed = actor.scores(["base", "run"], metric, None)
            solo = score(config.plain(recipe), adapters, metric, None, threads=1)
            for name in adapters:
                assert solo[name]["weights"] == packed[name]["weights"]
                assert solo[name]["values"] == pytest.approx(packed[name]["values"], abs=1e-5)
            assert metric == "rouge_l" or solo["run"] != solo["base"]
    finally:
        actor._desk.close()
        actor._log.close()
