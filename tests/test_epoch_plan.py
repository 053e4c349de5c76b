"""Plans of an epoch divide all rows into steps."""

import random
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from panollava.data import epoch_plan
from panollava.data.epoch_plan import (
    SHUFFLED_SHARDS,
    Plan,
    divide,
    group_rows,
    plan_epoch,
)

RowsOf = dict[int, list[int]]  # the rows of each panorama


def plan_of(rows: RowsOf, batch_size: int, seed: int, epoch: int | None, *shards: int) -> Plan:
    """`shards`: the number of each shard's first panorama (default: one shard has all)."""
    panoramas = np.repeat([*rows], [len(each) for each in rows.values()])
    groups = group_rows(panoramas, np.concatenate([*rows.values()]))
    starts = np.array([*(shards or [0]), max(rows) + 1])
    return plan_epoch(groups, batch_size, seed, epoch, starts)


def random_rows(seed: int) -> RowsOf:
    """1 to 9 rows for each of 200 panoramas."""
    generator, rows, at = random.Random(seed), {}, 0
    for panorama in range(200):
        count = generator.randint(1, 9)
        rows[panorama] = list(range(at, at + count))
        at += count
    return rows


def test_every_row_is_in_exactly_one_step_of_an_epoch() -> None:
    rows = random_rows(0)
    for epoch in (None, 0, 1):
        steps = plan_of(rows, 8, 0, epoch)
        pairs = [(panorama, row) for step in steps for panorama, part in step for row in part]
        assert sorted(pairs) == [(panorama, row) for panorama in rows for row in rows[panorama]]
        assert all(sum(len(part) for _, part in step) <= 8 for step in steps)


def test_a_panorama_s_rows_stay_in_one_step_if_they_fit() -> None:
    rows = {panorama: numbers[:8] for panorama, numbers in random_rows(1).items()}
    steps = plan_of(rows, 8, 0, 0)
    assert sorted(panorama for step in steps for panorama, _ in step) == list(rows)


@pytest.mark.parametrize("batch_size", [1, 16, 40])
def test_a_step_takes_the_first_panoramas_that_fit_among_the_next_64(batch_size: int) -> None:
    generator = random.Random(0)
    counts = [generator.choice([10, *[30] * 60, 45]) for _ in range(1000)]  # few fill a step of 40
    ends = np.cumsum(counts).tolist()
    rows = {
        n: list(range(end - count, end))
        for n, (count, end) in enumerate(zip(counts, ends, strict=True))
    }
    order = list(rows)
    order = [order[i] for i in np.random.default_rng((0, 1)).permutation(len(order))]
    waiting = [
        (panorama, rows[panorama][at : at + batch_size])
        for panorama in order
        for at in range(0, len(rows[panorama]), batch_size)
    ]
    for step in plan_of(rows, batch_size, 0, 1):
        expected: list[tuple[int, list[int]]] = []
        while fits := [
            (panorama, indices)
            for panorama, indices in waiting[:64]
            if sum(len(i) for _, i in expected) + len(indices) <= batch_size
            and all(panorama != other for other, _ in expected)
        ]:
            expected.append(fits[0])
            waiting.remove(fits[0])
        assert step == expected
    assert not waiting


def test_steps_are_nearly_full() -> None:
    rows = random_rows(2)
    steps = plan_of(rows, 16, 0, 0)
    assert len(steps) <= 1.05 * sum(map(len, rows.values())) / 16


