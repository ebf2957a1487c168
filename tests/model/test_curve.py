from kaf_model.curve import thinned


def test_a_short_curve_is_kept_as_it_is():
    curve = [{"step": 1, "total": 0.123456789, "held-out dice": 0.5}, {"step": 2, "total": 2.0}]
    assert thinned(curve) == {"step": [1, 2], "total": [0.12346, 2.0], "held-out dice": [0.5, None]}


def test_a_long_curve_is_averaged_and_keeps_its_end_and_every_dice():
    curve = [{"step": step, "total": float(step)} for step in range(1, 11)]
    curve[4]["held-out dice"] = 0.7
    found = thinned(curve, limit=4)  # every third, the fifth for its Dice, and the last
    assert found["step"] == [3, 5, 6, 9, 10]
    assert found["total"] == [2.0, 4.5, 6.0, 8.0, 10.0]
    assert found["held-out dice"] == [None, 0.7, None, None, None]


def test_no_steps_make_no_columns():
    assert thinned([]) == {}
