"""Script 05's BG/NBD and Gamma-Gamma: against published values, lifetimes, numerical integrals,
the process itself, purchase by purchase, and worlds of known parameters."""

from __future__ import annotations

import functools
import importlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats
from script05 import cdnow, db_of, ds

HALF = 39  # weeks
WORLD, SPEND = (0.25, 4.4, 0.8, 2.5), (6.0, 4.0, 15.0)
FEW = settings(deadline=None, database=None, max_examples=6)


def arrays(*numbers: float) -> list[Any]:
    return [np.array([float(number)]) for number in numbers]


@functools.cache
def fitted() -> tuple[Any, int]:
    """CDNOW's customers by week 39, and their purchases in the 39 weeks after."""
    with db_of(rows := cdnow()) as db:
        cutoff = min(day for _, day, _ in rows) - 1 + HALF * 7
        base = ds.valued_at(db, cutoff, HALF, 1.0)
        return base, int(ds.purchase_days(db, base, cutoff, cutoff + HALF * 7).sum())


def test_fits_and_forecasts_of_cdnow_are_the_published_ones() -> None:
    (base, came), one = fitted(), arrays(2, 30.43, 38.86)
    fit, spend, _, warnings = base.models
    assert fit.parameters == pytest.approx([0.2426, 4.4136, 0.7929, 2.4259], rel=5e-4)
    assert fit.log_likelihood == pytest.approx(-9582.429, abs=5e-4)
    assert fit.errors() == pytest.approx([0.05176, 0.08570, 0.23424, 0.29078], rel=5e-4)
    assert spend.parameters == pytest.approx([6.249, 3.745, 15.448], rel=5e-4)
    assert warnings == []
    r, alpha, a, b = model = ds.BgNbd(*fit.parameters)
    assert model.p_alive(*one) == pytest.approx([0.7266], abs=5e-5)
    assert model.expected(*one, HALF) == pytest.approx([1.2259], abs=5e-5)
    assert base.purchases.sum() / came - 1 == pytest.approx(-0.122, abs=1e-3)
    weeks = base.rfm.T / 7 + HALF  # equation 9 of the paper: of a customer of whom nothing is known
    series = special.hyp2f1(r, b, a + b - 1, weeks / (alpha + weeks))
    expected = (a + b - 1) / (a - 1) * (1 - (alpha / (alpha + weeks)) ** r * series)
    assert expected.sum() / (base.rfm.x.sum() + came) - 1 == pytest.approx(-0.041, abs=5e-4)
    for x, t_x, value in ((0, 0, -0.59947), (200, 38, 100.7957)):
        likelihood = ds.bg_nbd_likelihood(*arrays(x, t_x, 40, 1))
        assert likelihood(np.array([0.25, 4, 0.8, 2.5]))[0] == pytest.approx(value, abs=6e-5)


@pytest.mark.parametrize("seed", range(5))
def test_gradients_are_those_of_the_values(seed: int) -> None:
    rng, x = np.random.default_rng(seed), np.array([0.0, 0, 1, 1, 2, 5, 40, 900])
    age, n = rng.uniform(20, 60, len(x)), rng.integers(1, 9, len(x)).astype(float)
    purchases = ds.bg_nbd_likelihood(x, np.where(x > 0, age * rng.random(len(x)), 0), age, n)
    spend = ds.gamma_gamma_likelihood(x[2:], rng.gamma(3, 9, 6))
    for likelihood, parameters in ((purchases, rng.gamma(2, 1, 4)), (spend, rng.gamma(2, 2, 3))):
        numeric = [
            (likelihood(parameters + step)[0] - likelihood(parameters - step)[0]) / (2 * step.sum())
            for step in 1e-6 * np.diag(parameters)
        ]
        assert likelihood(parameters)[1] == pytest.approx(numeric, rel=1e-5, abs=1e-4)


