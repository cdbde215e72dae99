"""Two processes on one machine share the cache: Lightning's own DDP, on CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from anomalib_wtflow import SyntheticParts, WTFlow
from anomalib_wtflow.training.processes import use_one_folder
from conftest import as_mvtec, quiet_engine

PROGRAM = """
import json, os, sys, warnings
from pathlib import Path
import torch
from anomalib.engine import Engine
from anomalib.data import Folder
from anomalib_wtflow import WTFlow

root, folder, validate = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
model = WTFlow(max_epochs=3, image_size=64, false_alarm_rate=0.3, overrides={"plateau": 0.0, "contrast": 0.5})
data = Folder("parts", "train/good", folder, "test/scratch", "test/good", "ground_truth/scratch",
              val_split_mode="same_as_test", num_workers=0, train_batch_size=4)
extract, passed = model.model.extract, []
model.model.extract = lambda images: (passed.append(len(images)), extract(images))[1]
step, shown = model.training_step, []
model.training_step = lambda batch, *rest: (shown.extend(batch.features[:, 0, 0, 0].tolist()), step(batch, *rest))[1]
engine = Engine(default_root_dir=root, logger=False, enable_progress_bar=False, enable_model_summary=False,
                strategy="ddp", devices=2, accelerator="cpu", limit_val_batches=validate)
engine.fit(model, datamodule=data)
rank = engine.trainer.global_rank
state = {name: tensor for name, tensor in model.state_dict().items() if "feature_extractor" not in name}
torch.save(state, root / f"state-{rank}.pt")
seen = {"passed": sum(passed), "shown": shown, "images": len(data.train_data)}
(root / f"seen-{rank}.json").write_text(json.dumps(seen))
"""


@pytest.mark.slow
def test_each_image_passes_the_backbone_once_in_all_processes(parts: SyntheticParts, tmp_path: Path) -> None:
    parts.prepare_data()
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "program.py", str(tmp_path), str(parts.root), "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout + done.stderr).count("normal images that were not trained on") == 1
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    trained, held_out, validated = 13, 3, 24
    assert sum(each["passed"] for each in seen) == trained + held_out + validated
    assert [each["images"] for each in seen] == [16, 16]  # given back
    # In each of three epochs the two see all 13 images, one of them twice, since Lightning's sampler pads to 14.
    assert [len(each["shown"]) for each in seen] == [3 * 7, 3 * 7]
    for epoch in range(3):
        assert len({value for each in seen for value in each["shown"][7 * epoch : 7 * epoch + 7]}) == trained
    states = [torch.load(tmp_path / f"state-{rank}.pt") for rank in (0, 1)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=0, equal_nan=True)
    assert not list((tmp_path / "temporary").glob("wtflow-features-*"))

    overrides = {"plateau": 0.0, "contrast": 0.5}
    single = WTFlow(max_epochs=3, image_size=64, false_alarm_rate=0.3, overrides=overrides)
    module = as_mvtec(parts, train_batch_size=8)  # as many images a step as two processes of four
    quiet_engine(tmp_path / "single").fit(single, datamodule=module)
    torch.testing.assert_close(states[0]["model.normalization.mean"], single.model.normalization.mean)
    threshold = single.post_processor.image_threshold
    assert abs(states[0]["post_processor._image_threshold"] - threshold) < 0.1 * threshold


@pytest.mark.parametrize(("name", "leads"), [("v1", "v1"), ("mine", "v0")])
def test_latest_leads_to_a_version_of_a_run_and_to_nothing_else(tmp_path: Path, name: str, leads: str) -> None:
    """A ``latest`` beside the folder of a plain Lightning run is the user's own."""
    for folder in ("v0", name):
        (tmp_path / folder).mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "v0")
    strategy = SimpleNamespace(broadcast=lambda path: path, barrier=lambda name: None)
    use_one_folder(SimpleNamespace(default_root_dir=str(tmp_path / name), strategy=strategy, is_global_zero=True))
    assert (tmp_path / "latest").resolve() == tmp_path / leads
