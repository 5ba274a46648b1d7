"""What users get wrong: one clear line on stderr, exit code 2, and nothing written is lost."""

import gzip
import json
import shutil
import signal

import shared

import pytest
import torch
from conftest import FC_ALAE, ROOT, launch
from PIL import Image

GAN, LINEAR = "step2_gan/gan_mnist.py", "step1_linear/linear_alae.py"
REFIT = "step3_official_alae/refit_encoder.py"
EVAL = ["--eval", "{root}/assets/fc_alae.pt"]
CASES = [
    (FC_ALAE, ["--nonsense"], "--nonsense"),
    (FC_ALAE, ["--split", "test"], "--split"),
    (FC_ALAE, ["--epochs", "many"], "'many'"),
    (FC_ALAE, ["--epochs", "-3"], "must be in [0,"),
    (FC_ALAE, ["--lr", "nan"], "nan"),
    (FC_ALAE, ["--lr", "inf"], "9.22e+18)"),
    (FC_ALAE, ["--seed", "9" * 17], "4.29e+09)"),
    (GAN, ["--beta1", "1"], "[0, 1)"),
    (FC_ALAE, ["--decay", "50"], "must be in [0, 1.01)"),
    ("assets/lenet.py", [], "would make all numbers incomparable"),
    (GAN, ["--smoke", "--critic-steps", "100"], "--batch-size 128: must be 2, 3, … times"),
    (FC_ALAE, ["--preset", "slow"], "--preset"),
    (FC_ALAE, ["--smoke", "--batch-size", "2001"], "only 2000 training images"),
    (FC_ALAE, ["--device", "mps"], "no such device"),
    (FC_ALAE, ["--dataset", "imagenet"], "unknown"),
    (FC_ALAE, ["--dataset", "folder:/no/such/folder"], "0 pictures there"),
    (FC_ALAE, ["--dataset", "folder:"], "unknown"),
    (FC_ALAE, ["--dataset", "folder:{tmp}/broken"], "not a readable picture"),
    (FC_ALAE, ["--dataset", "folder:{tmp}/deep"], "8 bits a channel are needed"),
    (FC_ALAE, ["--data-dir", "{tmp}/nothing"], "could not be fetched"),
    (FC_ALAE, ["--data-dir", "{tmp}/corrupt"], "damaged"),
    (FC_ALAE, ["--smoke", "--out-dir", "{tmp}/file"], "cannot make"),
    (FC_ALAE, ["--resume", "{tmp}/nothing.pt"], "FileNotFoundError"),
    (FC_ALAE, ["--resume", ""], "no checkpoint that can be read"),
    (FC_ALAE, ["--eval", ""], "no checkpoint that can be read"),
    (FC_ALAE, ["--resume", "{tmp}/file"], "no checkpoint"),
    (FC_ALAE, ["--resume", "{tmp}/other.pt"], "a checkpoint of pca_gd"),
    (FC_ALAE, ["--resume", "{tmp}/old.pt"], "not of this version"),
    (FC_ALAE, ["--resume", "{root}/assets/fc_alae.pt"], "no checkpoint.pt with at most"),
    (FC_ALAE, ["--resume", "{tmp}/preset.pt"], "not of this version"),
    (FC_ALAE, [*EVAL, "--lr", "1"], "--lr: leave it out"),
    (FC_ALAE, [*EVAL, "--split", "val"], "trained on its test"),
    (FC_ALAE, [*EVAL, "--dataset", "mnist", "--split", "val"], "trained on its test"),
    (LINEAR, ["--smoke", "--k", "784"], "spans 624 dimensions"),
    (REFIT, ["--model", "{tmp}/nothing.pt"], "cannot be read"),
    (REFIT, ["--model", "{tmp}/other.pt"], "no model.pt of train_fc_alae.py"),
    (REFIT, ["--split", "val"], "--split: leave it out"),
]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of things that should be refused."""
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "file").write_text("no folder, no checkpoint")
    (tmp / "broken").mkdir()
    for i in range(100):
        (tmp / "broken" / f"{i}.png").write_bytes(b"no picture")
    (tmp / "deep").mkdir()
    for i in range(100):  # 16 bits
        Image.new("I;16", (8, 8), 600 * i).save(tmp / "deep" / f"{i}.png")
    raw = tmp / "corrupt/MNIST/raw"
    shutil.copytree(ROOT / "data/MNIST/raw", raw, ignore=shutil.ignore_patterns("*ubyte"))
    with gzip.open(raw / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"corrupt")
    torch.save({"experiment": "pca_gd", "config": {}}, tmp / "other.pt")
    old = {"experiment": "train_fc_alae", "config": {"renamed_since": 1}}
    torch.save(old, tmp / "old.pt")
    torch.save(old | {"config": {"preset": "renamed since"}}, tmp / "preset.pt")
    return tmp


def assert_refused(done, fragment):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and fragment in lines[0], done.stderr
    assert lines[0].split(" ")[0].endswith(".py:")


@pytest.mark.parametrize("file, arguments, fragment", CASES, ids=lambda case: str(case)[:60])
def test_refused_in_a_line(file, arguments, fragment, bad, here, tmp_path):
    arguments = [word.format(tmp=bad, root=ROOT) for word in arguments]
    if not {"--out-dir", "--resume"} & set(arguments):
        arguments += ["--out-dir", tmp_path]
    assert_refused(here(file, *arguments), fragment)
    assert not list(tmp_path.glob("*/*")), "a run's folder was left"


def test_ctrl_c_while_pictures_are_read_is_told_in_a_line(here, monkeypatch):
    monkeypatch.setattr(shared, "load_data", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    done = here(FC_ALAE, "--smoke")
    assert done.returncode == 130 and done.stderr.count("\n") == 1, done.stderr
    assert "interrupted, nothing was written" in done.stderr


def test_a_model_of_other_images_is_refused_before_anything_is_written(here, tmp_path):
    for i in range(100):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i}.png")
    how = ["--eval", ROOT / "assets/fc_alae.pt", "--dataset", f"folder:{tmp_path}"]
    assert_refused(here(FC_ALAE, *how, "--out-dir", tmp_path, "--run-name", "mine"), "does not fit")
    assert not (tmp_path / "train_fc_alae/mine").exists()


def test_a_checkpoint_of_another_net_is_refused_and_its_finished_run_stays(here, tmp_path):
    linear = ROOT / "step1_linear/linear_autoencoder.py"
    here(linear, "--smoke", "--out-dir", tmp_path, "--run-name", "mine")
    run = tmp_path / "linear_autoencoder/mine"
    before = (run / "summary.json").read_text()
    assert json.loads(before)["status"] == "done"
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    checkpoint["nets"].popitem()
    torch.save(checkpoint, run / "checkpoint.pt")
    assert_refused(here(linear, "--resume", run / "checkpoint.pt"), "does not fit")
    assert (run / "summary.json").read_text() == before


def test_wandb_without_a_login_is_refused_before_training(tmp_path):
    done = launch(FC_ALAE, "--smoke", "--wandb", "--out-dir", tmp_path)
    assert done.returncode == 2 and "wandb login" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("*/*"))


def test_runs_are_never_shared_nor_lost(here, cheap, few_images, tmp_path):
    how = ["--smoke", "--batch-size", 400, "--out-dir", tmp_path, "--run-name", "mine"]
    assert here(FC_ALAE, *how).returncode == 0
    folder = tmp_path / "train_fc_alae/mine"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert_refused(here(FC_ALAE, *how), "File exists")
    checkpoint = folder / "checkpoint.pt"
    assert_refused(here(FC_ALAE, "--resume", checkpoint, "--lr", 0.004), "--lr: leave it out")
    assert_refused(here(FC_ALAE, "--resume", checkpoint, "--epochs", 1), "at most 1 epochs")
    checkpoint.write_bytes(before["checkpoint.pt"][:5000])
    assert_refused(here(FC_ALAE, "--resume", checkpoint), "no checkpoint that can be read")
    checkpoint.write_bytes(before["checkpoint.pt"])
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_images_that_are_all_the_same_are_no_data_for_linear_maps(here, tmp_path, monkeypatch):
    load_data = shared.load_data
    monkeypatch.setattr(shared, "load_data", lambda *given, **_: load_data(*given, size=8))
    for i in range(100):
        Image.new("L", (8, 8), 90).save(tmp_path / f"{i}.png")
    how = ["--dataset", f"folder:{tmp_path}", "--k", 2, "--batch-size", 2, "--out-dir", tmp_path]
    assert_refused(here(LINEAR, *how), "spans 0 dimensions")
