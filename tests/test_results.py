"""Sweeps run here as W&B would run them; tables and figures say what the kept runs say."""

import contextlib
import fcntl
import importlib
import json
import os
import re
import signal
import sys
import threading
import time
from argparse import Namespace
from itertools import chain

import shared

import figures
import numpy as np
import paper_table
import pytest
import raw_pixels
import svm_scale
import sweep
import table
import torch
from conftest import ROOT, toy_data, train
from wandb import wandb_agent

SWEEPS = sorted(ROOT.glob("*/sweeps/*.yaml"))
COMMAND = ["${env}", "python", "${program}", "${args_no_boolean_flags}"]
PROGRAM = """
import json, sys, time
from pathlib import Path
if __name__ == "__main__":  # an experiment of milliseconds
    given = dict(zip(sys.argv, sys.argv[1:]))
    if "--resume" in given:
        folder = Path(given["--resume"]).parent
    else:
        folder = Path(given["--out-dir"], "fake", given["--run-name"])
        folder.mkdir(parents=True)
    commands = json.dumps(["python fake.py " + " ".join(sys.argv[1:])])
    if "--resume" not in given:
        (folder / "summary.json").write_text('{"status": "running", "commands": %s}' % commands)
        (folder / "argv").write_text(" ".join(sys.argv[1:]))
    if "--seed=7" in sys.argv:
        print("nothing learned")
        sys.exit("fake.py: error: seven")
    if "--seed=8" in sys.argv:
        try:
            (folder / "asleep").touch()
            time.sleep(60)
        except KeyboardInterrupt:
            (folder / "checkpoint.pt").touch()
            sys.exit(130)
    (folder / "summary.json").write_text('{"status": "done", "commands": %s}' % commands)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Runs a sweep over seeds of a program of milliseconds; returns its folder of runs."""
    (tmp_path / "fake.py").write_text(PROGRAM)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", os.environ["PATH"])

    def run(*seeds, workers=2, more=()):
        parameters = {"seed": {"values": list(seeds)}, "rate": {"value": 0.5}}
        content = {"program": str(tmp_path / "fake.py"), "method": "grid"}
        content |= {"parameters": parameters, "command": COMMAND}
        (tmp_path / "study.yaml").write_text(json.dumps(content))  # JSON is YAML
        options = {"files": [tmp_path / "study.yaml"], "out_dir": tmp_path / "runs"}
        options |= {"workers": workers, "dry": False, "more": list(more)}
        sweep.main(Namespace(**options))

    run.folder = tmp_path / "runs/fake"
    return run


def status(folder):
    return json.loads((folder / "summary.json").read_text())["status"]


# Sweeps


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_every_command_of_every_sweep_is_one_that_its_program_understands(path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    content = sweep.utils.load_sweep_config(str(path))
    program = ROOT / content["program"]
    module = importlib.import_module(program.stem)
    commands = sweep.expand(path)
    for command in commands.values():
        assert command[:3] == ["/usr/bin/env", "python", content["program"]] and program.exists()
        shared.parse_config(module.Config, getattr(module, "PRESETS", None), command[3:])
    combinations = 1
    for parameter in content["parameters"].values():
        combinations *= len(parameter.get("values", [0]))
    assert len(commands) == combinations and content["command"] == COMMAND


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_a_sweep_that_says_so_and_no_other_is_judged_on_validation_images(path):
    head = path.read_text().split("\nprogram:")[0].replace("\n#", "")
    for command in sweep.expand(path).values():
        assert ("--split=val" in command) == ("validation images" in head.lower())


def test_commands_are_those_of_a_wandb_agent(tmp_path, monkeypatch):
    parameters = {"joint": {"values": [True, False]}, "k": {"value": 3}, "lr": {"values": [0.5]}}
    content = {"program": "a/b.py", "method": "grid", "parameters": parameters, "command": COMMAND}
    (tmp_path / "s.yaml").write_text(json.dumps(content))
    commands = sweep.expand(tmp_path / "s.yaml")
    assert list(commands) == ["s-jointTrue-lr0.5", "s-jointFalse-lr0.5"]

    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb_agent, "AgentProcess", lambda command, **_: started.append(command))
    monkeypatch.setenv("WANDB_RUN_ID", "restored afterwards")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "restored afterwards")
    agent = object.__new__(wandb_agent.Agent)
    agent._sweep_command, agent._function, agent._in_jupyter = COMMAND, None, False
    agent._forward_signals, agent._run_processes = False, {}
    for joint in (True, False):
        args = {"joint": {"value": joint}, "k": {"value": 3}, "lr": {"value": 0.5}}
        with contextlib.suppress(AttributeError):  # of the process, which is none
            agent._command_run({"run_id": "r", "program": "a/b.py", "args": args})
    assert started == list(commands.values())
    assert started[1] == ["/usr/bin/env", "python", "a/b.py", "--k=3", "--lr=0.5"]


