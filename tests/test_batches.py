import random

from panollava.data.batches import divide, plan_epoch


def counts(seed: int, panoramas: int = 200) -> dict[int, list[int]]:
    generator, rows, at = random.Random(seed), {}, 0
    for panorama in range(panoramas):
        own = generator.randint(1, 9)
        rows[panorama] = list(range(at, at + own))
        at += own
    return rows


def test_every_row_is_in_exactly_one_step_of_an_epoch() -> None:
    rows = counts(0)
    for epoch in (None, 0, 1):
        steps = plan_epoch(rows, 8, seed=0, epoch=epoch)
        seen = [(p, r) for step in steps for p, own in step for r in own]
        assert sorted(seen) == [(p, r) for p, own in rows.items() for r in own]
        assert all(sum(len(own) for _, own in step) <= 8 for step in steps)


def test_a_panorama_s_rows_stay_together_where_they_fit() -> None:
    rows = {p: own[:8] for p, own in counts(1).items()}
    steps = plan_epoch(rows, 8, seed=0, epoch=0)
    assert sorted(p for step in steps for p, _ in step) == list(rows)


def test_steps_are_nearly_full() -> None:
    rows = counts(2)
    steps = plan_epoch(rows, 16, seed=0, epoch=0)
    assert len(steps) <= 1.05 * sum(map(len, rows.values())) / 16


def test_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    rows = counts(3)
    assert plan_epoch(rows, 8, 0, 1) == plan_epoch(rows, 8, 0, 1)
    assert plan_epoch(rows, 8, 0, 1) != plan_epoch(rows, 8, 0, 2)
    assert plan_epoch(rows, 8, 0, 1) != plan_epoch(rows, 8, 1, 1)


def test_a_panorama_with_more_rows_than_a_step_is_cut() -> None:
    steps = plan_epoch({0: list(range(20))}, 8, seed=0, epoch=0)
    assert [len(own) for step in steps for _, own in step] == [8, 8, 4]


def test_parts_of_a_step_hold_all_of_it() -> None:
    step = plan_epoch(counts(4), 16, seed=0, epoch=0)[0]
    for parts in (1, 2, 3, 50):
        shares = divide(step, parts)
        assert all(shares) and len(shares) <= parts
        assert sorted(sum(shares, [])) == sorted(step)
