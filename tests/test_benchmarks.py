from benchmarks import measure


def test_one_round_is_enough_for_a_table():
    assert measure.spread([0.25]) == "250 (250 to 250)"
    assert measure.spread([0.1, 0.2, 0.3]) == "200 (100 to 300)"
