"""How large the largest tensor is that something makes on its way."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watch(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        storages = [
            x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(made) if isinstance(x, torch.Tensor)
        ]
        self.largest = max(self.largest, *storages, 0)
        return made


def largest_made(run):
    """Return the numbers in the largest storage that any operation of `run()` returns."""
    with _Watch() as watch:
        run()
    return watch.largest
