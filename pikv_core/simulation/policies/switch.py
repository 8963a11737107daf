"""Switch among policies by how each would have done on the accesses just past.

Every member keeps its own order of the same resident blocks; the active one names the victim, and the others forget
it. Beside it each member runs a directory of its own at the full capacity, without blocks, that shows its hits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from numba.extending import register_jitable
from pydantic import Field

from pikv_core.components import Component, build
from pikv_core.errors import UsageError
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import Functions, RequestPolicy
from pikv_core.simulation.trace import Trace

ACTIVE, CHANGES, SEEN, WINDOW, MARGIN, CAPACITY = range(6)  # numbers of a switch
HITS, RESIDENT = 0, 1  # of a directory


@REQUEST_POLICIES.register("switch")
@dataclass(frozen=True)
class Switch(RequestPolicy):
    """Evict by one of several policies with their default options, the first named to begin with.

    After each window of accesses the one whose directory had the most object hits becomes active, if these were more
    than the active one's by over `margin` of the window.
    """

    listed: ClassVar[str] = "policies"  # what `switch:lru+lfu` names
    policies: tuple[str, ...] = ("lru", "lfu")
    window: Annotated[int, Field(ge=1)] = 10_000  # accesses
    margin: Annotated[float, Field(ge=0, le=1)] = 0.01
    touch: ClassVar[Any] = None  # these three are made of the members': see functions
    admit: ClassVar[Any] = None
    evict: ClassVar[Any] = None

    def __post_init__(self) -> None:
        if len(set(self.policies)) < max(2, len(self.policies)):
            raise UsageError(
                f"policy '{self.name}' needs two different policies or more, got '{'+'.join(self.policies)}'",
                hint=f"for example {self.name}:lru+lfu",
            )
        for name in self.policies:
            reason = _unfit(REQUEST_POLICIES[name])
            if reason:
                fit = ", ".join(known for known in REQUEST_POLICIES.names() if not _unfit(REQUEST_POLICIES[known]))
                raise UsageError(f"policy '{name}' {reason}, which a switch cannot use", hint=f"it takes: {fit}")

    def members(self) -> list[RequestPolicy]:
        return [build(REQUEST_POLICIES, Component(name)) for name in self.policies]

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return the members' states, those of their directories, numbers, and the directories' tallies and residents.

        States are nested pairs of the first and the rest. numbers: see above. tallies: [members, 2].
        """
        members = self.members()
        numbers = np.array([0, 0, 0, self.window, int(self.margin * self.window), capacity_blocks], np.int64)
        tallies = np.zeros((len(members), 2), np.int64)
        residents = np.zeros((len(members), trace.num_blocks), np.uint8)
        orders, directories = (_nested(members, trace, capacity_blocks) for _ in range(2))
        return orders, directories, numbers, tallies, residents

    def functions(self) -> Functions:
        return _functions(self.parts()[1:])

    def parts(self) -> tuple[type[RequestPolicy], ...]:
        return (type(self), *(type(member) for member in self.members()))


class Chain(NamedTuple):
    """Functions over the states of some members; all begin with the nested states."""

    touch: Callable[..., None]  # block, access, request
    admit: Callable[..., None]  # block, access, request
    evict: Callable[..., int]  # the active member, incoming, access, request
    forget: Callable[..., None]  # block
    look: Callable[..., None]  # capacity, tallies, residents, block, access, request: an access to each directory


def _unfit(policy: Any) -> str | None:
    """Return why a policy cannot be a member, None where it can."""
    if policy is Switch:
        return "is a switch itself"
    if policy.knows_future:
        return "knows the future"
    if policy.expires:
        return "lets blocks expire"
    if policy.unbounded:
        return "never evicts"
    if policy.always_forward:
        return "has an order of touching of its own"
    if policy.forget is None:
        return "cannot forget a block that another policy evicts"
    return None


