"""The options of `combine`: a method and what suits it."""

import pytest

from lorasmith.config.combine import CombineConfig, prunes
from lorasmith.config.values import check
from lorasmith.errors import ConfigError


def refused(**options: object) -> str:
    with pytest.raises(ConfigError) as error:
        check(CombineConfig, options, "combine")
    return str(error.value)


def test_the_default_is_exact():
    assert (CombineConfig().method, CombineConfig().seed, CombineConfig().majority_sign_method) == ("cat", 0, "total")


def test_pruning_methods_need_a_density():
    for method in ("ties", "ties_svd", "dare_linear", "dare_ties_svd", "magnitude_prune"):
        assert prunes(method)
        assert f"{method} requires --density" in refused(method=method)
        assert check(CombineConfig, {"method": method, "density": 0.5}).density == 0.5
    for method in ("cat", "linear", "svd"):
        assert not prunes(method)
        assert f"--density has no effect with {method}" in refused(method=method, density=0.5)


def test_only_svd_has_a_rank_to_choose():
    assert check(CombineConfig, {"method": "svd", "rank": 8}).rank == 8
    assert check(CombineConfig, {"method": "ties_svd", "density": 0.5, "rank": 8}).rank == 8
    for options in ({"method": "cat"}, {"method": "ties", "density": 0.5}):
        assert f"--rank has no effect with {options['method']}" in refused(rank=8, **options)


@pytest.mark.parametrize(
    ("option", "value"), [("density", 0), ("density", 1.1), ("rank", 0), ("seed", -1), ("method", "slerp")]
)
def test_values_out_of_bounds_are_refused(option, value):
    assert refused(**{option: value}).startswith(f"combine.{option}: ")
