"""The stream: a pure function of (seed, position), whatever the threads, replicas and restarts."""
import json
from collections import Counter
from itertools import pairwise

import pytest

from sophiavl_fast.data.dataset import BadRecord
from sophiavl_fast.data.loader import Loader, open_eval
from sophiavl_fast.data.order import Order
from sophiavl_fast.errors import UserError
from tests.data.conftest import record


@pytest.fixture
def opened(store, processor):
    """Open loaders on the store; all are closed at the end."""
    held = []

    def open_loader(train, seed: int | None = None, **data) -> Loader:
        held.append(Loader.open(store.config(train, **data), processor, seed=seed))
        return held[-1]

    yield open_loader
    for loader in held:
        loader.close()


def ids(prompts) -> list[str]:
    return [p.id for p in prompts]


def take(loader: Loader, steps: int, count: int = 4) -> list[str]:
    return [i for _ in range(steps) for i in ids(loader.next(count))]


@pytest.fixture
def ten(store):
    return store.add("ten", [record(i, path=store.image(f"{i}.png") if i % 2 else "") for i in range(10)])


def test_each_epoch_is_a_new_order_of_all(opened, ten):
    stream = take(opened(ten), 5, 6)  # 30 prompts: steps span the epochs' boundaries
    epochs = [stream[i:i + 10] for i in (0, 10, 20)]
    assert all(sorted(e) == sorted(f"ten:{i}" for i in range(10)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3


def test_shuffle_off_and_other_seeds(opened, ten):
    assert take(opened(ten, shuffle=False), 3) == [f"ten:{i % 10}" for i in range(12)]
    assert take(opened(ten), 3) == take(opened(ten), 3) != take(opened(ten, seed=8), 3)


def test_a_step_may_be_longer_than_the_data(opened, ten):
    assert Counter(ids(opened(ten).next(40))) == Counter({f"ten:{i}": 4 for i in range(10)})


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 7])
def test_resume_goes_on_exactly(opened, ten, steps):
    """Mid-epoch, at the boundary (step 5 of 4 ends epoch 2) and beyond."""
    whole = take(opened(ten), 12)
    first = opened(ten)
    assert take(first, steps) == whole[:4 * steps]
    state = json.loads(json.dumps(first.state()))
    second = opened(ten)
    second.load_state(state)
    assert take(second, 12 - steps) == whole[4 * steps:]
    first.load_state(state)  # and back in time, in the same process
    assert take(first, 12 - steps) == whole[4 * steps:]


@pytest.mark.parametrize("replicas", [2, 4])
def test_replicas_share_the_one_stream(opened, ten, replicas):
    whole = take(opened(ten), 6)
    loaders = [opened(ten) for _ in range(replicas)]
    assert [i for _ in range(6) for r, one in enumerate(loaders) for i in ids(one.next(4, replica=r, replicas=replicas))] == whole
    assert len({json.dumps(one.state()) for one in loaders}) == 1


def test_resume_with_another_number_of_replicas(opened, ten):
    whole = take(opened(ten), 6)
    pair = [opened(ten) for _ in range(2)]
    for _ in range(3):
        for r, one in enumerate(pair):
            one.next(4, replica=r, replicas=2)
    alone = opened(ten)
    alone.load_state(pair[1].state())
    assert take(alone, 3) == whole[12:]


def test_a_count_that_does_not_divide(opened, ten):
    with pytest.raises(UserError, match="5 prompts do not divide over 2 replicas"):
        opened(ten).next(5, replicas=2)


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_threads_change_nothing(opened, ten, workers):
    import torch

    one, many = opened(ten, workers=1), opened(ten, workers=workers)
    for _ in range(6):
        for a, b in zip(one.next(8), many.next(8), strict=True):
            assert (a.id, a.token_ids, a.expanded_ids) == (b.id, b.token_ids, b.expanded_ids)
            assert (a.pixel_values is None) == (b.pixel_values is None)
            assert a.pixel_values is None or torch.equal(a.pixel_values, b.pixel_values)


def test_counts_may_change_between_steps(opened, ten):
    whole, loader = take(opened(ten), 8), opened(ten)
    assert [i for count in (8, 2, 6, 4, 12) for i in ids(loader.next(count))] == whole


def test_nothing_prepared_is_kept_behind_the_cursor(opened, ten):
    loader = opened(ten)
    for _ in range(50):
        loader.next(8, replica=1, replicas=2)
        loader.next(4)
        assert len(loader._ahead) <= 8


def test_a_list_joins_sets_by_size(opened, store):
    store.add("a", [record(i) for i in range(6)])
    store.add("b", [record(i) for i in range(3)])
    stream = take(opened("a, b"), 6, 3)
    assert sorted(stream[:9]) == sorted(stream[9:]) == [f"a:{i}" for i in range(6)] + [f"b:{i}" for i in range(3)]


