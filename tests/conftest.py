"""Helpers of the tests: running a file as a user does, or in this process; watching optimizers."""

import functools
import importlib
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is promised to the bit is promised for a CPU
import shared

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FC_ALAE = "step3_official_alae/train_fc_alae.py"
# Nobody is logged in to W&B, and nothing can be downloaded: a proxy that refuses.
NO_NETWORK = {
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "NETRC": "/dev/null",
    "WANDB_CONFIG_DIR": "/nonexistent",
}
ENVIRONMENT = {key: os.environ[key] for key in os.environ if not key.startswith(("WANDB", "GOMP"))}
ENVIRONMENT |= NO_NETWORK


# Each test in this process reads the 60,000 images, once
shared.load_archives = functools.cache(shared.load_archives)


def launch(file, *arguments, cwd=ROOT, **environment):
    """Runs a file of the repository as a user does; returns the finished process."""
    command = [sys.executable, str(ROOT / file), *map(str, arguments)]
    env = ENVIRONMENT | environment
    return subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, timeout=300)


@pytest.fixture(scope="session")
def launched(tmp_path_factory):
    """A finished process that trained as a user does, where W&B is not installed; its folder."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "wandb.py").write_text("raise ImportError('not installed')")
    how = ["--smoke", "--epochs", 1, "--out_dir", folder, "--run-name=mine"]
    done = launch(FC_ALAE, *how, PYTHONPATH=str(folder), OMP_DISPLAY_ENV="VERBOSE")
    return done, folder / "train_fc_alae/mine"


@pytest.fixture
def here(monkeypatch, capsys):
    """As launch, but in this process, which spares the imports."""

    def run(file, *arguments):
        for key, value in NO_NETWORK.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(sys, "argv", [str(ROOT / file), *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(ROOT / file), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, said.out, said.err)

    return run


def train(monkeypatch, module, *arguments):
    """Runs an experiment's main in this process."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    config = shared.parse_config(module.Config, getattr(module, "PRESETS", None))
    module.main(config)


@pytest.fixture(autouse=True)
def as_before():
    """A run sets signal handlers and the precision of products: each test starts with the usual."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def shrink(patch):
    """400 + 200 images, of 10,000 samples as many, small pictures, of the classifiers 1-NN alone.

    The run of `launched` has all of that at full size.
    """
    load_archives, chunked = shared.load_archives, shared.chunked
    savefig = shared.Figure.savefig

    def first_images(*arguments):
        (x, y), (x_test, y_test) = load_archives(*arguments)
        return (x[:400], y[:400]), (x_test[:200], y_test[:200])

    def first_rows(function, x, size=2000):
        return chunked(function, x[:400], size)

    def small_picture(figure, path, **_):
        savefig(figure, path, format="png", dpi=20)

    patch.setattr(shared, "load_archives", first_images)
    patch.setattr(shared, "chunked", first_rows)
    patch.setattr(shared.Figure, "savefig", small_picture)
    patch.setattr(shared.classifiers, "svm_accuracy", lambda *_: 50.0)
    patch.setattr(shared.classifiers, "mlp_accuracy", lambda *_: 50.0)


@pytest.fixture
def few_images(monkeypatch):
    """The images, samples and pictures of the runs of `finished`."""
    shrink(monkeypatch)


def smoke_options(module):
    """Of a short run of an experiment: where there are epochs, it has 2 of 2 steps."""
    options = ["--smoke", "--seed", 5]
    if hasattr(module.Config, "batch_size"):
        options += ["--batch-size", 200]
    if module.__name__ == "aae_semi_supervised":
        options += ["--labels", 100]  # 400 images have not the usual 1,000
    if module.__name__ == "equalized_lr":
        options += ["--exact-steps", 1]
    if module.__name__ == "pca_gd":
        options += ["--k", 5]
    return options


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """name → the folder of a finished run of that experiment, which tests share and leave alone."""

    @functools.cache
    def run(name):
        out_dir, module = tmp_path_factory.mktemp("finished"), importlib.import_module(name)
        options = [*smoke_options(module), "--out-dir", out_dir, "--run-name", "run"]
        with pytest.MonkeyPatch.context() as patch:
            shrink(patch)
            train(patch, module, *options)
        return out_dir / name / "run"

    return run


@pytest.fixture
def cheap(monkeypatch):
    """Training without pictures and classifiers, a good part of a short run's time."""
    monkeypatch.setattr(shared.Run, "picture", lambda *_: None)
    monkeypatch.setattr(shared, "code_metrics", lambda *_, **__: {})
    monkeypatch.setattr(shared, "image_metrics", lambda *_, **__: {})


