"""Chooses which calls of a parametrized test `make test` and `make test-all` run.

A test marked `covering(n)` runs a covering array of strength n: a subset of the product of its
parameters in which every combination of values of any n parameters occurs. A covering array of
strength 0 is a single call. `make test-all` adds the calls of an array of strength 3, or of n if
n is larger.
"""

import heapq
import itertools
import zlib


def combinations(values, strength):
    """Returns the combinations of `strength` values of a call (of all values if it has fewer)."""
    return set(itertools.combinations(sorted(values.items()), min(strength, len(values))))


def covering(calls, strength):
    """Returns the names of the calls in a covering array, chosen greedily.

    Each choice is the call with the most new combinations. Ties are broken by a hash of the name:
    if they were broken by position, most values would be paired with the first value of all other
    parameters.

    Args:
        calls: Maps the name of each call to its parameters, as text.
        strength: The number of parameters of which all combinations of values must occur.
    """
    new = {name: combinations(values, strength) for name, values in calls.items()}
    # Counts only shrink. So if the count of a popped call is up to date, no call has a higher one.
    queue = [(-len(found), zlib.crc32(name.encode()), name) for name, found in new.items()]
    heapq.heapify(queue)
    chosen, seen = set(), set()
    while queue:
        count, order, name = heapq.heappop(queue)
        new[name] -= seen
        if new[name] and len(new[name]) == -count:
            chosen.add(name)
            seen |= new[name]
        elif new[name]:
            heapq.heappush(queue, (-len(new[name]), order, name))
    return chosen


def redundant(items, strength=None, least=0):
    """Returns the collected tests that are not in the covering array of their test function.

    Args:
        items: All collected tests.
        strength: The strength of all arrays. If None, each marked function has the strength in its
            mark, and functions without a mark run all their calls.
        least: The minimum strength of the arrays of marked functions.
    """
    functions = {}
    for item in items:
        mark = item.get_closest_marker("covering")
        if strength is not None:
            wanted = strength
        elif mark:
            wanted = max(least, *mark.args)
        else:
            continue
        if hasattr(item, "callspec"):  # a marked module may also contain tests without parameters
            where = item.nodeid.partition("[")[0]
            functions.setdefault((where, wanted), []).append(item)
    left_out = []
    for (_, wanted), collected in functions.items():
        calls = {
            item.nodeid: {name: repr(value) for name, value in item.callspec.params.items()}
            for item in collected
        }
        chosen = covering(calls, wanted)
        left_out += [item for item in collected if item.nodeid not in chosen]
    return left_out
