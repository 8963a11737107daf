"""A training run of seconds, and what interrupts one."""

import signal

from pikv_core.jobs import train
from pikv_core.recipes import load
from pikv_core.runs import Reporter, Run

RECALL = "data.task={name: recall, num_keys: 16, num_values: 8, num_filler: 16}"
SIZES = ["num_layers=2", "hidden_size=32", "ffn_size=48", "num_experts=4", "expert_size=24"]
COURSE = [
    "train.batch_tokens=128",
    "train.max_steps=12",
    "train.curriculum=[16, 32]",
    "train.stage_accuracy=0.0001",
    "train.stage_steps=5",
    "train.decay_steps=4",
    "train.warmup_steps=3",
    "train.log_every=2",
    "train.checkpoint_every=4",
    "train.eval_samples=8",
    "train.eval_lengths=[24, 32]",
    "dtype=float32",
]


class InterruptedAt(Reporter):
    """Sends Ctrl-C to this process in the given step."""

    def __init__(self, step):
        self.step = step

    def progress(self, text, done, total):
        if done == self.step:
            signal.raise_signal(signal.SIGINT)


def train_small(folder, *overrides, reporter=None, resume=False, sizes=True):
    """Train a model on recall; sizes: whether the recipe has a section model."""
    model = [f"model.{size}" for size in SIZES] if sizes else []
    recipe = load("train", None, [RECALL, *COURSE, *model, *overrides], {"out": str(folder)})
    return train.run(recipe, Run(recipe, reporter, folder if resume else None))
