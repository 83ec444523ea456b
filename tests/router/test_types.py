import pytest

from router.types import Arm, price_order


def test_arms_are_ordered_from_cheap_to_dear():
    arms = [Arm("c", 3.0), Arm("a", 0.0), Arm("b", 1.0)]
    assert [arms[i].name for i in price_order(arms)] == ["a", "b", "c"]


def test_at_one_price_students_come_first_and_then_the_order_listed():
    arms = [Arm("teacher", 1.0, is_teacher=True), Arm("x", 1.0), Arm("y", 1.0)]
    assert [arms[i].name for i in price_order(arms)] == ["x", "y", "teacher"]


@pytest.mark.parametrize("price", [-0.1, float("nan"), float("inf")])
def test_a_price_that_is_none_is_refused(price):
    with pytest.raises(ValueError, match=r"'a'.*price"):
        Arm("a", price)
