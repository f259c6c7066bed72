"""The loop: exact whatever the batches look like, resumable, and loud when something breaks."""

from pathlib import Path

from runs import events_of, make_recipe, train


def test_a_small_run_learns(tmp_path: Path, tiny_base: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_base, optim={"max_steps": 12})
    last = train(recipe)
    assert last.kind == "finished"
    losses = [event.number("loss") for event in events_of(recipe, "step")]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
