"""Rotate keys and queries as a model's own rotary position embedding does, and take the rotation back (RoPE).

Shapes: B batch, G heads, S tokens, D head dim, P rotated channels of a head (the first ones).
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from typing import Any

import torch
from torch import Tensor, nn

from pikv_core.errors import PiKVError

ROTATION = "apply_rotary_pos_emb"
GRAIN = 4096  # positions whose angles are computed at once
LENGTH_DEPENDENT = ("dynamic", "longrope")


class Rotary:
    """A model's rotary embedding, with the function by which its attention applies it.

    Everything is computed in float32 at least and returned in the dtype of `x`. Positions are [B,G,S], [B,S] or [S];
    those of empty slots (-1) are as good as any other. Whatever cannot be undone is refused where it is asked for.
    """

    def __init__(self, embedding: nn.Module, attention: nn.Module, config: Any):
        self.embedding = embedding
        self.config = config
        self.by_layer_type = "layer_type" in inspect.signature(embedding.forward).parameters
        self.apply = getattr(sys.modules[type(attention).__module__], ROTATION)
        self._turns: dict[str, Tensor] = {}
        self._pairs: dict[int, Tensor | None] = {}
        self.is_conditional = any(_calls(type(attention).forward, ROTATION))

    @classmethod
    def of(cls, model: Any) -> Rotary | None:
        """Return the rotary embedding of a transformers model's decoder, None where it has none (learned positions)."""
        modules = list(model.get_decoder().modules())
        embedding = next((module for module in modules if type(module).__name__.endswith("RotaryEmbedding")), None)
        attention = next((module for module in modules if is_rotary_attention(module)), None)
        if embedding is None or attention is None:
            return None
        return cls(embedding, attention, model.config.get_text_config(decoder=True))

    def rotate(self, x: Tensor, position: Tensor, layer: int) -> Tensor:
        """Return x [B,G,S,D] as attention uses it at these positions; raises PiKVError where no fixed rotation does."""
        return self._turn(x, position, layer, power=1)

    def unrotate(self, x: Tensor, position: Tensor, layer: int) -> Tensor:
        """Return the x [B,G,S,D] that `rotate` made this of; raises PiKVError as `rotate` does."""
        return self._turn(x, -position, layer, power=-1)

    def shift(self, x: Tensor, offset: Tensor, layer: int) -> Tensor:
        """Return rotated x [B,G,S,D] as if each token's position were larger by `offset`, which may be negative."""
        return self._turn(x, offset, layer, power=0)

    def pairs(self, layer: int) -> Tensor | None:
        """Return the channels [2,P/2] that rotate together: x cos - y sin and y cos + x sin, and all others pass.

        None where the model's function is another.
        """
        P = self._num_rotated(layer)
        if P not in self._pairs:
            eye, position = torch.eye(P)[None, None], torch.arange(P)[None]
            width = self._angles(eye, position, layer)[0].shape[-1]
            self._pairs[P] = _pairs_of(self.apply, P, width)
        return self._pairs[P]

    def turns(self, layer: int, num_positions: int) -> Tensor:
        """Return the cosines, then the sines [M,P] float32 of the angles of `pairs` for the first M positions or more.

        They are held for every kind of layer once they were asked for, 4·P bytes a position.
        """
        kind = self._attribute("inv_freq", layer)
        held = self._turns.get(kind)
        if held is None or len(held) < num_positions:
            pairs = self.pairs(layer)
            assert pairs is not None
            first, second = pairs
            M = -(-num_positions // GRAIN) * GRAIN
            x = torch.zeros(1, 1, M, pairs.numel())
            x[..., first] = 1
            turned = self.rotate(x, torch.arange(M), layer)[0, 0]
            self._turns[kind] = held = torch.cat([turned[:, first], turned[:, second]], dim=-1)
        return held

    def _turn(self, x: Tensor, position: Tensor, layer: int, power: int) -> Tensor:
        """Rotate by positions; the embedding's attention scaling (of yarn and others) counts `power` times."""
        self._check(layer)
        dtype = torch.promote_types(x.dtype, torch.float32)
        if position.dim() == 3:
            heads, position = x.reshape(-1, 1, *x.shape[2:]), position.expand(x.shape[:3]).reshape(-1, x.shape[2])
        else:
            heads, position = x, position.expand(x.shape[0], x.shape[2]) if position.dim() == 2 else position[None]
        num_rotated = self._num_rotated(layer)
        rotated, passed = heads[..., :num_rotated].to(dtype), heads[..., num_rotated:].to(dtype)
        cos, sin = self._angles(rotated, position, layer)
        factor = float(getattr(self.embedding, self._attribute("attention_scaling", layer))) ** (power - 1)
        rotated, _ = self.apply(rotated, rotated[:, :0], cos * factor, sin * factor)
        return torch.cat((rotated, passed), dim=-1).view(x.shape).to(x.dtype)

    def _angles(self, x: Tensor, position: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        kwargs = {"layer_type": self._layer_type(layer)} if self.by_layer_type else {}
        cos, sin = self.embedding(x, position, **kwargs)
        return cos, sin

    def _num_rotated(self, layer: int) -> int:
        return 2 * len(getattr(self.embedding, self._attribute("inv_freq", layer)))

    def _layer_type(self, layer: int) -> str:
        return self.config.layer_types[layer]

    def _attribute(self, name: str, layer: int) -> str:
        return f"{self._layer_type(layer)}_{name}" if self.by_layer_type else name

    def _check(self, layer: int) -> None:
        kind = self.config.model_type
        hint = "choose a method that works on keys as they are stored"
        rope: Any = getattr(self.embedding, "rope_type", "default")
        rope = rope[self._layer_type(layer)] if self.by_layer_type else rope
        if rope in LENGTH_DEPENDENT:
            raise PiKVError(
                f"model type '{kind}' uses the rotary embedding '{rope}', whose frequencies depend on the length: "
                "the rotation of stored keys cannot be undone",
                hint,
            )
        if self.is_conditional:
            raise PiKVError(
                f"the attention of model type '{kind}' rotates keys under a condition (in some layers only), "
                "which cannot be told from outside",
                hint,
            )


def _pairs_of(apply: Any, P: int, width: int) -> Tensor | None:
    """Find the pairs among P channels by what becomes of each with `width` cosines of 0 and sines of 1."""
    eye, ones = torch.eye(P)[None, None], torch.ones(1, P, width)
    kept, turned = (apply(eye, eye[:, :0], cos * ones, (1 - cos) * ones)[0] for cos in (1, 0))
    other, one = (turned[0, 0] == -1).nonzero().unbind(-1)
    expected = torch.zeros(P, P)
    expected[other, one], expected[one, other] = -1, 1
    is_known = torch.equal(kept, eye) and torch.equal(turned[0, 0], expected) and 2 * len(one) == P
    return torch.stack([one, other]) if is_known else None


def is_rotary_attention(module: nn.Module) -> bool:
    """Tell whether a module is attention that rotates its queries and keys."""
    return hasattr(module, "layer_idx") and bool(_calls(type(module).forward, ROTATION))


@functools.cache
def _calls(function: Any, name: str) -> list[bool]:
    """Return, for each call of `name` in a function's source, whether it stands below an `if`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    below = {id(node) for branch in ast.walk(tree) if isinstance(branch, ast.If) for node in ast.walk(branch)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]
    return [id(call) in below for call in calls]
