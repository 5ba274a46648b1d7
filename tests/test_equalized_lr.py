"""LREQAdam, run-time scaling and Adam with parameter groups are one trajectory; what is equalized."""
import json
import signal

import pytest
import torch
from conftest import train_here

import equalized_lr as lr
import shared
import train_fc_alae as alae


class NoRun:
    stop = False


SMALL = lr.Config(latent_dim=5, exact_batch=4, exact_steps=20)


def test_three_ways_are_one_trajectory_but_for_epsilon():
    x = torch.rand(50, 20)
    exact, usual = ({way: max(line) for way, line in lr.trajectories(SMALL, x, eps, NoRun).items()} for eps in (1e-30, 1e-8))
    assert exact.keys() == {"runtime", "groups"} and max(exact.values()) < 1e-10
    assert min(usual.values()) > 1e3 * max(exact.values())


def test_all_ways_start_from_the_same_weights():
    w = [lr.weights(lr.start(way, SMALL, 20, "cpu", 0.002)["nets"]) for way in lr.WAYS]
    for other in w[1:]:
        for name in w[0]:
            torch.testing.assert_close(w[0][name], other[name])
    assert w[0]["G.2.weight"].std().item() == pytest.approx((2 / 1024) ** 0.5, rel=0.01)


def test_the_first_step_is_lr_times_lrmul_in_every_layer_under_equalization_alone():
    x, z = torch.rand(64, 30, dtype=torch.float64), torch.randn(3, 64, 50, dtype=torch.float64)
    moved = {}
    for way in lr.WAYS:
        parts = lr.start(way, lr.Config(), 30, "cpu", 0.002, 1e-30, torch.float64)
        real, before, calls = parts["opt_ED"].step, lr.weights(parts["nets"]), []

        def step():
            real()
            calls.append(lr.relative(lr.weights(parts["nets"]), before))
        parts["opt_ED"].step = step
        lr.train_step(*parts.values(), x, z, 10.0)
        moved[way] = {name: value for name, value in calls[0].items() if name[0] in "ED" and name.endswith("weight")}
    for way in ("lreq", "runtime", "groups"):
        for name, value in moved[way].items():
            assert value == pytest.approx(0.002 * (0.1 if name[0] == "D" else 1), rel=0.3), (way, name)
    assert moved["plain"]["E.2.weight"] / moved["plain"]["E.0.weight"] == pytest.approx((1024 / 30) ** 0.5, rel=0.1)


def test_lreq_adam_is_the_one_of_train_fc_alae():
    torch.manual_seed(0)
    a, b = lr.Linear(6, 3, 0.1), alae.Linear(6, 3, 0.1)
    b.double().load_state_dict(a.state_dict())
    assert [p.c for p in a.parameters()] == pytest.approx([q.lr_equalization_coef for q in b.parameters()])
    mine, theirs = lr.LREQAdam(a.parameters(), 0.01, eps=1e-3), alae.LREQAdam(b.parameters(), 0.01, eps=1e-3)
    for _ in range(5):
        for p, q in zip(a.parameters(), b.parameters()):
            p.grad = q.grad = torch.randn_like(p)
        mine.step(), theirs.step()
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_resume_equals_no_interruption(bare, tmp_path, monkeypatch, capsys):
    args = ["--smoke", "--epochs", "2", "--exact-steps", "1", "--lrs", "1e-4", "--batch-size", "100", "--out-dir", str(tmp_path), "--run-name"]
    few = [part[:400] for part in shared.load_vectors(lr.Config(smoke=True), "cpu", toys=False)[:4]]
    monkeypatch.setattr(shared, "load_vectors", lambda *_, **__: (*few, torch.Size((1, 28, 28))))
    train_here(monkeypatch, lr, *args, "a")
    tick = shared.Run.tick

    def tick_then_signal(run, *rest):
        tick(run, *rest)
        if run.at["steps"] == 6:  # in the second epoch
            run._interrupt()
    with monkeypatch.context() as patch:
        patch.setattr(shared.Run, "tick", tick_then_signal)
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit):
            train_here(patch, lr, *args, "b")
        signal.signal(signal.SIGINT, before)
    assert "--resume" in capsys.readouterr().err
    train_here(monkeypatch, lr, "--resume", str(tmp_path / "equalized_lr/b/checkpoint.pt"))
    a, b = (json.loads((tmp_path / f"equalized_lr/{name}/summary.json").read_text()) for name in "ab")
    train_here(monkeypatch, lr, "--resume", str(tmp_path / "equalized_lr/b/checkpoint.pt"))  # nothing left to do
    same = [key for key in a if "/" in key and not key.endswith(("images_per_s", "ms_per_step"))]
    assert len(same) > 20 and {key: a[key] for key in same} == {key: b[key] for key in same}
