"""Bad input gets one clear line on stderr and exit code 2, and nothing written before is lost."""
import gzip
import shutil

import pytest
import torch
from PIL import Image
from conftest import FC_ALAE, ROOT

PCA, LINEAR, LR, COMPARE = (f"step1_linear/{name}.py" for name in (
    "pca_gd", "linear_alae", "linear_latent_regressor", "compare_autoencoders"))
GAN, BIGAN, LR_MNIST, AE, ALAE = (f"step2_gan/{name}_mnist.py" for name in (
    "gan", "bigan", "latent_regressor", "autoencoder", "alae"))
AAE, SEMI, VAE_GAN = (f"baselines/{name}.py" for name in ("aae", "aae_semi_supervised", "vae_gan"))
EQUALIZED, TABLE = "step3_official_alae/equalized_lr.py", "step3_official_alae/paper_table.py"
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
    (FC_ALAE, ["--recipe", "slow"], "--recipe"),
    (FC_ALAE, ["--decay", "1.5"], "--decay 1.5"),
    (FC_ALAE, ["--eval", "{tmp}/nothing.pt"], "no such file"),
    (FC_ALAE, ["--eval", "{tmp}/file"], "no checkpoint"),
    (FC_ALAE, ["--eval", "{tmp}/other.pt"], "checkpoint of pca_gd"),
    (FC_ALAE, ["--eval", "{root}/assets/fc_alae.pt", "--lr", "1"], "was trained with --lr"),
    (FC_ALAE, ["--eval", "{root}/assets/fc_alae.pt", "--dataset", "folder:{tmp}/few"], "for images of 784 pixels"),
    (FC_ALAE, ["--resume", "{root}/assets/fc_alae.pt"], "a trained model"),
    (EQUALIZED, ["--lrs", "1e-4", "0"], "--lrs 0"),
    (EQUALIZED, ["--exact-steps", "0"], "--exact-steps 0"),
    (EQUALIZED, ["--batch-size", "60001"], "60000 images"),
    (EQUALIZED, ["--latent-dim", "785"], "784"),
    (EQUALIZED, ["--resume", "{tmp}/other.pt"], "checkpoint of pca_gd"),
    (TABLE, ["--methods", "vae"], "--methods"),
    (TABLE, ["--epochs", "0"], "--epochs 0"),
    (TABLE, ["--seeds", "0", "-1"], "--seeds -1"),
    (TABLE, ["--seed", "1"], "--seeds"),
    (TABLE, ["--dataset", "fashion_mnist"], "MNIST"),
    (TABLE, ["--out-dir", "{tmp}/file"], "cannot write"),
    (TABLE, ["--ablate", "--methods", "l2"], "of its own"),
    (FC_ALAE, ["--eval", "{root}/assets/fc_alae.pt", "--epochs", "3"], "was trained with --epochs"),
    (FC_ALAE, ["--eval", "{root}/assets/fc_alae.pt", "--resume", "{root}/assets/fc_alae.pt"], "a trained model"),
    (PCA, ["--k", "0"], "--k 0"),
    (PCA, ["--k", "784"], "1 to 783"),
    (PCA, ["--dataset", "swiss_roll", "--k", "3"], "1 to 2"),
    (PCA, ["--rho", "0"], "--rho"),
    (PCA, ["--steps", "0"], "--steps 0"),
    (LINEAR, ["--k", "0"], "--k 0"),
    (LINEAR, ["--k", "784"], "1 to 783"),
    (LINEAR, ["--batch-size", "60001"], "60000 images"),
    (LINEAR, ["--critic", "cubic"], "--critic"),
    (LINEAR, ["--setup", "none"], "--setup"),
    (LINEAR, ["--gamma", "-1"], "--gamma -1"),
    (LINEAR, ["--dataset", "folder:{tmp}/grey", "--batch-size", "2", "--k", "2"], "all the same"),
    (LINEAR, ["--resume", "{tmp}/other.pt"], "checkpoint of pca_gd, not of linear_alae"),
    (LR, ["--dataset", "swiss_roll", "--k", "3"], "1 to 2"),
    (LR, ["--batch-size", "60001"], "60000 images"),
    (LR, ["--dataset", "folder:{tmp}/grey", "--batch-size", "2", "--k", "2"], "all the same"),
    (LR, ["--resume", "{tmp}/other.pt"], "checkpoint of pca_gd"),
    (ALAE, ["--latent-dim", "785"], "784"),
    (ALAE, ["--lrmul", "0"], "--lrmul 0"),
    (ALAE, ["--batch-size", "60001"], "60000 images"),
    (ALAE, ["--dataset", "swiss_roll"], "unknown"),
    (ALAE, ["--resume", "{tmp}/other.pt"], "checkpoint of pca_gd, not of alae_mnist"),
    (AE, ["--loss", "huber"], "--loss"),
    (AE, ["--noise", "-1"], "--noise -1"),
    (AE, ["--latent-dim", "785"], "784"),
    (AE, ["--batch-size", "60001"], "60000 images"),
    (AE, ["--resume", "{tmp}/older.pt"], "checkpoint of train_fc_alae, not of autoencoder_mnist"),
    (BIGAN, ["--latent-dim", "785"], "784"),
    (BIGAN, ["--batch-size", "1"], "--batch-size 1"),
    (BIGAN, ["--batch-size", "60001"], "60000 images"),
    (BIGAN, ["--dataset", "sine_sheet"], "unknown"),
    (BIGAN, ["--resume", "{tmp}/file"], "no checkpoint"),
    (LR_MNIST, ["--joint-weight", "-1"], "--joint-weight -1"),
    (LR_MNIST, ["--latent-dim", "785"], "784"),
    (LR_MNIST, ["--batch-size", "60001"], "60000 images"),
    (LR_MNIST, ["--resume", "{tmp}/nothing.pt"], "no such file"),
    (GAN, ["--loss", "hinge"], "--loss"),
    (GAN, ["--net", "unet"], "--net"),
    (GAN, ["--critic-steps", "-1"], "--critic-steps -1"),
    (GAN, ["--loss", "wgan_gp", "--batch-size", "12001"], "60005 images of 60000"),
    (GAN, ["--compare", "--dataset", "folder:{tmp}/grey"], "needs --dataset mnist"),
    (GAN, ["--resume", "{tmp}/other.pt"], "checkpoint of pca_gd"),
    (AAE, ["--recipe", "seed001"], "--recipe"),
    (AAE, ["--prior", "uniform"], "--prior"),
    (AAE, ["--prior", "gmm10", "--latent-dim", "3"], "has 2"),
    (AAE, ["--labels", "--dataset", "folder:{tmp}/few", "--batch-size", "2"], "has none"),
    (AAE, ["--latent-dim", "785"], "784"),
    (AAE, ["--batch-size", "1"], "--batch-size 1"),
    (AAE, ["--batch-size", "60001"], "60000 images"),
    (AAE, ["--dropout", "1"], "--dropout 1"),
    (AAE, ["--resume", "{tmp}/other.pt"], "checkpoint of pca_gd, not of aae"),
    (SEMI, ["--labels", "105"], "multiple of 10"),
    (SEMI, ["--labels", "60000"], "at most 54210"),
    (SEMI, ["--labels", "-1"], "--labels -1"),
    (SEMI, ["--cluster", "1"], "--cluster 1"),
    (SEMI, ["--cluster", "1001"], "at most 1000"),
    (SEMI, ["--cluster", "30", "--labels", "100"], "without --labels"),
    (SEMI, ["--dataset", "folder:{tmp}/few", "--batch-size", "2"], "choose --cluster"),
    (SEMI, ["--latent-dim", "785"], "784"),
    (SEMI, ["--batch-size", "60001"], "60000 images"),
    (SEMI, ["--resume", "{tmp}/file"], "no checkpoint"),
    (VAE_GAN, ["--recipe", "seed002"], "--recipe"),
    (VAE_GAN, ["--image-size", "48"], "--image-size"),
    (VAE_GAN, ["--width", "-1"], "--width"),
    (VAE_GAN, ["--batch-size", "1"], "--batch-size 1"),
    (VAE_GAN, ["--batch-size", "60001"], "60000 images"),
    (VAE_GAN, ["--dataset", "sine_sheet"], "unknown"),
    (VAE_GAN, ["--latent-dim", "785"], "784"),
    (VAE_GAN, ["--benchmark", "--recipe", "seed003"], "seed 001"),
    (VAE_GAN, ["--resume", "{tmp}/other.pt"], "checkpoint of pca_gd, not of vae_gan"),
    (COMPARE, ["--k", "10", "784"], "1 to 783"),
    (COMPARE, ["--k", "10", "0"], "--k 0"),
    (COMPARE, ["--methods", "pca", "svd"], "--methods"),
    (COMPARE, ["--methods", "pixels"], "at least one"),
    (COMPARE, ["--datasets", "folder:{tmp}/few", "--k", "5"], "1 to 4 on"),
    (LINEAR, ["--dataset", "folder:{tmp}/few", "--k", "5", "--batch-size", "2"], "1 to 4"),
    (LR, ["--dataset", "folder:{tmp}/few", "--k", "5", "--batch-size", "2"], "1 to 4"),
    (LINEAR, ["--ablate", "--setup", "seed"], "--setup seed"),
    (COMPARE, ["--datasets", "folder:{tmp}/few", "folder:{tmp}/other/few"], "same name"),
    (COMPARE, ["--datasets", "mnist", "imagenet"], "unknown"),
    (COMPARE, ["--datasets", "folder:{tmp}/grey", "--k", "2"], "all the same"),
    (COMPARE, ["--data-dir", "{tmp}/corrupt"], "MD5"),
    ("results/table.py", ["--collect", "{tmp}/empty"], "no summary.json"),
    ("results/table.py", ["--collect", "{tmp}/half"], "not the summary"),
    ("results/table.py", ["{tmp}/half"], "not the summary"),
    ("results/table.py", ["{tmp}/nowhere"], "no such folder"),
]