def test_a_sweep_trains_each_run_once(fake):
    fake(0, 1)
    first = fake.folder / "study-seed0"
    assert [status(fake.folder / f"study-seed{i}") for i in (0, 1)] == ["done", "done"]
    assert (first / "argv").read_text().startswith("--seed=0 --rate=0.5 --out-dir ")
    at = (first / "summary.json").stat().st_mtime_ns
    fake(0, 1, 2)
    assert (first / "summary.json").stat().st_mtime_ns == at
    assert status(fake.folder / "study-seed2") == "done"


def test_what_was_stopped_goes_on_and_what_never_began_starts_anew(fake, capsys):
    for seed, file in ((0, "checkpoint.pt"), (1, "config.json")):
        folder = fake.folder / f"study-seed{seed}"
        folder.mkdir(parents=True)
        (folder / file).touch()
        commands = [f"python fake.py --seed={seed} --rate=0.5"]
        summary = {"status": "interrupted", "commands": commands}
        (folder / "summary.json").write_text(json.dumps(summary))
    fake(0, 1)
    stopped, new = fake.folder / "study-seed0", fake.folder / "study-seed1"
    done = json.loads((stopped / "summary.json").read_text())
    assert done["status"] == "done"
    assert done["commands"] == [f"python fake.py --resume {stopped}/checkpoint.pt"]
    assert status(new) == "done" and not (new / "config.json").exists()
    said = capsys.readouterr().out
    assert "study-seed0 goes on" in said and "study-seed1 starts" in said


def test_a_run_of_other_options_is_refused_and_more_words_are_options_too(fake, capsys):
    fake(0, more=["--device=cpu"])
    fake(0, more=["--device=cpu", "--wandb"])  # done
    for more in ([], ["--device=cpu", "--joint"]):
        with pytest.raises(SystemExit) as stop:
            fake(0, more=more)
        assert stop.value.code == 2 and "of another command" in capsys.readouterr().err


