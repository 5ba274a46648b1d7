"""What features are worth: % right on test images of a nearest neighbour, a linear SVM and an MLP.

ALAE's paper (arXiv 2004.04467 §6.1) has the first two; C = 0.02 is its code's. train (N, d) and
test (M, d) are features, y_train (N,) and y_test (M,) classes 0, 1, …
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot, pad


def percent_right(predicted, y):
    return 100 * (predicted == y).sum().item() / len(y)


def knn_accuracy(train, y_train, test, y_test):
    """% right of each test row's nearest neighbour (L2) among the training rows."""
    centre = train.mean(0)  # near the origin ‖a‖² − 2ab loses no digits
    train, test = train - centre, test - centre
    norms = train.square().sum(1)
    nearest = [torch.addmm(norms, b, train.T, alpha=-2).argmin(1) for b in test.split(500)]
    return percent_right(y_train[torch.cat(nearest)], y_test)


def svm_accuracy(train, y_train, test, y_test, C=0.02):
    """% right of liblinear's LinearSVC, one-vs-rest, by L-BFGS to the optimum of

        min_w  ½‖w‖² + C Σ max(0, 1 − y w·x)²,   x with a constant feature for the bias.

    Solved for v = Lᵀw, LLᵀ = I + 2C XᵀX, the Hessian at w = 0.
    """
    X, X_test = pad(train, (0, 1), value=1.0), pad(test, (0, 1), value=1.0)  # (N, d + 1)
    Y = 2 * one_hot(y_train).to(X) - 1  # (N, classes)
    H = torch.eye(X.shape[1], device=X.device) + 2 * C * (X.T @ X)
    L, failed = torch.linalg.cholesky_ex(H)
    if failed:  # rounding, where features are large and dependent; any L has the same optimum
        L = torch.linalg.cholesky(H + 1e-5 * H.trace() * torch.eye(len(H), device=H.device))
    v = torch.zeros(X.shape[1], Y.shape[1], device=X.device)

    def loss():
        w = torch.linalg.solve_triangular(L.T, v, upper=True)
        slack = (1 - Y * (X @ w)).clamp_(min=0)
        gradient = w - 2 * C * (X.T @ (Y * slack))
        v.grad = torch.linalg.solve_triangular(L, gradient, upper=False).contiguous()
        return 0.5 * w.square().sum() + C * slack.square().sum()

    stop = {"max_iter": 200, "tolerance_grad": 1e-4, "tolerance_change": 0}
    torch.optim.LBFGS([v], **stop, line_search_fn="strong_wolfe").step(loss)
    w = torch.linalg.solve_triangular(L.T, v, upper=True)
    return percent_right((X_test @ w).argmax(1), y_test)


def mlp_accuracy(train, y_train, test, y_test):
    """% right of a net with one hidden layer on standardised features; always seed 0."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    generator = torch.Generator(train.device).manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the CPU's alone, where the net begins
        classes = int(y_train.max()) + 1
        net = nn.Sequential(nn.Linear(train.shape[1], 128), nn.ReLU(), nn.Linear(128, classes))
    optimizer = torch.optim.Adam(net.to(train).parameters(), fused=True)
    for _ in range(20):
        order = torch.randperm(len(train), device=train.device, generator=generator)
        for i in order[: len(train) - len(train) % 250].view(-1, 250):
            optimizer.zero_grad()
            cross_entropy(net(train[i]), y_train[i]).backward()
            optimizer.step()
    with torch.no_grad():
        return percent_right(net(test).argmax(1), y_test)


def code_metrics(data, train, test, kind, full=True):
    """Classifiers on 'short' or 'long' features of all images; not full: 1-NN, which is cheap."""
    if data.y_train is None:
        return {}
    features = train, data.y_train, test, data.y_test
    metrics = {f"eval/knn_acc_{kind}": knn_accuracy(*features)}
    if full:
        metrics[f"eval/svm_acc_{kind}"] = svm_accuracy(*features)
    if full and kind == "short":
        metrics["eval/mlp_acc_short"] = mlp_accuracy(*features)
    return metrics
