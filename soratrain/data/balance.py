"""Dealing out samples of different costs so that everybody has about as much."""

from __future__ import annotations

from heapq import heapify, heapreplace

import numpy as np

EVEN = 1.01  # times the mean: a slot that costs no more is not made lighter


def balanced(costs: np.ndarray, slots: int) -> np.ndarray:
    """Return a slot for each sample [N], such that the costliest slot costs little more than the mean.

    The samples, costliest first, go each to the slot that has least (LPT; Graham, 1969). Then, as long as it helps, a
    sample of the costliest slot changes places with another's, or moves to the slot that has least.
    """
    heap = [(0, slot) for slot in range(slots)]
    heapify(heap)
    owner = np.empty(len(costs), dtype=np.int64)
    for number, cost in enumerate(costs.tolist()):
        load, owner[number] = heap[0]
        heapreplace(heap, (load + cost, int(owner[number])))
    loads = np.bincount(owner, weights=costs, minlength=slots).astype(np.int64)
    for _ in range(4 * slots):
        worst, least = int(loads.argmax()), int(loads.argmin())
        if loads[worst] <= EVEN * loads.mean():
            break
        own, others = np.flatnonzero(owner == worst), np.flatnonzero(owner != worst)
        gain = costs[own][:, None] - np.append(costs[others], 0)  # what the costliest slot loses; the last is a move
        there = np.append(loads[owner[others]], loads[least])
        after = np.maximum(loads[worst] - gain, there + gain)
        given, taken = np.unravel_index(after.argmin(), after.shape)
        if after[given, taken] >= loads[worst]:
            break
        target = least if taken == len(others) else int(owner[others[taken]])
        owner[own[given]] = target
        if taken < len(others):
            owner[others[taken]] = worst
        loads[worst] -= gain[given, taken]
        loads[target] += gain[given, taken]
    return owner