@pytest.mark.filterwarnings("ignore")  # its own
def test_fit_and_forecasts_of_all_of_cdnow_are_those_of_lifetimes() -> None:
    with db_of(rows := cdnow("CDNOW_master.txt")) as db:
        found = ds.rfm(db, min(day for _, day, _ in rows) - 1 + HALF * 7)
    x, t_x, age, n = groups = ds.grouped(found.x, found.t_x, found.T)
    assert n.sum() == 23_570
    peer, fit = importlib.import_module("lifetimes").BetaGeoFitter(), ds.fit_bg_nbd(*groups)
    parameters = peer.fit(*groups).params_[["r", "alpha", "a", "b"]].to_numpy()
    assert fit.parameters == pytest.approx(parameters, rel=2e-3)
    assert fit.log_likelihood >= ds.bg_nbd_likelihood(*groups)(parameters)[0] - 1e-6
    model, alive = ds.BgNbd(*parameters), peer.conditional_probability_alive(x, t_x, age)
    assert model.p_alive(x, t_x, age) == pytest.approx(alive, rel=1e-9)
    for weeks in (1, 13, 52):
        expected = peer.conditional_expected_number_of_purchases_up_to_time(weeks, x, t_x, age)
        assert model.expected(x, t_x, age, weeks) == pytest.approx(expected, rel=1e-6)


def integral(value: Callable[[float], float]) -> Any:
    """Of a function of a quantile."""
    return pytest.approx([integrate.quad(value, 0, 1, epsabs=0, epsrel=1e-9, limit=500)[0]], 1e-5)


@pytest.mark.parametrize("parameters", [WORLD, (1.3, 9.0, 1.0, 3.0), (0.6, 2.0, 1.7, 0.4)])
@pytest.mark.parametrize(("x", "age"), [(0, 40.2), (1, 5.0), (12, 30.0), (5_000, 40.2)])
def test_purchases_of_who_is_alive_are_their_integral(
    parameters: tuple[float, ...], x: int, age: float
) -> None:
    """Over the chance p to leave after a purchase, which follows Beta(a, b + x)."""
    r, alpha, a, b = parameters

    def purchases(quantile: float) -> float:
        p = special.betaincinv(a, b + x, quantile)
        return float(-np.expm1(-(r + x) * np.log1p(p * 13 / (alpha + age))) / p)

    assert ds.BgNbd(*parameters).if_alive(*arrays(x, age), 13.0) == integral(purchases)


def test_expected_spend_is_its_integral() -> None:
    """Over the rate nu, which follows Gamma(q + p x, v + x mean)."""
    p, q, v = SPEND
    for x, mean in ((0, 0.0), (1, 30.0), (40, 12.5)):

        def spend(quantile: float, x: int = x, mean: float = mean) -> float:
            return float(p * (v + x * mean) / special.gammaincinv(q + p * x, quantile))

        assert ds.GammaGamma(p, q, v).expected(*arrays(x, mean)) == integral(spend)


def test_value_is_what_each_day_brings_discounted() -> None:
    base, total = fitted()[0], 0.0
    model = ds.BgNbd(*base.models.purchases.parameters)
    known = base.rfm.x.astype(float), base.rfm.t_x / 7, base.rfm.T / 7
    for n in range(13 * 7):
        bought = model.expected(*known, (n + 1) / 7) - model.expected(*known, n / 7)
        total = total + bought / (1 + ds.DISCOUNT) ** ((n + 0.5) / 364)
    value = ds.valued(base.rfm, base.models, 13, 0.4).value
    assert value == pytest.approx(0.4 * total * base.mean_money, rel=1e-4)


def walked(age: Any, weeks: float, rng: Any) -> tuple[Any, Any, Any]:
    """x and t_x at an age, and purchases in the `weeks` after it: purchase by purchase."""
    r, alpha, a, b = WORLD
    rate, p, now = rng.gamma(r, 1 / alpha, len(age)), rng.beta(a, b, len(age)), np.zeros(len(age))
    x, t_x, later, stays = now, now, now, now == 0
    while stays.any():
        now = now + rng.exponential(1 / rate)
        stays = stays & (now <= age + weeks)
        early = stays & (now <= age)
        x, t_x, later = x + early, np.where(early, now, t_x), later + (stays & ~early)
        stays &= rng.random(len(age)) >= p
    return x, t_x, later