def test_weights_mix_sets(opened, store):
    store.add("a", [record(i) for i in range(50)])
    store.add("b", [record(i) for i in range(5)])
    whole = take(opened({"a": 3, "b": 1}), 50, 8)
    counts = Counter(i[0] for i in whole)
    assert abs(counts["b"] / 400 - 0.25) < 0.07
    of_b = [i for i in whole if i[0] == "b"]
    assert all(sorted(of_b[i:i + 5]) == [f"b:{j}" for j in range(5)] for i in range(0, len(of_b) - 4, 5))
    loader, again = opened({"a": 3, "b": 1}), opened({"a": 3, "b": 1})
    take(loader, 17, 8)
    again.load_state(loader.state())
    assert take(again, 33, 8) == whole[17 * 8:]


def test_order_far_out_equals_the_walk():
    """Positions beyond a block of draws, reached directly and step by step."""
    walked, direct = (Order([7, 3], [1, 2], seed=5, shuffle=True) for _ in range(2))
    rows = [walked.at(p) for p in range(9000)]
    for position in (8999, 4096, 4095, 0, 8191, 8192):
        assert direct.at(position) == rows[position]
    for index, size in enumerate((7, 3)):
        of_set = [row for chosen, row in rows if chosen == index]
        assert all(sorted(of_set[i:i + size]) == list(range(size)) for i in range(0, len(of_set) - size, size))


def test_spares_differ_by_position_and_attempt():
    """One stand-in for all positions would train on that record alone."""
    order = Order([1000], None, seed=5, shuffle=True)
    assert len({order.spare(p, 0, 0) for p in range(100)}) > 80 < len({order.spare(0, 0, a) for a in range(100)})


@pytest.mark.parametrize("change,message", [
    ({"seed": 8}, "seed = 7, this run has 8"),
    ({"shuffle": False}, "shuffle = True"),
    ({"train": "ten,more"}, "datasets"),
])
def test_resume_refuses_another_stream(opened, store, ten, change, message):
    store.add("more", [record(1)])
    state = opened(ten).state()
    change = {"train": ten} | change
    with pytest.raises(UserError, match=message):
        opened(**change).load_state(state)


def test_resume_refuses_data_that_grew(opened, store, ten):
    state = opened(ten).state()
    store.add("ten", [record(i) for i in range(11)])
    with pytest.raises(UserError, match=r"the checkpoint's data stream had datasets = \[\['ten', 10"):
        opened(ten).load_state(state)


@pytest.mark.parametrize("train,message", [
    ("ten,ten", "expected different dataset names"), ("ten,", "expected different"), ({"ten": 0.0}, "must be greater than 0"), ("tne", "did you mean 'ten'"),
])
def test_bad_mixes(opened, ten, train, message):
    with pytest.raises(UserError, match=message):
        opened(train)


@pytest.fixture
def flawed(store):
    """Twelve records, every third without solution."""
    return store.add("flawed", [record(i, **({"solution": ""} if i % 3 == 0 else {})) for i in range(12)])


def test_refuse_stops_before_training(opened, flawed):
    with pytest.raises(BadRecord, match=r"flawed.jsonl:1: record without solution .* \(and 3 more: `data check flawed` lists them\)"):
        opened(flawed)