def assert_refused(done, fragment):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and fragment in lines[0] and lines[0].split(" ")[0].endswith(".py:"), done.stderr


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of things that should be refused."""
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "empty").mkdir(), (tmp / "half").mkdir()
    (tmp / "half" / "summary.json").write_text('{"experiment": "train')
    (tmp / "file").write_text("no folder, no checkpoint")
    (tmp / "broken").mkdir(), (tmp / "damaged").mkdir(), (tmp / "grey").mkdir()
    for i in range(6):
        Image.new("L", (28, 28), 90).save(tmp / "grey" / f"{i}.png")
        (tmp / "broken" / f"{i}.png").write_bytes(b"no picture")
        Image.new("RGB", (30, 30)).save(tmp / "damaged" / f"{i}.png")
    (tmp / "few").mkdir(), (tmp / "other" / "few").mkdir(parents=True)
    for i in range(6):
        for folder in (tmp / "few", tmp / "other" / "few"):
            Image.effect_noise((8, 8), 50 + i).save(folder / f"{i}.png")
    png = (tmp / "damaged" / "0.png").read_bytes()
    (tmp / "damaged" / "0.png").write_bytes(png.replace(b"IDAT", b"IDAX"))
    shutil.copytree(ROOT / "data/MNIST/raw", tmp / "corrupt/MNIST/raw", ignore=shutil.ignore_patterns("*ubyte"))
    with gzip.open(tmp / "corrupt/MNIST/raw/t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"corrupt")
    torch.save({"experiment": "pca_gd", "file": "checkpoint.pt", "config": {}}, tmp / "other.pt")
    torch.save({"experiment": "train_fc_alae", "file": "checkpoint.pt", "config": {"of_old": 1}}, tmp / "older.pt")
    torch.save({"weight": torch.zeros(3)}, tmp / "foreign.pt")
    return tmp


@pytest.mark.parametrize("file, args, fragment", CASES, ids=[f"{file} {' '.join(args)}" for file, args, _ in CASES])
def test_bad_input(file, args, fragment, bad, here, command, tmp_path):
    run = command if "--wandb" in args else here
    assert_refused(run(file, *(arg.format(tmp=bad, root=ROOT) for arg in args)), fragment)
    assert not list(tmp_path.glob("runs/*/*")), "a run's folder was left"


def test_runs_are_never_shared_nor_lost(here, bare, tmp_path):
    assert here(FC_ALAE, "--smoke", "--run-name", "mine").returncode == 0
    folder = tmp_path / "runs/train_fc_alae/mine"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert_refused(here(FC_ALAE, "--smoke", "--run-name", "mine"), "exists")
    checkpoint = folder / "checkpoint.pt"
    assert_refused(here(FC_ALAE, "--resume", checkpoint, "--lr", "0.004"), "--lr 0.002, not 0.004")
    assert_refused(here(FC_ALAE, "--resume", checkpoint, "--epochs", "1"), "2 already")
    assert_refused(here(FC_ALAE, "--resume", folder / "model.pt"), "holds a trained model")
    checkpoint.write_bytes(before["checkpoint.pt"][:5000])
    assert_refused(here(FC_ALAE, "--resume", checkpoint), "damaged")
    checkpoint.write_bytes(before["checkpoint.pt"])
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_comparison_without_any_data_says_how_to_get_it(here, tmp_path):
    done = here(COMPARE, "--data-dir", str(tmp_path / "nothing"))
    assert_refused(done, "none of the datasets")
    assert "mnist is skipped" in done.stdout and len(done.stdout.splitlines()) == 1 and not (tmp_path / "runs").exists()


def test_comparison_passes_on_why_another_file_failed(command, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(
        "import sys\nif 'linear_latent_regressor.py' in ' '.join(sys.orig_argv):\n    sys.exit('out of luck')\n")
    done = command(COMPARE, "--datasets", "sine_sheet", "--methods", "pca", "lr", "--smoke", "--workers", "1", "--run-name", "a",
                   PYTHONPATH=str(tmp_path / "broken"))
    assert done.returncode == 1 and "linear LR on sine_sheet, k = 2" in done.stderr and "out of luck" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