def test_forecasts_and_drawn_futures_are_those_of_the_process() -> None:
    rng, model, weeks = np.random.default_rng(3), ds.BgNbd(*WORLD), 26
    age = rng.uniform(10, 40, 60_000)
    x, t_x, later = walked(age, weeks, rng)
    expected, drawn = model.expected(x, t_x, age, weeks), model.draw_future(x, t_x, age, weeks, rng)
    silent = age - t_x > 8
    for group in (x == 0, (x == 1) & silent, (x == 1) & ~silent, (x > 1) & silent, x > 4):
        error = later[group].std() / np.sqrt(group.sum())
        assert abs(later[group].mean() - expected[group].mean()) < 4 * error
        assert abs(drawn[group].mean() - expected[group].mean()) < 4 * error
        assert drawn[group].std() == pytest.approx(later[group].std(), rel=0.15)


def bg_nbd_of_a_world(rng: Any) -> Any:
    age = rng.uniform(20, 60, 10_000)
    return ds.fit_bg_nbd(*walked(age, 0, rng)[:2], age, np.ones(len(age)))


def gamma_gamma_of_a_world(rng: Any) -> Any:
    x = 1.0 + rng.poisson(2, 10_000)
    p, q, v = SPEND
    return ds.fit_gamma_gamma(x, rng.gamma(p * x) / rng.gamma(q, 1 / v, len(x)) / x)


@pytest.mark.parametrize(
    ("fit", "truth"), [(bg_nbd_of_a_world, WORLD), (gamma_gamma_of_a_world, SPEND)]
)
def test_a_known_world_is_recovered(fit: Any, truth: tuple[float, ...]) -> None:
    """No parameter off by four of its errors, and those errors neither too wide nor too narrow."""
    fits, squares = [fit(np.random.default_rng(seed)) for seed in range(8)], 0.0
    for one in fits:
        off = np.log(one.parameters) - np.log(truth)
        assert np.all(np.abs(off) < 4 * one.errors())
        squares += off @ np.linalg.solve(one.covariance, off)
    assert 1e-4 < stats.chi2.cdf(squares, len(truth) * len(fits)) < 1 - 1e-4


def customers(n: int, rng: Any, spend: Any = SPEND) -> tuple[Any, Any]:
    """`n` customers of the world, and what each spends in the 13 weeks to come."""
    age = np.ceil(rng.uniform(20, 80, n) * 7) / 7
    x, t_x, later = walked(age, 13, rng)
    p, q, v = spend
    rate = rng.gamma(q, 1 / v, n)
    first, again, to_come = (
        np.where(times > 0, rng.gamma(p * np.maximum(times, 1)) / rate, 0)
        for times in (np.ones(n), x, later)
    )
    money = {"first_cents": 100 * first, "cents": 100 * (first + again)}
    columns = {"x": x, "t_x": t_x * 7, "T": age * 7, **money}
    rows = {name: np.rint(column).astype(np.int64) for name, column in columns.items()}
    return ds.Rfm(np.array([f"{row:06}" for row in range(n)], object), **rows), to_come


def test_the_interval_of_the_value_holds_what_came_and_what_the_fit_does_not_know() -> None:
    held = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        found, to_come = customers(1500, rng)
        base = ds.valued(found, models := ds.fit_models(found), 13, 1.0)
        low, high = ds.value_interval(base, 13, rng)
        came = to_come.sum() * base.value.sum() / (base.purchases @ base.mean_money)  # discounted
        held += low <= came <= high
    assert held >= 7  # at 95 %, 6 or less once in 10,000
    known = models.purchases._replace(covariance=np.zeros((4, 4)))
    year = ds.valued(found, models, 52, 1.0)
    sure = year._replace(models=models._replace(purchases=known))
    assert np.ptp(ds.value_interval(sure, 52, rng)) < 0.9 * np.ptp(ds.value_interval(year, 52, rng))


@FEW
@given(seed=st.integers(0, 10**6), factor=st.integers(2, 30))
def test_units_of_time_and_money_change_nothing_else(seed: int, factor: int) -> None:
    found, _ = customers(3000, np.random.default_rng(seed))
    names = ("t_x", "T", "cents", "first_cents")
    other = found._replace(**{name: getattr(found, name) * factor for name in names})
    one, two = ds.fit_models(found), ds.fit_models(other)
    scaled = np.append(two.purchases.parameters, two.spend.parameters)
    scaled /= [1, factor, 1, 1, 1, 1, factor]
    expected = np.append(one.purchases.parameters, one.spend.parameters)
    assert scaled == pytest.approx(expected, rel=2e-3)
    value, same = ds.valued(found, one, 13, 1.0), ds.valued(other, two, 13 * factor, 1.0)
    assert same.p_alive == pytest.approx(value.p_alive, abs=1e-3)
    assert same.purchases == pytest.approx(value.purchases, rel=2e-3)


