"""Ridge from moments: the textbook solution, errors on left-out data, and a shrinkage that suits the data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gatedprune.training.moments import Moments
from gatedprune.training.ridge import SHRINKAGES, fit, squared_errors


def data(samples: int, noise: float, features: int = 6, targets: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.rand(samples, features, generator=g, dtype=torch.float64) * torch.logspace(-3, 3, features).double()
    phi = torch.randn(targets, features, generator=g, dtype=torch.float64) / torch.logspace(-3, 3, features).double()
    y = x @ phi.T + 4 + noise * torch.randn(samples, targets, generator=g, dtype=torch.float64)
    return x, y


def moments(x: Tensor, y: Tensor, folds: int = 5) -> Moments:
    m = Moments(x.shape[1], y.shape[1], folds)
    m.add(x, y)
    return m


def direct(x: Tensor, y: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """From the data themselves: features standardised, λ times the number of samples on the diagonal."""
    mean, spread = x.mean(0), x.std(0, unbiased=False)
    z = (x - mean) / spread
    beta = torch.linalg.solve(z.T @ z + shrinkage * len(x) * torch.eye(x.shape[1]).double(), z.T @ (y - y.mean(0)))
    phi = (beta / spread[:, None]).T
    return phi, y.mean(0) - phi @ mean


def test_it_is_the_textbook_solution() -> None:
    x, y = data(40, noise=0.3)
    found = fit(moments(x, y))
    phi, rho = direct(x, y, found.shrinkage)
    torch.testing.assert_close(found.weight, phi, rtol=1e-8, atol=0)
    torch.testing.assert_close(found.bias, rho, rtol=1e-8, atol=1e-10)


def test_squared_errors_are_those_of_the_data() -> None:
    x, y = data(30, noise=0.5)
    phi, rho = direct(x, y, 0.1)
    wanted = (y - x @ phi.T - rho).square().sum(0)
    torch.testing.assert_close(squared_errors(moments(x, y, 1), phi, rho), wanted, rtol=1e-8, atol=0)


def test_cross_validation_is_that_of_the_data() -> None:
    x, y = data(31, noise=1.0)
    found = fit(moments(x, y))
    rows, errors = torch.arange(31) % 5, []
    for shrinkage in SHRINKAGES[:-1]:
        total = 0.0
        for f in range(5):
            phi, rho = direct(x[rows != f], y[rows != f], shrinkage)
            total += float((y[rows == f] - x[rows == f] @ phi.T - rho).square().sum())
        errors.append(total)
    constant = sum(float((y[rows == f] - y[rows != f].mean(0)).square().sum()) for f in range(5))
    assert found.shrinkage == SHRINKAGES[errors.index(min(errors))]
    assert found.r2 is not None
    assert math.isclose(found.r2, 1 - min(errors) / constant, rel_tol=1e-8)
    assert sorted(found.without) == [0, 1, 2, 3, 4]
    for f, other in found.without.items():
        phi, rho = direct(x[rows != f], y[rows != f], found.shrinkage)
        torch.testing.assert_close(other.weight, phi, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(other.bias, rho, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(other.mean, y[rows != f].mean(0), rtol=1e-9, atol=0)


def test_shrinkage_grows_with_the_noise() -> None:
    clean, noisy = (fit(moments(*data(60, noise))) for noise in (0.01, 3.0))
    assert clean.shrinkage < noisy.shrinkage
    assert clean.r2 is not None and noisy.r2 is not None
    assert clean.r2 > 0.99 > noisy.r2 >= 0


def test_what_cannot_be_predicted_gets_the_constant_term() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, 30, generator=g).double(), torch.rand(40, 50, generator=g).double()
    found = fit(moments(x, y))
    assert math.isinf(found.shrinkage)
    assert found.r2 == 0
    assert not found.weight.any()
    torch.testing.assert_close(found.bias, y.mean(0), rtol=1e-12, atol=0)


def test_features_that_do_not_vary_get_no_weight() -> None:
    x, y = data(40, noise=0.1)
    x[:, 2], x[:, 4] = 7.0, 0.0
    found = fit(moments(x, y))
    assert bool(found.weight.isfinite().all())
    assert not found.weight[:, [2, 4]].any()


def test_one_sample_gives_its_own_values() -> None:
    x, y = data(1, noise=0.0)
    found = fit(moments(x, y))
    assert found.r2 is None
    assert torch.equal(found.bias, y[0])
    assert not found.weight.any()