@pytest.mark.parametrize(("batch_size", "panoramas"), [(16, 5), (8, 2), (3, 1)])
def test_with_3_rows_per_panorama_steps_hold_whole_panoramas(
    batch_size: int, panoramas: int
) -> None:
    """`batch_size` is an upper bound: 16 gives 15 rows, 8 gives 6."""
    rows = {panorama: list(range(3 * panorama, 3 * panorama + 3)) for panorama in range(40)}
    steps = plan_of(rows, batch_size, 0, 0)
    assert all(len(step) == panoramas for step in steps)
    size = steps.size
    assert size == (40 // panoramas, 120, 40)
    assert (size.rows_per_step, size.panoramas_per_step) == (3 * panoramas, panoramas)


def test_an_epoch_s_plan_is_a_function_of_seed_and_epoch() -> None:
    rows = random_rows(3)
    plans = [[*plan_of(rows, 8, *which)] for which in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2] and plans[0] != plans[3]


def panoramas_of(plan: Plan) -> list[int]:
    """In the order of the steps."""
    return [panorama for step in plan for panorama, _ in step]


def test_up_to_64_shards_are_shuffled_as_one() -> None:
    """Also if some panoramas have no rows, and shards no panoramas."""
    rows = {panorama: [panorama] for panorama in range(0, 3000, 3)}
    for count in (1, 2, 63, 64):
        shards = [*range(0, 3000, -(-3000 // count))]
        assert 64 >= len(shards) > count - 3
        order = np.random.default_rng((5, 2)).permutation(1000)
        assert panoramas_of(plan_of(rows, 1, 5, 2, *shards)) == [*(3 * order)]


def test_more_shards_are_shuffled_64_at_a_time() -> None:
    """All panoramas of some 64 shards come before those of the next ones, in a random order."""
    panoramas = np.sort(np.random.default_rng(0).permutation(10_000)[:6000])
    rows = {int(panorama): [number] for number, panorama in enumerate(panoramas)}
    shards = [*range(0, 10_000, 50)]
    orders = []
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        orders.append(panoramas_of(plan_of(rows, 1, seed, epoch, *shards)))
        assert sorted(orders[-1]) == sorted(rows)
        shard_of = np.array(orders[-1]) // 50
        windows, at = [], 0
        while at < len(shard_of):
            window: set[int] = set()
            while at < len(shard_of) and len(window | {shard_of[at]}) <= SHUFFLED_SHARDS:
                window.add(int(shard_of[at]))
                at += 1
            windows.append(window)
        assert [*map(len, windows)] == [64, 64, 64, 8]
        assert set.union(*windows) == set(range(200))
        first = shard_of[: 64 * 25].tolist()
        assert sum(one != other for one, other in pairwise(first)) > 1500  # shuffled within
        assert max(windows[0]) - min(windows[0]) > 100  # of shards in random order
    assert orders[0] == orders[1] and orders[0] not in orders[2:]


def test_validation_keeps_the_order_of_panoramas() -> None:
    rows = {panorama: [panorama] for panorama in range(1000)}
    assert panoramas_of(plan_of(rows, 7, 0, None, *range(0, 1000, 10))) == [*rows]


def test_a_plan_is_made_once_and_its_steps_are_built_when_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int | None] = []

    def count(groups: Any, batch_size: int, seed: int, epoch: int | None, shards: Any) -> Plan:
        made.append(epoch)
        return plan_epoch(groups, batch_size, seed, epoch, shards)

    monkeypatch.setattr(epoch_plan, "plan_epoch", count)
    plans = epoch_plan.Plans(group_rows(np.repeat(np.arange(9), 3)), 6, 0, np.array([0, 9]))
    for epoch in (1, 0, 0, 0, None, None, 1):
        plan = plans(epoch)
        assert plan.size == (5, 27, 9) and len(plan[1:3]) == 2 and plan[-1] == [*plan][4]
    assert made == [1, 0, None, 1]
    with pytest.raises(IndexError):
        plan[5]


def test_planning_takes_a_few_microseconds_per_panorama_and_no_lists() -> None:
    """However many panoramas there are."""
    counts = np.random.default_rng(0).integers(1, 6, 200_000)
    groups = group_rows(np.repeat(np.arange(len(counts)), counts))
    start = time.process_time()
    plan = plan_epoch(groups, 36, 0, 0, np.array([0, len(counts)]))
    assert time.process_time() - start < 5e-6 * len(counts)
    assert plan.pieces.nbytes + plan.ends.nbytes < 30 * len(counts)


def test_a_panorama_with_more_rows_than_a_step_is_divided() -> None:
    steps = plan_of({0: list(range(20))}, 8, 0, 0)
    assert [len(part) for step in steps for _, part in step] == [8, 8, 4]


def test_the_parts_of_a_step_contain_all_its_rows() -> None:
    step = plan_of(random_rows(4), 16, 0, 0)[0]
    for parts in (1, 2, 3, 50):
        shares = divide(step, parts)
        assert len(shares) == parts and all(shares[: len(step)]) and not any(shares[len(step) :])
        assert sorted(sum(shares, [])) == sorted(step)