@FEW
@given(seed=st.integers(0, 10**6))
def test_order_and_grouping_of_customers_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, _ = customers(1500, rng)
    order = rng.permutation(len(found.x))
    one, two = ds.fit_models(found), ds.fit_models(ds.Rfm(*(column[order] for column in found)))
    assert np.array_equal(one.purchases.parameters, two.purchases.parameters)
    assert two.spend.parameters == pytest.approx(one.spend.parameters, rel=1e-4)
    alone = found.x.astype(float), found.t_x / 7, found.T / 7
    groups = ds.grouped(found.x, found.t_x, found.T)
    assert dict(zip(zip(*groups[:3], strict=True), groups[3], strict=True)) == Counter(
        zip(*alone, strict=True)
    )
    each = ds.bg_nbd_likelihood(*alone, np.ones(len(found.x)))(one.purchases.parameters)
    assert ds.bg_nbd_likelihood(*groups)(one.purchases.parameters)[0] == pytest.approx(each[0])


@pytest.mark.parametrize(
    ("n", "spend", "related", "expected"),
    [
        (3000, SPEND, 0, "^$"), (210, SPEND, 0, "^only 9. "),
        (3000, (6.0, 0.7, 15.0), 0, r"q = 0\.\d+ ≤ 1.* valued at"),
        (3000, (20.0, 20.0, 60.0), 0.3, r"\(\+0.*too low$"),
        (3000, (6.0, 50.0, 20.0), -0.35, r"\(-0.*too high$"),
        (3000, None, 0, "the same.* at 9.99"),
    ],
)  # fmt: skip
def test_what_the_data_deny_is_said(n: int, spend: Any, related: float, expected: str) -> None:
    found, _ = customers(n, np.random.default_rng(7), spend or SPEND)
    again = (found.cents - found.first_cents) * (1.0 + found.x) ** related
    found = found._replace(cents=found.first_cents + again.astype(int))
    if spend is None:
        found = found._replace(first_cents=0 * found.x + 999, cents=(found.x + 1) * 999)
    base = ds.valued(found, ds.fit_models(found), 13, 1.0)
    said = "; ".join(base.models.warnings)
    assert re.search(expected, said)
    if "valued at" in said:
        assert base.models.spend is None
        observed = found.cents.sum() / 100 / (found.x + 1).sum()
        assert base.mean_money == pytest.approx(observed)
        assert np.isfinite(ds.value_interval(base, 13, np.random.default_rng(1))).all()


def test_who_never_leaves_is_alive_and_valued_with_an_interval() -> None:
    rng, rows = np.random.default_rng(1), []
    for row in range(500):
        days = rng.exponential(7 / rng.gamma(1, 0.2), 200).cumsum().astype(int)
        rows += [(f"{row}", day, int(rng.gamma(6, 500))) for day in days[days < 364]]
    with db_of(rows) as db:
        base = ds.valued_at(db, 364, 13, 1.0)
    low, high = ds.value_interval(base, 13, rng)
    assert base.p_alive == pytest.approx(1, abs=1e-3)
    assert low < base.value.sum() < high < 1.2 * low
    assert np.isfinite(base.models.purchases.errors()).all()


@pytest.mark.parametrize("rows", [[], [("a", 1, 5)], [(name, 1, 5) for name in "abc"] * 2])
def test_where_nobody_bought_twice_nothing_is_fitted(rows: list[Any]) -> None:
    with db_of(rows) as db, pytest.raises(ValueError, match="second day"):
        ds.valued_at(db, 100, 13, 0.3)


@pytest.mark.parametrize("names", ["aa", "aabb", "aabbc"])
@pytest.mark.filterwarnings("error")
def test_a_handful_of_customers_is_valued_with_a_warning(names: str) -> None:
    with db_of([(name, 7 * n, 500 + n) for n, name in enumerate(names)]) as db:
        base = ds.valued_at(db, 100, 13, 0.3)
    low, high = ds.value_interval(base, 13, np.random.default_rng(1))
    assert 0 <= low <= base.value.sum() <= high < 10
    assert f"only {names.count('aa') + names.count('bb')} bought again" in base.models.warnings[0]