def toy_data(n=300, m=200, size=784, classes=10, name="mnist"):
    """Random images whose labels are the place of a bright pixel; name 'mnist' or another."""
    generator = torch.Generator().manual_seed(0)

    def part(n):
        y = torch.arange(n) % classes
        x = 0.5 * torch.rand(n, size, generator=generator)
        x[torch.arange(n), y] = 1.0
        return x, y

    side = int(size**0.5)
    return shared.Data(name, *part(n), *part(m), torch.Size([1, side, side]))


def size(net):
    return sum(p.numel() for p in net.parameters())


def trained(monkeypatch, tmp_path, module, losses, *arguments):
    """The calls of train_step, which returns these losses, in a smoke run, and its checkpoint."""
    calls = []

    def train_step(*args):
        calls.append(args)
        return {name: torch.tensor(loss) for name, loss in losses.items()}

    monkeypatch.setattr(module, "train_step", train_step)
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: {"eval/recon_mse": 0.0})
    monkeypatch.setattr(module, "draw", lambda *_: None)
    monkeypatch.setattr(module, "animate", lambda *_: None, raising=False)
    train(monkeypatch, module, "--smoke", "--out-dir", tmp_path, "--run-name", "a", *arguments)
    path = tmp_path / module.__name__ / "a/checkpoint.pt"
    return calls, torch.load(path, weights_only=True)


def prior_gap(module, z, config):
    """As evaluate averages it: the distance to four draws of p(z), and of these to others."""
    draws = [module.sample_prior(z, config, seed) for seed in range(1, 9)]
    gap = sum(shared.prior.sliced_wasserstein(z, draw) for draw in draws[1::2]) / 4
    pairs = zip(draws[::2], draws[1::2], strict=True)
    return gap, sum(shared.prior.sliced_wasserstein(a, b) for a, b in pairs) / 4


def record(monkeypatch):
    """Puts spies in place of the shared instruments; returns what they were given."""
    given = {}

    def image_metrics(data, x_rec=None, x_fake=None):
        given.setdefault("images", []).append((x_rec, x_fake))
        return {}

    def code_metrics(data, train, test, kind, full=True):
        given[kind] = train, test
        return {}

    monkeypatch.setattr(shared, "image_metrics", image_metrics)
    monkeypatch.setattr(shared, "code_metrics", code_metrics)
    return given


def see(monkeypatch):
    """Puts spies in place of the pictures' functions; returns the images that they were given."""
    seen = {"grid": [], "pairs": []}
    monkeypatch.setattr(shared, "grid", lambda images, *_: seen["grid"].append(images))
    monkeypatch.setattr(shared, "pairs", lambda x, x_rec, _: seen["pairs"].append((x, x_rec)))
    return seen


def state_of(nets):
    """All that an evaluation must leave alone: the nets, their mode, the random numbers."""
    state = {name: value.clone() for name, value in nets.state_dict().items()}
    return state, nets.training, torch.get_rng_state()


def fake_run(nets, config):
    """A run that keeps its pictures' names, and draws nothing."""
    names = []
    run = SimpleNamespace(nets=nets, config=config, epoch=config.epochs, names=names)
    run.picture = lambda name, figure: names.append(name)
    return run


def watch(nets, **optimizers):
    """Makes each optimizer note which of the nets its step moves; returns the list of notes."""
    notes = []

    def values(net):
        return torch.cat([p.detach().flatten().clone() for p in net.parameters()])

    def watched(name, step):
        def watched_step():
            before = {key: values(net) for key, net in nets.items()}
            step()
            moved = {key for key, net in nets.items() if not values(net).equal(before[key])}
            notes.append((name, moved))

        return watched_step

    for name, optimizer in optimizers.items():
        optimizer.step = watched(name, optimizer.step)
    return notes


def assert_same(a, b):
    """Equal to the bit, through dicts and lists of tensors."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, torch.Tensor):
        assert a.equal(b)
    else:
        assert a == b


def check_an_eighth(nets, size):
    """A VAE-GAN's nets of an eighth of the width take and give pictures of this size."""
    x = torch.rand(2, 3, size, size)
    assert nets["Dec"](nets["Enc"](x)[0]).shape == x.shape and nets["Dis"](x).shape == (2, 1)
    assert nets["Enc"][0].out_channels == 8 and nets["Dis"][0][0].out_channels == 4
