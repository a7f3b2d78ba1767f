import math

import pytest

from xscale_lightning.errors import UserError
from xscale_lightning.schedules import Schedule, cosine, linear, warmup_cosine

# I-JEPA's published recipe (Assran et al. 2023) at 10 iterations per epoch for 300 epochs:
# learning rate 2e-4 -> 1e-3 over 40 epochs -> 1e-6, weight decay 0.04 -> 0.4, momentum 0.996 -> 1. Learning rate and
# weight decay are advanced before the first update, so iteration t uses step t; the momentum is advanced after it.
IJEPA = {
    1: (2.02e-4, 0.0400001, 0.996),
    200: (6.0e-4, 0.0439334, 0.99626533),
    400: (1e-3, 0.0555618, 0.996532),
    1000: (8.743811e-4, 0.13, 0.997332),
    2000: (3.233749e-4, 0.31, 0.99866533),
    3000: (1e-6, 0.4, 0.99999867),
}


@pytest.mark.parametrize("iteration", IJEPA)
def test_published_values_of_ijepa(iteration):
    lr, weight_decay, momentum = IJEPA[iteration]
    assert warmup_cosine(iteration, 3000, 400, 2e-4, 1e-3, 1e-6) == pytest.approx(lr, rel=1e-6)
    assert cosine(iteration, 3000, 0.04, 0.4) == pytest.approx(weight_decay, abs=6e-8)
    assert linear(iteration - 1, 3000, 0.996, 1.0) == pytest.approx(momentum, abs=6e-9)


@pytest.mark.parametrize("shape", [linear, cosine])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (3.0, -2.0), (0.5, 0.5)])
def test_endpoints_middle_and_beyond(shape, start, end):
    values = [shape(step, 10, start, end) for step in (0, 5, 10, 11, 1000)]
    assert values == pytest.approx([start, (start + end) / 2, end, end, end], abs=1e-15)


def test_quarter_of_the_way():
    assert linear(25, 100, 0.0, 4.0) == 1.0
    assert cosine(25, 100, 1.0, 0.0) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))


def test_runs_of_no_length_give_the_start_and_then_the_end():
    assert linear(0, 0, 1.0, 2.0) == 1.0 and cosine(3, 0, 1.0, 2.0) == 2.0


def test_warmup_then_cosine():
    values = [warmup_cosine(step, 14, 4, 0.0, 8.0, 2.0) for step in range(15)]
    assert values[:5] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert values[9] == pytest.approx(5.0) and values[14] == pytest.approx(2.0)
    assert values[4:] == sorted(values[4:], reverse=True)
    assert warmup_cosine(0, 10, 0, 0.0, 8.0, 2.0) == 8.0
    assert warmup_cosine(10, 10, 10, 0.0, 8.0, 2.0) == 8.0  # all warm-up


def test_schedule_object_follows_its_kind():
    assert Schedule("linear", 0.0, 1.0)(25, 100) == 0.25
    assert Schedule("cosine", 0.0, 1.0)(25, 100) == pytest.approx(cosine(25, 100, 0.0, 1.0))
    assert [Schedule("constant", 0.3, 0.3)(step, 10) for step in (0, 5, 10)] == [0.3] * 3


def test_a_constant_with_two_values_is_refused():
    with pytest.raises(UserError, match=r"constant schedule has one value, got start 0.1 and end 0.2"):
        Schedule("constant", 0.1, 0.2)
