"""The comparison of losses from clips with those from the dense model: its table, its order, and how it goes on."""

import json

import distill_evidence
import pytest
from distill_evidence import NAMES, _ways, main, summarise, table_of
from typer.testing import CliRunner

from vsa_diffusers.cli.script import script_app

WORDS = dict(clips=32, side=64, frames=13, held_out=1, levels=2, ratio=0.5, steps=2, batch_size=1, device="cpu")


def invoke(folder, *more, **changes):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in (WORDS | changes).items()]
    return CliRunner().invoke(
        script_app(main), [*words, f"--latents={folder / 'latents'}", f"--output={folder / 'runs'}", *more]
    )


def run(loss):
    return {"loss": loss, "kept": 0.25, "seconds": 3.0}


def test_losses_are_compared_with_dense_training_of_the_same_seed_and_with_the_dense_model():
    runs = {"dense-seed0": run(2.0), "dense-seed1": run(4.0), "output-seed0": run(2.2), "output-seed1": run(4.2)}
    results = {"untrained": {"dense": 2.0}, "runs": dict(reversed(runs.items()))}
    dense, output = summarise(results, _ways(1.0))
    assert (dense["way"], output["way"], output["seeds"]) == ("dense", "output", [0, 1])
    assert output["above_dense_training_percent"] == pytest.approx([10.0, 5.0])
    assert output["above_dense_model_percent"] == pytest.approx([10.0, 110.0])
    assert table_of([dense, output]).row_count == 2


def test_what_matters_most_is_trained_first_with_all_its_seeds(tmp_path, monkeypatch):
    asked = []

    def trained(setting, known, missing, *rest):
        asked.extend(missing)
        return iter([(key, run(2.0) | {"untrained": {"dense": 1.0}}) for key in missing])

    monkeypatch.setattr(distill_evidence, "_trained", trained)
    monkeypatch.setattr(distill_evidence, "encode_clips", lambda *arguments: None)
    ended = invoke(tmp_path, "--json")
    assert ended.exit_code == 0, ended.output
    assert asked == [f"{name}-seed{seed}" for name in NAMES for seed in range(2)]
    assert asked[:4] == ["dense-seed0", "dense-seed1", "diffusion-seed0", "diffusion-seed1"]
    assert [row["way"] for row in json.loads(ended.stdout)["rows"]] == list(NAMES)

    asked.clear()
    assert invoke(tmp_path, seeds=3, ways="dense,output").exit_code == 0
    assert asked == ["dense-seed2", "output-seed2"]
    assert invoke(tmp_path, steps=3).exit_code == 2
    assert "other values of steps" in invoke(tmp_path, steps=3).output
    assert "ways has unknown ['some']" in " ".join(invoke(tmp_path, ways="some").output.split())
    monkeypatch.setattr(distill_evidence, "module_digest", lambda transformer: "another")
    refused = invoke(tmp_path, seeds=4)
    assert refused.exit_code == 2
    assert "is of another model than --model" in " ".join(refused.output.split())


@pytest.mark.slow
def test_the_comparison_runs_and_goes_on(tmp_path):
    words = dict(ways="dense,attention_annealed,gates_output", workers=1, seeds=1)
    first = invoke(tmp_path, "--minutes=0.001", **words)
    assert first.exit_code == 75, first.output
    second = invoke(tmp_path, **words)
    assert second.exit_code == 0, second.output
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert list(results["runs"]) == ["dense-seed0", "attention_annealed-seed0", "gates_output-seed0"]
    assert results["runs"]["dense-seed0"]["loss"] != results["untrained"]["dense"]
