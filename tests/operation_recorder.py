"""A CUDA graph's stand-in on a CPU: the operations of a run, done again on the same tensors without Python's part.

As in a graph what was read from the host stays what it was, results land where they first did, and asking a tensor for
its value, or for a shape that depends on it, is refused.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if ASKS & set(operation.tags):
            raise RuntimeError(f"{operation} asks for a value while a step is recorded")
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result


def record(run):
    """Run once; return a function that does the same operations again."""
    with _Recording() as recording:
        run()

    def replay():
        for operation, args, kwargs, result in recording.operations:
            aliases = [returned.alias_info for returned in operation._schema.returns]
            if any(alias is not None and not alias.is_write for alias in aliases):
                continue  # a view: it shows what its base has become
            again = operation(*args, **kwargs)
            for alias, old, new in zip(aliases, _flat(result), _flat(again)):
                if alias is None and isinstance(old, torch.Tensor):
                    assert old.shape == new.shape
                    old.copy_(new)

    return replay


def _flat(result):
    return tree_leaves(result) if isinstance(result, tuple | list) else [result]