def test_a_run_that_another_process_trains_is_left_alone(fake, capsys):
    fake.folder.mkdir(parents=True)
    (fake.folder / "study-seed0").mkdir()
    with open(fake.folder / "study-seed0.log", "w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as stop:
            fake(0)
    assert stop.value.code == 1 and "study-seed0 is in another process" in capsys.readouterr().out
    assert (fake.folder / "study-seed0").exists()
    fake(0)
    assert status(fake.folder / "study-seed0") == "done"


def test_a_failing_run_is_named_with_its_last_words_and_the_others_are_trained(fake, capsys):
    with pytest.raises(SystemExit) as stop:
        fake(7, 0, workers=1)
    said = capsys.readouterr()
    assert stop.value.code == 1 and "1 of 2 runs failed" in said.err
    assert "study-seed7 ended with code 1: fake.py: error: seven" in said.out
    assert status(fake.folder / "study-seed0") == "done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_the_children_and_the_same_command_goes_on(fake, capsys, number):
    def interrupt():
        while not (fake.folder / "study-seed8/asleep").exists():
            time.sleep(0.01)
        time.sleep(0.3)  # more than a look at what is to do
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    with pytest.raises(SystemExit) as stop:
        fake(8, 0, workers=1)
    assert stop.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    assert (fake.folder / "study-seed8/checkpoint.pt").exists()
    assert not (fake.folder / "study-seed0").exists()
    fake(8, 0)
    assert [status(fake.folder / f"study-seed{i}") for i in (0, 8)] == ["done", "done"]


def test_workers_share_the_cores(fake, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    fake(0, workers=2)
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_the_command_line(here, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = ROOT / "step3_official_alae/sweeps/table1_bigan.yaml"
    done = here("results/sweep.py", file, "--dry", "--out-dir", tmp_path, "--", "--smoke")
    first = done.stdout.splitlines()[1]
    expected = (
        "/usr/bin/env python step2_gan/bigan_mnist.py --split=dw --seed=0 --epochs=40 --smoke"
    )
    assert done.returncode == 0 and first.startswith(f"{expected} --out-dir ")
    assert first.endswith("--run-name table1_bigan-dw-seed0") and not list(tmp_path.iterdir())
    refused = here("results/sweep.py", file, "--workers", 0)
    assert refused.returncode == 2 and "at least 1" in refused.stderr


def test_more_options_reach_every_run(fake):
    fake(0, more=["--joint"])
    assert "--seed=0 --rate=0.5 --joint --out-dir" in (fake.folder / "study-seed0/argv").read_text()


# Tables


def summary(seed, accuracy, **more):
    run = {"experiment": "e", "run": f"r{seed}", "setting": "lr 0.004", "dataset": "mnist"}
    run |= {"split": "dw", "seed": seed, "epochs": 20, "status": "done", "wall_s": 60.0}
    run |= {"commands": ["python e.py"], "hardware": "CPU", "torch": "2", "train/loss": 1.0}
    return run | {"eval/svm_acc_short": accuracy} | more


def cells(text):
    """The cells of a table's lines, but for the head."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def write(folder, *runs):
    for run in runs:
        (folder / run["run"]).mkdir(parents=True)
        (folder / run["run"] / "summary.json").write_text(json.dumps(run))
    return folder


def test_mean_and_std_over_seeds():
    runs = [summary(0, 90.0), summary(1, 92.0), summary(2, 94.0), summary(2, 94.0)]
    text = table.tables(runs)
    assert cells(text) == [["lr 0.004", "20 epochs", "mnist dw", "3", "92.00 ± 2.00"]]
    assert "- `python e.py`: 20 epochs, dw, seeds 0, 1, 2, 1.0 minutes on CPU" in text


def test_settings_splits_and_lengths_have_rows_of_their_own():
    runs = [summary(0, 90.0), summary(0, 80.0, setting=""), summary(0, 70.0, split="val")]
    runs += [summary(0, 60.0, epochs=5)]
    rows = [(row[0], *row[1:]) for row in cells(table.table(runs))]
    assert rows == [
        ("lr 0.004", "5 epochs", "mnist dw", "1", "60.00"),
        ("default", "20 epochs", "mnist dw", "1", "80.00"),
        ("lr 0.004", "20 epochs", "mnist dw", "1", "90.00"),
        ("lr 0.004", "20 epochs", "mnist val", "1", "70.00"),
    ]


def test_unfinished_runs_do_not_count_and_evaluations_are_told_from_trainings(tmp_path):
    again = summary(0, 90.0, run="c", commands=["python e.py --eval assets/model.pt"])
    runs = [summary(0, 90.0, run="a"), summary(1, 1.0, run="b", status="interrupted"), again]
    (tmp_path / "list.json").write_text("[]")  # of some other program
    found = table.summaries(write(tmp_path, *runs))
    assert [s["run"] for s in found] == ["a", "c"]
    assert found[1]["setting"] == "lr 0.004, --eval model.pt"


def test_a_summary_that_was_cut_off_is_left_out_and_named(tmp_path, capsys):
    write(tmp_path, summary(0, 90.0, run="a"), summary(1, 1.0, run="b"))
    (tmp_path / "b/summary.json").write_text('{"status": "do')
    assert [s["run"] for s in table.summaries(tmp_path)] == ["a"]
    assert "b/summary.json: not readable" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        table.collect(tmp_path / "b")


def test_a_command_is_a_bullet_and_those_of_a_resumed_run_are_a_chain():
    text = table.commands([summary(0, 90.0, commands=["python e.py", "python e.py --resume x"])])
    assert text.splitlines()[0] == "- `python e.py`, then" and text.count("\n- `") == 1


def test_a_table_in_a_readme_is_renewed_between_its_markers(monkeypatch, tmp_path):
    write(tmp_path / "results", summary(0, 90.0), summary(1, 92.0))
    write(tmp_path / "results", summary(0, 1.0, split="val", run="v"))
    (tmp_path / "results/paper_table").mkdir()
    (tmp_path / "results/paper_table/clean.md").write_text("as it is\n")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    marker = "<!-- table: e | mnist dw | svm_acc_short fid -->"
    old = f"a\n{marker}\nold\n<!-- /table -->\nb\n<!-- table: clean -->\n<!-- /table -->\n"
    new = table.renew(old)
    assert new.startswith(f"a\n{marker}\n| run |") and "old" not in new and "\nb\n" in new
    assert cells(new) == [["lr 0.004", "20 epochs", "mnist dw", "2", "91.00 ± 1.41"]]
    assert "<!-- table: clean -->\nas it is\n<!-- /table -->" in new and table.renew(new) == new


RANDOM = '{"program": "a.py", "method": "random", "parameters": {}}'


@pytest.mark.parametrize("text", ["torch", "method: random", RANDOM, ""])
def test_what_is_no_sweep_file_is_refused(text, tmp_path, capsys):
    if text:
        (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        sweep.expand(tmp_path / "study.yaml")
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "not a sweep file" in lines[-1]
    assert len(lines) == (1 if text else 2)  # W&B says that there is no file


@pytest.mark.parametrize(
    "text, fragment",
    [
        ('{"method": "grid", "program": "a.py"}', "needs 'parameters'"),
        ('{"method": "grid", "parameters": {"k": {"value": 1}}}', "needs 'program'"),
        (
            '{"method": "grid", "program": "a.py", "parameters": {"k": {"values": "r1"}}}',
            "parameter k needs a list of values",
        ),
        (
            '{"method": "grid", "program": "a.py", "parameters": {"k": {"min": 1, "max": 3}}}',
            "parameter k needs 'value' or 'values'",
        ),
        ('{"method": "grid", "program": "a.py", "parameters": {"k": 40}}', "parameter k needs"),
    ],
)
def test_a_sweep_file_that_lacks_something_is_refused(text, fragment, tmp_path, capsys):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        sweep.expand(tmp_path / "study.yaml")
    assert stop.value.code == 2 and fragment in capsys.readouterr().err


def test_the_lines_that_foretold_the_official_length_are_those_of_the_page():
    axes = figures.official_length(ROOT / "results").axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    page = (ROOT / "step3_official_alae/README.md").read_text()
    fp32, until_200 = (re.search(r": (\S+) at 400", label)[1] for label in labels[2:4])
    assert f"and {fp32} for 400" in page and f"foretold {until_200} for 400" in page


def test_a_table_may_take_the_runs_of_one_study(monkeypatch, tmp_path):
    write(tmp_path / "results", summary(0, 90.0, run="study-a"), summary(0, 92.0, run="other"))
    monkeypatch.setattr(table, "ROOT", tmp_path)
    new = table.renew("<!-- table: e/study | mnist dw | svm_acc_short -->\n<!-- /table -->\n")
    assert [row[-1] for row in cells(new)] == ["90.00"]


def test_a_table_of_chosen_metrics_has_what_a_run_measured_beside(monkeypatch, tmp_path):
    angles = {"eval/ratio": 1.0, "soft/angle": 0.5, "soft/ratio": 1.0, "train/angle": 9.0}
    write(tmp_path / "results", summary(0, 90.0, run="r", **angles, **{"pixels/ratio": 3.0}))
    monkeypatch.setattr(table, "ROOT", tmp_path)
    new = table.renew("<!-- table: e | mnist dw | angle ratio train/angle -->\n<!-- /table -->\n")
    assert [[row[0], *row[4:]] for row in cells(new)] == [
        ["lr 0.004", "", "1.00000", "9.00000"],
        ["soft", "0.50000", "1.00000", ""],
    ]


def test_no_readme_is_stale():
    for path, text in table.readmes().items():
        assert path.read_text() == text, f"{path} is stale: run python results/table.py --readme"
    assert "<!-- table: all runs -->" in (ROOT / "results/README.md").read_text()


def test_collecting_keeps_metrics_and_refuses_to_replace_another_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    run = write(tmp_path / "runs", summary(0, 90.0)) / "r0"
    (run / "metrics.csv").write_text("epoch\n1\n")
    table.collect(run)
    kept = json.loads((tmp_path / "results/e/r0.json").read_text())
    assert kept == summary(0, 90.0)
    assert (tmp_path / "results/e/r0.csv").read_text() == "epoch\n1\n"
    (run / "summary.json").write_text(json.dumps(summary(0, 95.0, epochs=30)))
    table.collect(run)  # the same run, continued
    (run / "summary.json").write_text(json.dumps(summary(0, 99.0, commands=["python e.py --lr 1"])))
    with pytest.raises(SystemExit):
        table.collect(run)
    assert "of another run of that name" in capsys.readouterr().err
    assert table.summaries(tmp_path / "results")[0]["eval/svm_acc_short"] == 95.0


def test_kept_results_have_the_facts_that_a_claim_needs():
    for path in sorted((ROOT / "results").rglob("*.json")):
        s = json.loads(path.read_text())
        facts = {"experiment", "run", "dataset", "split", "seed", "setting", "commands", "commits"}
        assert facts | {"hardware", "wall_s", "torch"} <= s.keys(), path
        assert path.stem == s["run"] and s["status"] == "done"
        assert s.keys() & {"steps", "epochs"}
        if s["experiment"] == "aae_freiburg" and "labels" in s["setting"]:  # P knows test labels
            assert not {"eval/identity", "eval/recon_mse"} & s.keys()


# Table 1 of the paper


def paper_run(method, split, seed, value, epochs=7, **more):
    kinds = ("knn_acc_short", "knn_acc_long", "svm_acc_short", "svm_acc_long")
    numbers = {f"eval/{kind}": value for kind in kinds}
    numbers |= {"eval/recon_mse": 0.01, "eval/identity": 90.0, "eval/fid": 10.0}
    facts = {"experiment": method[0], "setting": method[1], "split": split, "epochs": epochs}
    facts |= {"run": f"{method[0]}{method[1]}{split}{seed}{epochs}{len(more)}"}
    return summary(seed, value) | facts | numbers | more


BIGAN, OFFICIAL = ("bigan_mnist", ""), ("train_fc_alae", "precision bf16")
FAST = ("train_fc_alae", "preset fast")


def test_tables_on_the_command_line(here, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    write(tmp_path / "runs", paper_run(OFFICIAL, "dw", 0, 94.0))
    text = here("results/table.py", tmp_path / "runs").stdout
    assert text.startswith("\n## Autoencoders") and "\n- `python e.py`: 7 epochs" in text
    text = here("step3_official_alae/paper_table.py", tmp_path / "runs").stdout
    assert text.count("| ALAE, official setting, bf16 | 7 |") == 3  # front, short, long
    assert "| ALAE, official setting, bf16 | test MSE |" in text  # clean
    for file in ("results/table.py", "step3_official_alae/paper_table.py"):
        refused = here(file, tmp_path / "none")
        assert refused.returncode == 2 and "no finished run" in refused.stderr


def test_raw_pixels_are_a_run_of_no_epochs_and_a_row_of_table_1(tmp_path, monkeypatch):
    how = {"--device": "cpu", "--out-dir": tmp_path, "--run-name": "dw"}
    train(monkeypatch, raw_pixels, "--smoke", *sum(how.items(), ()))
    groups = paper_table.gather(tmp_path)
    (run,) = groups["raw_pixels", "untrained"][0]["dw"].values()
    assert 50 < run["eval/knn_acc_short"] < 100
    (row,) = cells(paper_table.front_table(groups))
    assert row[:5] == ["raw pixels", "0", "1", "–", f"{run['eval/knn_acc_short']:.2f}"]


def test_a_longer_training_replaces_a_shorter_one_if_it_has_as_many_seeds(tmp_path):
    runs = [paper_run(BIGAN, "dw", seed, 90.0, 25) for seed in (0, 1)]
    runs += [paper_run(BIGAN, "dw", seed, 91.0, 40) for seed in (0, 1)]
    runs += [paper_run(BIGAN, "dw", 0, 92.0, 400), paper_run(BIGAN, "sw", 0, 92.0, 400)]
    runs += [paper_run(FAST, "sw", 0, 93.0, 9), paper_run(FAST, "dw", 0, 94.0, 12)]
    found = paper_table.gather(write(tmp_path, *runs))
    rows = [row[:3] for row in cells(paper_table.table(found, "short")) if row[1]]
    assert rows == [
        ["BiGAN", "40", "2"],
        ["BiGAN", "400", "1, 1"],
        ["ALAE, preset fast", "9", "1"],
        ["ALAE, preset fast", "12", "1"],
    ]


def test_ours_stand_below_the_papers(tmp_path):
    runs = [paper_run(OFFICIAL, "dw", 0, 94.0), paper_run(OFFICIAL, "dw", 1, 96.0)]
    runs += [paper_run(FAST, "sw", 0, 93.0, 9), paper_run(FAST, "val", 0, 1.0)]
    again = ["python e.py --eval model.pt"]
    runs += [paper_run(OFFICIAL, "dw", 1, 50.0, commands=again)]  # counted once, as trained
    runs += [paper_run(OFFICIAL, "dw", 2, 1.0, status="interrupted", run="stopped")]
    found = paper_table.gather(write(tmp_path, *runs))
    rows = cells(paper_table.table(found, "long"))
    paper = ["**ALAE**, paper", "", "5", "97.61", "98.20", "97.47", "98.64"]
    ours = ["ALAE, official setting, bf16", "7", "2", "–", "–", "95.00 ± 1.41", "95.00 ± 1.41"]
    place = rows.index(paper)
    assert rows[place + 1] == ours
    assert rows[place + 2] == ["ALAE, preset fast", "9", "1", "93.00", "93.00", "–", "–"]
    front = cells(paper_table.front_table(found))
    assert front[0][:7] == [*ours[:3], "94.59", "**95.00**", "94.23", "**95.00**"]
    between = paper_table.gather(write(tmp_path / "between", paper_run(OFFICIAL, "dw", 0, 94.3)))
    assert cells(paper_table.front_table(between))[0][3:7] == [
        *("94.59", "94.30"),
        *("94.23", "**94.30**"),
    ]


def test_along_the_training_of_the_longest_run_and_at_the_ends_of_longer_ones(tmp_path):
    runs = [paper_run(OFFICIAL, "dw", 0, 94.0, epochs) for epochs in (5, 10, 20)]
    write(tmp_path, *runs)
    rows = "epoch,eval/recon_mse,eval/fid\n5,0.05,50\n10,0.04,40\n"
    (tmp_path / runs[1]["run"] / "metrics.csv").write_text(rows)
    line = paper_table.along(paper_table.gather(tmp_path))["ALAE, official setting, bf16"]
    assert [(epoch, row["eval/fid"]) for epoch, row in line.items()] == [
        (5, 50),
        (10, 10.0),
        (20, 10.0),
    ]


def test_the_committed_tables_are_those_of_the_committed_runs():
    found = paper_table.gather(ROOT / "results")
    for name, make in paper_table.TABLES.items():
        text = (ROOT / f"results/paper_table/{name}.md").read_text()
        assert text == make(found), f"{name}.md is stale: run step3_official_alae/paper_table.py"


# Figures


def test_a_figure_shows_the_runs_of_its_sweep_alone(tmp_path):
    facts = {"experiment": "gan_mnist", "eval/fid": 30.0, "train/grad_norm_G": 0.4}
    names = "gan_losses-r1-seed1", "gan_losses-wgan-gp-seed0", "other-r1-seed0"
    write(tmp_path, *(summary(0, 0.0, run=name, **facts) for name in names))
    found = figures.study(tmp_path, "gan_mnist", "gan_losses")
    assert {label: list(seeds) for label, seeds in found.items()} == {"r1": [1], "wgan-gp": [0]}
    assert found["r1"][1]["fid"] == 30.0 and found["r1"][1]["grad_norm_G"] == 0.4
    with pytest.raises(SystemExit):
        figures.study(tmp_path, "vae_gan", "gan_losses")


def test_the_ablation_is_drawn_from_the_worst_to_the_best():
    found = figures.study(ROOT / "results", "linear_alae", "ablation")
    assert len(found) == 18 and all(len(seeds) == 3 for seeds in found.values())
    labels = [
        text.get_text().removesuffix(": nothing changed")
        for text in figures.linear_ablation(ROOT / "results").axes[0].get_yticklabels()
    ]
    worst = {name: max(run["ratio_test"] for run in found[name].values()) for name in labels}
    assert list(worst.values()) == sorted(worst.values(), reverse=True)
    assert labels[-1] == "tangent" and labels.index("critic-linear") < labels.index("recipe")


def test_the_losses_of_a_gan_are_drawn_a_dot_a_seed_and_digit_by_digit():
    found = figures.study(ROOT / "results", "gan_mnist", "gan_losses")
    *panels, digits = figures.gan_losses(ROOT / "results").axes
    for axes, metric in zip(panels, ("fid", "grad_norm_G", "digit_kl"), strict=True):
        assert [text.get_text() for text in panels[0].get_yticklabels()] == list(found)
        for place, (line, seeds) in enumerate(zip(axes.lines, found.values(), strict=True)):
            assert list(line.get_xdata()) == [run[metric] for run in seeds.values()]
            assert set(line.get_ydata()) == {place}
    runs = chain.from_iterable(seeds.items() for seeds in found.values())
    for line, (seed, run) in zip(digits.lines, runs, strict=True):
        assert list(line.get_ydata()) == [run[f"digit_{digit}"] for digit in range(10)]
        assert line.get_linestyle() == ("-" if seed == 0 else "--")


def test_what_gets_clean_is_drawn_as_clean_md_has_it():
    text = (ROOT / "results/paper_table/clean.md").read_text()
    epochs = [int(cell) for cell in text.splitlines()[0].split("|")[3:-1]]
    panels = figures.clean(ROOT / "results").axes
    for axes, metric in zip(panels, ("test MSE", "identity %", "LeNet-FID"), strict=True):
        assert axes.get_ylabel() == metric
        lines = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.lines}
        rows = {label: numbers for label, name, *numbers in cells(text) if name == metric}
        assert lines.keys() == rows.keys()
        for label, numbers in rows.items():
            for epoch, number in zip(epochs, numbers, strict=True):
                if number != "–":
                    digits = len(number.partition(".")[2])
                    assert f"{lines[label][epoch]:.{digits}f}" == number


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_drawn_from_what_is_kept(name):
    make = figures.FIGURES[name]
    assert (ROOT / "assets" / f"{name}.png").exists()
    assert make(ROOT / "results").axes


def test_the_official_main_branch_leaves_208_outputs_of_G_alone():
    of_E, used, _ = figures.official_resampling(None).axes
    assert "208 of G's 784" in used.get_title()
    digits, resampled = np.split(of_E.get_images()[0].get_array(), 2)
    kept = [row for row in range(28) if row not in (5, 13, 21)]
    lines = np.vstack([digits[:2] * 0, digits[kept], digits[:1] * 0])  # of the first digit's rows
    first = np.hstack([lines[:, :2] * 0, lines[:, kept], lines[:, :1] * 0])
    assert np.array_equal(resampled[:, :28], first)


def test_the_svm_sees_features_as_they_are_and_standardised_by_the_training_images(monkeypatch):
    data, given = toy_data(), []
    config = svm_scale.autoencoder_mnist.Config()
    nets = svm_scale.autoencoder_mnist.build(config, 784)

    def svm_accuracy(*features, C):
        given.append((features, C))
        return 50.0

    monkeypatch.setattr(svm_scale.shared.classifiers, "svm_accuracy", svm_accuracy)
    text = svm_scale.table(config, data, nets)
    assert [C for _, C in given] == pytest.approx([0.0002, 0.002, 0.02, 0.2, 2.0] * 2)
    (train, y_train, test, y_test), (standard, _, other, _) = given[0][0], given[5][0]
    with torch.no_grad():
        torch.testing.assert_close(test, nets["E"][:4](data.x_test))
    assert y_train is data.y_train and y_test is data.y_test
    moved = (test - train.mean(0)) / (train.std(0) + 1e-6)
    torch.testing.assert_close(other, moved)
    assert standard.mean().abs() < 1e-5 and text.count("50.00") == 10


def test_the_svm_sees_the_images_in_the_range_of_alae():
    data, alae = toy_data(), svm_scale.train_fc_alae
    config = alae.Config(input_range="11")
    nets = alae.build(config, 784)
    train, test = svm_scale.long_features(nets, data, config)
    with torch.no_grad():
        torch.testing.assert_close(train, nets["E"][:4](2 * data.x_train - 1))
        torch.testing.assert_close(test, nets["E"][:4](2 * data.x_test - 1))
