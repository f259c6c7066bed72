"""Solo searches: trials that are training runs of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
from processes import call
from test_tune_spaces_search import result_of, write_search

from tune_spaces import record as records


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
