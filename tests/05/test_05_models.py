"""Script 05's decisions: segments, churn, offers and recommendations, against plain Python, and
against a shop whose truth is known."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from scipy import stats
from script05 import Row, db_of, ds

WEEKS = 13


@functools.cache
def shop(seed: int = 0) -> Any:
    """With `uplift`, the truth, and `churn`, the scores of who was there at the pilot."""
    db = ds.connected()
    found = ds.Shop(db, ds.open_shop(db, 2000, np.random.default_rng(seed)), WEEKS, 0.3, 2.0)
    offers = {name: row for name, *row in db.execute("FROM offers").fetchall()}
    treated, uplift = zip(*(offers[name] for name in found.split.then.rfm.ids), strict=True)
    assert found.treated.tolist() == list(treated)
    found.uplift, found.churn = np.array(uplift), found.split.tested.predict(found.split.then)
    return found


def rows_of(found: Any) -> list[Row]:
    rows = found.db.execute("SELECT customer_id, day, cents, item FROM transactions").fetchall()
    return list(rows)


def customers(names: str, cents: list[int], purchases: list[float]) -> Any:
    """Of what the segments look at."""
    nothing, ids = np.zeros(len(names)), np.array(list(names), object)
    found = ds.Rfm(ids, *(5 * [nothing.astype(int)]))._replace(cents=np.array(cents))
    return ds.Customers(found, None, nothing, np.array(purchases), nothing, nothing)


def test_segments_are_cut_by_money_and_by_purchases_to_come() -> None:
    cents, to_come = [800, 700, 600, 100, 90, 80, 70, 60], [2, 0.1, 0.5, 0.49, 9, 0, 0.5, 0.2]
    base, one = customers("abcdefgh", cents, to_come), customers("i", [610], [0.1])
    champions, growing, at_risk, dormant = ds.SEGMENTS
    expected = [champions, at_risk, growing, dormant, growing, dormant, growing, dormant]
    assert ds.segments(base).tolist() == expected
    assert (*ds.segments(one, base), *ds.segments(one)) == (dormant, at_risk)
    now = customers("abcdklmn", [9, 1, 9, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0, 0])
    assert (ds.changed(base, now), ds.changed(one, now)) == (0.75, 0)  # of who is in both


def test_labels_come_from_the_window_alone() -> None:
    today, split = shop().today, shop().split
    amounts: dict[tuple[str, int], list[int]] = defaultdict(list)
    for name, day, cents, _ in rows_of(shop()):
        amounts[name, day].append(cents)
    bought = defaultdict(set)
    for (name, day), cents in amounts.items():
        if sum(cents) > 0 or min(cents) >= 0:
            bought[name].add(day)
    pilot, base = today - WEEKS * 7, split.then
    assert set(base.rfm.ids) == {name for name, days in bought.items() if min(days) <= pilot}
    left = [not any(pilot < day <= today for day in bought[name]) for name in base.rfm.ids]
    assert split.left.tolist() == left


def test_what_comes_after_a_cutoff_changes_nothing_before() -> None:
    rows, today, split = rows_of(shop()), shop().today, shop().split
    kept, later = ([row for row in rows if (row[1] > today - 91) == is_late] for is_late in (0, 1))
    names = np.random.default_rng(1).permutation([name for name, *_ in later])
    other = [(str(name), *row[1:]) for name, row in zip(names, later, strict=True)]
    with db_of(kept + other) as db:
        changed = ds.split_history(db, today, WEEKS, 0.3)
    same = [*zip(split.then.rfm, changed.then.rfm, strict=True), (split.rate, changed.rate)]
    same += [
        (split.then.value, changed.then.value),
        (shop().churn, changed.tested.predict(changed.then)),
    ]
    assert all(np.array_equal(*pair) for pair in same)
    assert not np.array_equal(split.left, changed.left)
    assert not np.array_equal(*(one.current.predict(split.then) for one in (split, changed)))


def test_churn_is_recalibrated_on_the_window_after() -> None:
    split = shop().split
    predicted, left = split.current.predict(split.then), split.left
    assert predicted.mean() == pytest.approx(left.mean(), abs=2e-3)
    assert abs(split.rate - left.mean()) > 0.01  # there is something to recalibrate
    for fifth in np.array_split(np.argsort(predicted), 5):
        error = np.sqrt(max(left[fifth].var(), 0.01) / len(fifth))
        assert abs(predicted[fifth].mean() - left[fifth].mean()) < 4 * error


def test_churn_beats_its_rivals() -> None:
    for seed in range(3):
        split, base = shop(seed).split, shop(seed).split.then
        silent = (base.rfm.T - base.rfm.t_x > WEEKS * 7).astype(float)
        rivals = (np.full(len(silent), split.rate), 1 - base.p_alive, silent)
        best = min(float(((rival - split.left) ** 2).mean()) for rival in rivals)
        assert ds.judged(split.left, shop(seed).churn)[0] < best - 0.005


def test_reasons_are_what_each_signal_adds_to_the_log_odds() -> None:
    model, base = shop().split.tested, shop().split.then
    features = ds.churn_features(base)
    columns, middle = np.arange(features.shape[1]), model.regression[0].mean_

    def log_odds(rows: Any) -> Any:
        return np.diff(model.regression.predict_log_proba(rows)).ravel()

    added = [
        log_odds(features) - log_odds(np.where(columns == n, middle, features)) for n in columns
    ]
    total = log_odds(features) - log_odds(middle[None])
    assert np.sum(added, axis=0) == pytest.approx(total, abs=1e-6)
    assert stats.spearmanr(log_odds(features), model.predict(base)).statistic > 1 - 1e-9
    for row in (0, 7, 500, 900):
        weights = {ds.SIGNALS[n]: added[n][row] for n in columns}
        best = sorted(weights, key=lambda name: -abs(weights[name]))[:3]
        expected = ", ".join(f"{name} {weights[name]:+.1f}" for name in best)
        assert model.reasons(base, row) == expected


def test_scores_are_judged_as_by_hand() -> None:
    rng = np.random.default_rng(3)
    left, score = rng.random(95) < 0.4, rng.random(95)
    ranked = left[np.argsort(-score)]
    precision = np.mean([ranked[: n + 1].mean() for n in range(95) if ranked[n]])
    expected = (((score - left) ** 2).mean(), precision, ranked[:9].mean() / left.mean())
    assert ds.judged(left, score) == pytest.approx(expected)


def test_the_measured_gain_is_unbiased_and_its_error_right() -> None:
    """The same customers, with an offer to another half each time."""
    real, rng, off = shop(), np.random.default_rng(1), defaultdict(list)
    would = ~real.split.left & ~real.treated
    chance = np.where(would, 0, 1.5 * real.uplift)
    gain = chance * real.margin * real.split.then.mean_money - real.cost
    for _ in range(80):
        again = dataclasses.replace(real)
        again.treated = rng.random(len(would)) < 0.5
        won = again.treated & (rng.random(len(would)) < chance)
        again.split = real.split._replace(left=~(would | won))
        for found in ds.policies(again):
            off[found.name].append((found.gain - gain[found.chosen].sum()) / found.error)
    assert len(off) == 3
    for scores in off.values():
        assert abs(np.mean(scores)) < 4 / np.sqrt(len(scores))
        assert 0.7 < np.std(scores) < 1.35


def test_policies_choose_equally_many_of_the_unseen_half() -> None:
    off, better = [], 0.0
    for seed in range(8):
        real = shop(seed)
        (everybody, riskiest, pays), base = ds.policies(real), real.split.then
        unseen, worth, bought = everybody.chosen, real.margin * base.mean_money, ~real.split.left
        assert 0.4 < unseen.mean() < 0.6
        assert riskiest.chosen.sum() == pays.chosen.sum() > 0
        assert not np.any(riskiest.chosen & ~unseen)
        assert real.churn[riskiest.chosen].min() >= real.churn[unseen & ~riskiest.chosen].max()
        uplift = ds.uplift_model(base, real.treated, bought, ~unseen)(base)
        assert np.array_equal(pays.chosen, unseen & (uplift * worth > real.cost))
        better += (real.uplift * worth) @ (pays.chosen * 1 - riskiest.chosen)
        got, rest = bought[real.treated], bought[~real.treated]
        error = np.sqrt(got.var() / len(got) + rest.var() / len(rest))
        off.append((got.mean() - rest.mean() - real.uplift.mean()) / error)
    assert better > 0
    assert sum(abs(one) < 1.96 for one in off) >= 6  # the average uplift lies in its interval
    assert abs(np.mean(off)) < 4 / np.sqrt(len(off))
    dear = dataclasses.replace(shop(), cost=1e6)
    assert [(one.chosen.sum(), one.gain) for one in ds.policies(dear)[1:]] == [(0, 0)] * 2


def test_likeness_is_that_of_a_dense_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds, "NEIGHBOURS", 6)
    dense = (np.random.default_rng(2).random((60, 25)) < 0.2).astype(float)
    found = ds.alike(ds.sparse.csr_matrix(dense)).toarray()
    sizes = dense.sum(axis=0)
    cosine = (dense.T @ dense) / (np.sqrt(np.outer(sizes, sizes)) + ds.SHRINKAGE)
    np.fill_diagonal(cosine, 0)
    assert np.sort(found)[:, -6:] == pytest.approx(np.sort(cosine)[:, -6:], rel=1e-6)
    assert found[found > 0] == pytest.approx(cosine[found > 0], rel=1e-6)
    assert (np.count_nonzero(found, axis=1) <= 6).all()


def test_recommendations_are_new_and_because_of_something_bought() -> None:
    rows, today = rows_of(shop()), shop().today
    bought: dict[str, set[str]] = defaultdict(set)
    for name, day, cents, item in rows:
        if cents > 0 and day <= today - 91:
            bought[name].add(item)
    with db_of(rows) as db:
        found = ds.recommender(db, today - 91)
    alike, scores = found.alike.toarray(), found.scores(np.arange(len(found.customers)))
    for row in range(0, len(scores), 20):
        had = np.isin(found.items, list(bought[str(found.customers[row])]))
        assert scores[row, ~had] == pytest.approx(alike[had][:, ~had].sum(axis=0), rel=1e-4)
        assert (scores[row, had] == -np.inf).all()
        if scores[row].max() > 0:
            best, speaks = scores[row].argmax(), np.where(had, alike[:, scores[row].argmax()], -1)
            assert found.because(row, best) == found.items[speaks.argmax()]


def test_baskets_hold_what_was_spent_in_a_window() -> None:
    rows = [("a", 5, 10, "x"), ("a", 6, 20, "x"), ("a", 7, 40, "x"), ("a", 8, 80, "x")]
    rows += [("b", 6, 5, "y"), ("b", 6, -9, "y"), ("b", 6, 3, ""), ("b", 6, 3, None)]
    with db_of(rows) as db:
        names, items, cents = ds.baskets(db, 5, 7)
    assert (list(names), list(items)) == (["a", "b"], ["x", "y"])
    assert cents.toarray().tolist() == [[60, 0], [0, 5]]


def test_hits_are_counted_as_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds, "TOP", 4)
    rng = np.random.default_rng(4)
    scores, later = (
        rng.random((30, 12)),
        rng.integers(1, 99, (30, 12)) * (rng.random((30, 12)) < 0.3),
    )
    later[:, 0] += 1  # everybody buys
    recall, ndcg, gains = [], [], 1 / np.log2([2, 3, 4, 5])
    for score, spent in zip(scores, later, strict=True):
        found, wanted = spent[np.argsort(-score)[:4]] > 0, min(4, np.count_nonzero(spent))
        recall.append(sum(found) / wanted)
        ndcg.append(gains[found].sum() / gains[:wanted].sum())
    cents = sum(
        spent[np.argsort(-score)[:4]].sum() for score, spent in zip(scores, later, strict=True)
    )
    found = ds.hits(scores, ds.sparse.csr_matrix(later))
    assert found == pytest.approx((np.mean(recall), np.mean(ndcg), cents))
