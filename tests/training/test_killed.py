"""A run that is killed at any moment leaves a checkpoint to go on from."""

import os
import random
import subprocess
import time

import pytest
from training.test_train import command

from pikv_core.training.checkpoint import load_checkpoint


@pytest.mark.slow
def test_killing_at_ten_random_moments_never_leaves_an_unloadable_checkpoint(tmp_path):
    folder, moments = tmp_path / "run", random.Random(0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [*command(folder), "--set", "train.checkpoint_every=1", "--set", "train.max_steps=100000"]
    start += ["--set", "train.stage_accuracy=1.0", "--set", "train.decay_steps=1"]
    steps = [0]
    for _ in range(10):
        arguments = start if not folder.exists() else command(None, "--resume", str(folder))
        process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + 120
        while _step(folder) <= steps[-1]:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.wait()
        checkpoint = load_checkpoint(folder)
        assert checkpoint is not None and checkpoint.step > steps[-1]
        steps.append(checkpoint.step)


def _step(folder):
    return max((int(entry.name) for entry in folder.glob("checkpoint/*") if entry.name.isdigit()), default=0)
