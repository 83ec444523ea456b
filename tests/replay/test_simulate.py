import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from replay.cli import main
from replay.simulate import run
from replay.simulate.engine import Engine, Rates, Work
from replay.simulate.run import KINDS, Point, at_equal_quality, simulate
from replay.simulate.world import ARMS, LARGE, SMALL, Assumptions, World, series, win_rate

IC, BLIND, PLUS, SMALL_ONLY, SHOWN, LARGE_ONLY = KINDS


def test_the_series_is_the_papers():
    counts = series()
    assert (len(counts), counts.sum(), counts.min(), counts.max()) == (1800, 51879, 5, 77)


def test_a_service_time_is_prefill_and_decode():
    rates = Rates(slots=4, prefill_tokens_per_s=100.0, decode_tokens_per_s=20.0, slowdown=1.0)
    assert rates.seconds(50, 40, running=0) == pytest.approx(0.5 + 2.0)
    assert rates.seconds(50, 40, running=4) == pytest.approx(0.5 + 4.0)  # a full batch: half as fast


def test_an_engine_serves_in_order_with_no_more_at_once_than_it_has_slots():
    """Lindley's recursion for two servers, by hand: every request starts when the earliest slot is free."""
    rng = np.random.default_rng(1)
    engine = Engine(Rates(slots=2, prefill_tokens_per_s=1e9, decode_tokens_per_s=1.0, slowdown=0.0))
    at = np.cumsum(rng.exponential(1.0, 60))
    lengths = rng.uniform(0.5, 3.0, 60)
    done = {}
    for i in range(60):
        done |= {d.work.id: d.at for d in engine.until(at[i])}
        engine.submit(Work(i, at[i], 0.0, lengths[i]))
        assert len(engine.running) <= 2
    done |= {d.work.id: d.at for d in engine.until(math.inf)}
    free = [0.0, 0.0]
    expected = []
    for i in range(60):
        slot = int(np.argmin(free))
        free[slot] = max(free[slot], at[i]) + lengths[i]
        expected.append(free[slot])
    assert [done[i] for i in range(60)] == pytest.approx(expected)


def test_a_seed_is_a_world_and_examples_help_where_they_are_close():
    one, two = (World(Assumptions(), 3) for _ in range(2))
    a, b = one.request(1.0), two.request(1.0)
    assert (a.plain, a.shown, a.large) == (b.plain, b.shown, b.large)
    np.testing.assert_array_equal(a.signals.embedding, b.signals.embedding)
    many = [one.request(0.0) for _ in range(2000)]
    gain = [r.shown - r.plain for r in many]
    close = [r.signals.examples[SMALL].similarity_max for r in many]
    assert min(gain) > 0 and np.corrcoef(gain, close)[0, 1] > 0.2
    assert all(r.plain < r.large for r in many)


def test_equally_good_answers_win_half_of_the_time():
    assert win_rate(0.7, 0.7, Assumptions()) == 0.5
    assert win_rate(0.9, 0.7, Assumptions()) == pytest.approx(1 - win_rate(0.5, 0.7, Assumptions()))


def test_throughput_at_equal_quality_lies_between_the_points():
    assert Point(1.0, 1.0, 0.5).throughput == pytest.approx(5.9) and Point(1.0, 0.0, 0.5).throughput == 1.0
    assert at_equal_quality([Point(0.9, 0.4, 0.5), Point(0.0, 1.0, 0.495)]) == pytest.approx(5.9)
    # from 0.50 with none offloaded down to 0.30 with all: 0.49 is reached at an offloaded share of 0.05
    assert at_equal_quality([Point(0.0, 1.0, 0.3)]) == pytest.approx(Point(0.0, 0.05, 0.49).throughput)
    assert at_equal_quality([Point(0.9, 0.0, 0.5)]) == 1.0


def test_under_the_same_load_the_router_offloads_as_the_load_comes_and_keeps_what_a_threshold_loses():
    assumed = Assumptions(scale=0.05)
    ic, plus, small, large = (simulate(kind, assumed, 1) for kind in (IC, PLUS, SMALL_ONLY, LARGE_ONLY))
    assert ic.requests == plus.requests == small.requests == large.requests  # every policy sees the same
    assert ic.win_rate > plus.win_rate > small.win_rate
    assert ic.correlation > 0.7 and plus.correlation > 0.7
    assert large.p50_s > 20 * ic.p50_s and small.p50_s < ic.p50_s
    assert (small.offload, large.offload, large.win_rate) == (1.0, 0.0, 0.5)


def test_the_same_seed_gives_the_same_half_hour():
    one, two, other = (simulate(IC, Assumptions(scale=0.01), seed) for seed in (4, 4, 5))
    assert one == two != other


def test_the_command_prints_a_table_writes_json_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "WARM_UP", 60)
    monkeypatch.setattr(run, "CURVE_REQUESTS", 60)
    picture, file = tmp_path / "simulated.svg", tmp_path / "simulated.json"
    args = ["simulate", "--seeds", "1", "--first", "3", "--scale", "0.01", "--json", str(file)]
    if importlib.util.find_spec("matplotlib"):
        args += ["--picture", str(picture)]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    told = json.loads(file.read_bytes())
    assert [row["policy"] for row in told["policies"]] == [kind.name for kind in KINDS]
    assert told["assumptions"]["scale"] == 0.01 and told["seeds"] == [3]
    assert {claim["figure"] for claim in told["claims"]} == {"12", "13", "20"}
    assert "| IC-Cache |" in done.stdout and {arm.name for arm in ARMS} == {SMALL, LARGE}
    if "--picture" in args:
        assert "<svg" in picture.read_text()
