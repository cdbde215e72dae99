"""Times of training against their distributions."""

from typing import get_args

import pytest
import torch
from scipy import stats

from anomalib_wtflow.flow.times import TIME_SAMPLINGS, TimeSamplingName, get_time_sampling


@pytest.mark.parametrize("start_time", [0.1, 0.3, 0.7])
def test_distributions(start_time: float) -> None:
    times = {name: get_time_sampling(name, start_time)(4000).double() for name in TIME_SAMPLINGS}
    assert stats.kstest(times["uniform"].numpy(), "uniform").pvalue > 1e-3
    logits = times["logit_normal"].logit()
    centre = torch.tensor(start_time).logit().item()
    assert stats.kstest(logits.numpy(), "norm", args=(centre, 1)).pvalue > 1e-3
    assert set(TIME_SAMPLINGS) == set(get_args(TimeSamplingName))


def test_errors() -> None:
    with pytest.raises(ValueError, match="centred at start_time, which is 0: choose uniform"):
        get_time_sampling("logit_normal", 0)
    with pytest.raises(ValueError, match="Unknown time_sampling 'logit': "):
        get_time_sampling("logit", 0.3)
