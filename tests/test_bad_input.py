"""Bad input gets one clear line on stderr and exit code 2, and nothing written before is lost."""
import gzip
import shutil

import pytest
import torch
from PIL import Image
from conftest import FC_ALAE, ROOT

PCA = "step1_linear/pca_gd.py"
CASES = [
    (FC_ALAE, ["--nonsense"], "--nonsense"),
    (FC_ALAE, ["--split", "test"], "--split"),
    (FC_ALAE, ["--epochs", "many"], "--epochs"),
    (FC_ALAE, ["--epochs", "0"], "--epochs 0"),
    (FC_ALAE, ["--epochs", "-3"], "--epochs -3"),
    (FC_ALAE, ["--batch-size", "0"], "--batch-size 0"),
    (FC_ALAE, ["--batch-size", "60001"], "60000 images"),
    (FC_ALAE, ["--latent-dim", "0"], "--latent-dim 0"),
    (FC_ALAE, ["--latent-dim", "785"], "784"),
    (FC_ALAE, ["--lr", "nan"], "--lr nan"),
    (FC_ALAE, ["--lr", "inf"], "--lr inf"),
    (FC_ALAE, ["--seed", "99999999999999999999"], "--seed"),
    (FC_ALAE, ["--device", "tpu"], "--device"),
    (FC_ALAE, ["--device", "mps"], "no such device"),
    (FC_ALAE, ["--dataset", "imagenet"], "unknown"),
    (FC_ALAE, ["--dataset", "folder:/no/such/folder"], "no such folder"),
    (FC_ALAE, ["--dataset", "folder:{tmp}/empty"], "only 0 pictures"),
    (FC_ALAE, ["--dataset", "folder:{tmp}/broken"], "not a readable picture"),
    (FC_ALAE, ["--dataset", "folder:{tmp}/damaged"], "not a readable picture"),
    (FC_ALAE, ["--data-dir", "{tmp}/empty"], "could not be fetched"),
    (FC_ALAE, ["--dataset", "cifar10", "--data-dir", "{tmp}/empty"], "could not be fetched"),
    (FC_ALAE, ["--dataset", "celeba", "--data-dir", "{tmp}/empty"], "could not be fetched"),
    (FC_ALAE, ["--data-dir", "{tmp}/corrupt"], "MD5"),
    (FC_ALAE, ["--out-dir", "{tmp}/file"], "cannot write"),
    (FC_ALAE, ["--run-name", "a/b"], "--run-name"),
    (FC_ALAE, ["--resume", "{tmp}/nothing.pt"], "no such file"),
    (FC_ALAE, ["--resume", "{tmp}/file"], "no checkpoint"),
    (FC_ALAE, ["--resume", "{tmp}/foreign.pt"], "no checkpoint"),
    (FC_ALAE, ["--resume", "{tmp}/other.pt"], "checkpoint of pca_gd"),
    (FC_ALAE, ["--resume", "{tmp}/older.pt"], "other version"),
    (FC_ALAE, ["--wandb", "--smoke"], "wandb login"),
    (PCA, ["--k", "0"], "--k 0"),
    (PCA, ["--k", "784"], "1 to 783"),
    (PCA, ["--dataset", "swiss_roll", "--k", "3"], "1 to 2"),
    (PCA, ["--rho", "0"], "--rho"),
    (PCA, ["--steps", "0"], "--steps 0"),
    ("results/table.py", ["--collect", "{tmp}/empty"], "no summary.json"),
    ("results/table.py", ["--collect", "{tmp}/half"], "not the summary"),
    ("results/table.py", ["{tmp}/half"], "not the summary"),
    ("results/table.py", ["{tmp}/nowhere"], "no such folder"),
]


def assert_refused(done, fragment):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and fragment in lines[0] and ".py: error: " in lines[0][:30], done.stderr


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of things that should be refused."""
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "empty").mkdir(), (tmp / "half").mkdir()
    (tmp / "half" / "summary.json").write_text('{"experiment": "train')
    (tmp / "file").write_text("no folder, no checkpoint")
    (tmp / "broken").mkdir(), (tmp / "damaged").mkdir()
    for i in range(6):
        (tmp / "broken" / f"{i}.png").write_bytes(b"no picture")
        Image.new("RGB", (30, 30)).save(tmp / "damaged" / f"{i}.png")
    png = (tmp / "damaged" / "0.png").read_bytes()
    (tmp / "damaged" / "0.png").write_bytes(png.replace(b"IDAT", b"IDAX"))
    shutil.copytree(ROOT / "data/MNIST/raw", tmp / "corrupt/MNIST/raw", ignore=shutil.ignore_patterns("*ubyte"))
    with gzip.open(tmp / "corrupt/MNIST/raw/t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"corrupt")
    torch.save({"experiment": "pca_gd", "file": "checkpoint.pt", "config": {}}, tmp / "other.pt")
    torch.save({"experiment": "train_fc_alae", "file": "checkpoint.pt", "config": {"of_old": 1}}, tmp / "older.pt")
    torch.save({"weight": torch.zeros(3)}, tmp / "foreign.pt")
    return tmp


@pytest.mark.parametrize("file, args, fragment", CASES, ids=[" ".join(args) for _, args, _ in CASES])
def test_bad_input(file, args, fragment, bad, command, tmp_path):
    done = command(file, *(arg.format(tmp=bad) for arg in args))
    assert_refused(done, fragment)
    assert not list(tmp_path.glob("runs/*/*")), "a run's folder was left"


def test_runs_are_never_shared_nor_lost(command, tmp_path):
    first = command(FC_ALAE, "--smoke", "--run-name", "mine")
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "runs/train_fc_alae/mine"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert_refused(command(FC_ALAE, "--smoke", "--run-name", "mine"), "exists")
    checkpoint = folder / "checkpoint.pt"
    assert_refused(command(FC_ALAE, "--resume", checkpoint, "--lr", "0.004"), "--lr 0.002, not 0.004")
    assert_refused(command(FC_ALAE, "--resume", checkpoint, "--epochs", "1"), "2 already")
    assert_refused(command(FC_ALAE, "--resume", folder / "model.pt"), "holds a trained model")
    checkpoint.write_bytes(before["checkpoint.pt"][:5000])
    assert_refused(command(FC_ALAE, "--resume", checkpoint), "damaged")
    checkpoint.write_bytes(before["checkpoint.pt"])
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
