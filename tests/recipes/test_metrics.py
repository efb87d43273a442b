"""What a step's metrics make of several values."""
import math

from sophiavl_fast.recipes import rl


def test_the_worst_of_several_updates_is_nan_wherever_one_is():
    assert rl._worst([1.0, 3.0, 2.0]) == 3.0
    for values in ([math.nan, 1.0], [1.0, math.nan], [1.0, math.nan, 2.0]):
        assert math.isnan(rl._worst(values))