def test_refuse_in_the_stream(opened, flawed, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # only the first rank checks beforehand
    loader = opened(flawed)
    with pytest.raises(BadRecord, match="record without solution"):
        take(loader, 3)


def test_skip_replaces_in_place_and_counts(opened, flawed):
    whole, counted = take(loader := opened(flawed, on_error="skip"), 6), loader.skipped
    good = {f"flawed:{i}" for i in range(12) if i % 3}
    assert set(whole) == good and counted >= 8 and loader.state()["cursor"] == 24
    clean = [i for i in range(24) if Order([12], None, seed=7, shuffle=True).at(i)[1] % 3]
    assert len(clean) == 16 and all(whole[p] == f"flawed:{Order([12], None, seed=7, shuffle=True).at(p)[1]}" for p in clean)
    pair = [opened(flawed, on_error="skip") for _ in range(2)]
    assert [i for _ in range(6) for r, one in enumerate(pair) for i in ids(one.next(4, replica=r, replicas=2))] == whole
    assert sum(one.skipped for one in pair) == counted
    resumed = opened(flawed, on_error="skip")
    take(loader := opened(flawed, on_error="skip"), 3)
    resumed.load_state(loader.state())
    assert take(resumed, 3) == whole[12:] and resumed.skipped == counted


def test_nothing_usable_is_an_error(opened, store):
    store.add("dead", [record(i, solution="") for i in range(3)])
    with pytest.raises(BadRecord, match="the last of 100 unusable records in a row"):
        opened("dead", on_error="skip").next(1)


def test_open_eval(store, processor, ten, flawed):
    def names(name, limit=None, **data):
        config = store.config("ten", eval=name, **data)
        config.eval.limit = limit
        return ids(open_eval(config, processor))

    assert names("ten") == [f"ten:{i}" for i in range(10)] == names("ten", limit=99)
    assert names("ten", limit=5) == [f"ten:{i}" for i in (0, 2, 4, 6, 8)]
    assert names("flawed", on_error="skip") == [f"flawed:{i}" for i in range(12) if i % 3]
    with pytest.raises(BadRecord, match=r"flawed.jsonl:1: "):
        names("flawed")
    store.add("dead", [record(i, solution="") for i in range(3)])
    with pytest.raises(BadRecord, match=r"dead.jsonl:1: .* \(data.eval = dead: none of the 3 records asked for can be used\)"):
        names("dead", on_error="skip")


# -- curricula, and prompts beside a step's own


def brute_draws(weights, sizes, seed, per_step, count):
    """Sets by position from the definition: the first set whose cumulated share of that step exceeds the position's number."""
    import numpy as np

    from sophiavl_fast.types import derive_seed

    def value(w, step):
        if not isinstance(w, list):
            return float(w)
        if step <= w[0][0]:
            return w[0][1]
        for (s0, v0), (s1, v1) in pairwise(w):
            if step <= s1:
                return v0 + (v1 - v0) * (step - s0) / (s1 - s0)
        return w[-1][1]

    found = []
    for position in range(count):
        if position % 4096 == 0:
            numbers = np.random.default_rng(derive_seed(seed, "mix", position // 4096)).random(4096)
        shares = [value(w, position // per_step) for w in weights]
        point = numbers[position % 4096] * sum(shares)
        found.append(next(i for i in range(len(shares)) if point < sum(shares[:i + 1])))
    return found


def test_a_curriculum_follows_its_definition():
    weights = [[[0, 1.0], [200, 0.0]], [[100, 0.0], [300, 2.0], [600, 2.0]], 0.5]
    order = Order([50, 20, 7], weights, seed=4, shuffle=True, per_step=10)
    found = [order.at(p) for p in range(9000)]
    assert [index for index, _ in found] == brute_draws(weights, [50, 20, 7], 4, 10, 9000)
    assert not any(index == 1 for index, _ in found[:1010]) and not any(index == 0 for index, _ in found[2000:])
    for index, size in enumerate((50, 20, 7)):  # each set still goes through all its records before any comes again
        rows = [row for chosen, row in found if chosen == index]
        assert all(sorted(rows[i:i + size]) == list(range(size)) for i in range(0, len(rows) - size, size))


def test_a_curriculum_resumes_and_constant_points_are_a_constant_share(opened, store):
    store.add("a", [record(i) for i in range(12)])
    store.add("b", [record(i) for i in range(12)])
    mix = {"a": {0: 1, 10: 0}, "b": 1}
    whole = take(opened(mix), 30, 8)
    assert Counter(i[0] for i in whole[:80])["a"] > 10 and not any(i[0] == "a" for i in whole[80:])
    first = opened(mix)
    take(first, 5, 8)
    again = opened(mix)
    again.load_state(json.loads(json.dumps(first.state())))
    assert take(again, 25, 8) == whole[40:]
    with pytest.raises(UserError, match="weights"):
        opened({"a": {0: 1, 11: 0}, "b": 1}).load_state(first.state())


@pytest.mark.parametrize("mix,message", [
    ({"a": {}}, "curriculum of 'a' is empty"), ({"a": {0: -1.0}}, "weight -1 at step 0"), ({"a": {-3: 1.0}}, "at step -3"),
    ({"a": {0: 1, 5: 0}, "b": {0: 1, 5: 0, 9: 1}}, "at step 5 every dataset has weight 0"), ({"a": {0: float("nan")}}, "weight nan"),
])
def test_a_curriculum_that_cannot_be_drawn_from(mix, message):
    from sophiavl_fast.data.loader import parse_mix

    with pytest.raises(UserError, match=message):
        parse_mix(mix)


def test_fresh_prompts_are_the_streams_next_on_all_replicas(opened, ten):
    """Unequal counts, none included: together they are the stream without a hole, and every cursor agrees."""
    whole = take(opened(ten), 10)
    pair = [opened(ten) for _ in range(2)]
    found = []
    for counts in ([2, 1], [0, 3], [0, 0]):
        found += [i for r, one in enumerate(pair) for i in ids(one.next(4, replica=r, replicas=2))]
        found += [i for r, one in enumerate(pair) for i in ids(one.fresh(counts, replica=r))]
    assert found == whole[:18]
    assert pair[0].state() == pair[1].state()
    alone = opened(ten)
    alone.load_state(pair[0].state())
    assert take(alone, 2) == whole[18:26]
