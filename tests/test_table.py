"""The tables of results/table.py, and that the README shows the committed ones."""
import json

import table
from conftest import ROOT


def summary(seed, accuracy, **more):
    return {"experiment": "e", "run": f"r{seed}", "setting": "lr 0.004", "dataset": "mnist", "split": "dw", "seed": seed,
            "epochs": 20, "status": "done", "wall_s": 60.0, "command": "python e.py", "hardware": "CPU", "torch": "2",
            "train/loss": 1.0, "eval/svm_acc_short": accuracy, **more}


def test_mean_and_std_over_seeds():
    text = table.tables([summary(0, 90.0), summary(1, 92.0), summary(2, 94.0), summary(2, 94.0)])
    row = next(line for line in text.splitlines() if line.startswith("| 20 epochs"))
    assert row == "| 20 epochs, lr 0.004 | mnist dw | 3 | 92.00 ± 2.00 |"
    assert "`python e.py`; seeds 0, 1, 2; 1.0 minutes on CPU; torch 2" in text and "loss" not in text


def test_settings_and_references_have_rows_of_their_own():
    text = table.tables([summary(0, 90.0), summary(1, 80.0, setting="") | {"pixels/svm_acc_short": 91.0}])
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][2:] == [
        "20 epochs", "raw pixels", "20 epochs, lr 0.004"]


def test_unfinished_runs_do_not_count(tmp_path, monkeypatch):
    for name, status in (("a", "done"), ("b", "interrupted")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summary(0, 90.0, run=name, status=status)))
    assert [s["run"] for s in table.summaries(tmp_path)] == ["a"]


def test_readme_shows_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert all(f"<!-- {name} -->" in text for name in ("table", "clean", "baselines"))
    assert table.readme(text) == text, "stale: run python results/table.py --readme"
    assert (ROOT / "results/README.md").read_text() == table.every_run(), "stale: run python results/table.py --readme"


def test_baselines_stand_beside_the_best_alae():
    def run(experiment, seed=0, **more):
        return summary(seed, 90.0 + seed, experiment=experiment, run=f"{experiment}{seed}", **{"eval/recon_mse": 0.02} | more)
    text = table.baselines([
        run("aae", 1, setting=""), run("aae", setting=""), run("aae", split="val"), run("vae_gan"), run("gan_mnist"),
        run("train_fc_alae", setting="recipe fast", epochs=50), run("train_fc_alae"), run("aae_semi_supervised", **{"eval/error": 2.5})])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert [row[0] for row in rows[2:]] == [
        "VAE-GAN, lr 0.004", "AAE", "semi-supervised AAE, lr 0.004", "ALAE, recipe fast"]
    assert rows[3][1:5] == ["20", "1", "2", "0.02000 ± 0.00000"] and rows[3][8] == "90.50 ± 0.71" and rows[4][9] == "2.50"


def test_collect(command, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary(0, 90.0)))
    monkeypatch.setattr(table, "ROOT", tmp_path)
    table.collect(tmp_path / "run")
    assert table.summaries(tmp_path / "results") == [summary(0, 90.0)]
