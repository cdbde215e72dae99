"""The running average of the weights: one term for each optimiser step, and what scores."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from anomalib_wtflow import SyntheticParts, WTFlow, WTFlowModel
from anomalib_wtflow.settings import get_settings
from anomalib_wtflow.training.averaging import WeightAveraging
from conftest import as_mvtec, quiet_engine

SMALL = {"image_size": 64, "false_alarm_rate": 0.3, "max_epochs": 3}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_each_step_enters_the_average_once(parts: SyntheticParts, tmp_path: Path, accumulated: int) -> None:
    """Batches whose gradients wait for others' do not: two batches an epoch are two steps or one."""
    model = WTFlow(overrides={"plateau": 0.0, "averaging": 0.4}, **SMALL)
    average, seen = model.model.average, []

    def recorded() -> None:
        seen.append({name: tensor.detach().clone() for name, tensor in model.model.field.named_parameters()})
        average()

    model.model.average = recorded
    engine = quiet_engine(tmp_path, limit_val_batches=0, accumulate_grad_batches=accumulated)
    engine.fit(model, datamodule=as_mvtec(parts))
    assert model.trainer.global_step == len(seen) == 3 * 2 // accumulated
    assert model.model.averaged.n_averaged == len(seen)
    for name, mean in model.model.flow_field.named_parameters():
        expected = seen[0][name]
        for n, weights in enumerate(seen[1:], start=2):
            expected = expected + (weights[name] - expected) / (1 + 0.4 * (n - 1))
        torch.testing.assert_close(mean, expected)
        assert torch.equal(model.model.field.get_parameter(name), seen[-1][name])
    loaded = WTFlow.load_from_checkpoint(engine.best_model_path).eval()
    for name, mean in model.model.flow_field.named_parameters():
        assert torch.equal(loaded.model.flow_field.get_parameter(name), mean)
        assert not loaded.model.flow_field.get_parameter(name).requires_grad


def test_the_average_is_not_trained(parts: SyntheticParts, tmp_path: Path) -> None:
    """The optimiser has the weights of the field, and no others."""
    model = WTFlow(**{**SMALL, "max_epochs": 1})
    quiet_engine(tmp_path, limit_val_batches=0).fit(model, datamodule=as_mvtec(parts))
    (group,) = model.optimizers().optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.model.field.parameters()}
    assert all(parameter.grad is None for parameter in model.model.flow_field.parameters())


@pytest.mark.parametrize(("ckpt_path", "steps"), [(None, 0), ("model.ckpt", 7)])
def test_a_second_fit_starts_a_new_average(ckpt_path: str | None, steps: int) -> None:
    """Unless it goes on from a checkpoint: the old weights belong to the normalisation that they were trained with."""
    model = WTFlowModel(get_settings(width=8))
    for _ in range(7):
        model.average()
    trainer = SimpleNamespace(global_step=3, ckpt_path=ckpt_path)
    WeightAveraging().on_train_start(trainer, SimpleNamespace(model=model))
    assert model.averaged.n_averaged == steps