def _nested(members: list[RequestPolicy], trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
    states: tuple[Any, ...] = ()
    for member in reversed(members):
        states = (member.state(trace, capacity_blocks), states)
    return states


@cache
def _functions(members: tuple[type[RequestPolicy], ...]) -> Functions:
    chain = _end()
    for index in reversed(range(len(members))):
        chain = _linked(index, members[index], chain)
    touch_all, admit_all, evict_one, _forget_all, look_up = chain

    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        orders, directories, numbers, tallies, residents = state
        touch_all(orders, block, access, request)
        look_up(directories, numbers[CAPACITY], tallies, residents, block, access, request)
        _count_access(numbers, tallies)

    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        orders, directories, numbers, tallies, residents = state
        admit_all(orders, block, access, request)
        look_up(directories, numbers[CAPACITY], tallies, residents, block, access, request)
        _count_access(numbers, tallies)

    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        orders, _directories, numbers, _tallies, _residents = state
        return evict_one(orders, numbers[ACTIVE], incoming, access, request)

    return Functions(touch, admit, evict, RequestPolicy.expire)


def _end() -> Chain:
    @register_jitable
    def touch(states: Any, block: int, access: int, request: int) -> None:
        pass

    @register_jitable
    def evict(states: Any, active: int, incoming: int, access: int, request: int) -> int:
        return -1

    @register_jitable
    def forget(states: Any, block: int) -> None:
        pass

    @register_jitable
    def look(states: Any, capacity: int, tallies: Any, residents: Any, block: int, access: int, request: int) -> None:
        pass

    return Chain(touch, touch, evict, forget, look)


def _linked(index: int, member: type[RequestPolicy], rest: Chain) -> Chain:
    """Return the functions of a member, the `index`-th of all, and of those after it."""
    own_touch, own_admit, own_evict, own_forget = member.touch, member.admit, member.evict, member.forget
    rest_touch, rest_admit, rest_evict, rest_forget, rest_look = rest

    @register_jitable
    def touch(states: Any, block: int, access: int, request: int) -> None:
        own_touch(states[0], block, access, request)
        rest_touch(states[1], block, access, request)

    @register_jitable
    def admit(states: Any, block: int, access: int, request: int) -> None:
        own_admit(states[0], block, access, request)
        rest_admit(states[1], block, access, request)

    @register_jitable
    def evict(states: Any, active: int, incoming: int, access: int, request: int) -> int:
        if active == index:
            victim = own_evict(states[0], incoming, access, request)
            rest_forget(states[1], victim)
        else:
            victim = rest_evict(states[1], active, incoming, access, request)
            own_forget(states[0], victim)
        return victim

    @register_jitable
    def forget(states: Any, block: int) -> None:
        own_forget(states[0], block)
        rest_forget(states[1], block)

    @register_jitable
    def look(states: Any, capacity: int, tallies: Any, residents: Any, block: int, access: int, request: int) -> None:
        if residents[index, block]:
            tallies[index, HITS] += 1
            own_touch(states[0], block, access, request)
        else:
            if tallies[index, RESIDENT] == capacity:
                residents[index, own_evict(states[0], block, access, request)] = 0
            else:
                tallies[index, RESIDENT] += 1
            residents[index, block] = 1
            own_admit(states[0], block, access, request)
        rest_look(states[1], capacity, tallies, residents, block, access, request)

    return Chain(touch, admit, evict, forget, look)


@register_jitable
def _count_access(numbers: Any, tallies: Any) -> None:
    """At the end of a window choose the member for the next one."""
    numbers[SEEN] += 1
    if numbers[SEEN] < numbers[WINDOW]:
        return
    numbers[SEEN] = 0
    best = numbers[ACTIVE]
    for index in range(tallies.shape[0]):
        if tallies[index, HITS] > tallies[best, HITS]:
            best = index
    if tallies[best, HITS] > tallies[numbers[ACTIVE], HITS] + numbers[MARGIN]:
        numbers[ACTIVE] = best
        numbers[CHANGES] += 1
    tallies[:, HITS] = 0
