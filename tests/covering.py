"""Chooses the calls of a parametrized test that `make test` and `make test-all` run.

A test marked `covering(n)` runs a covering array of strength n: a subset of the product of its
parameters in which every combination of values of any n parameters occurs. A covering array of
strength 0 is a single call. `make test-all` adds the calls of an array of strength 3, or of n if
n is larger.
"""

import heapq
import itertools
import zlib


def combinations(values, strength):
    """Returns a call's combinations of `strength` values, or of all values if there are fewer."""
    return set(itertools.combinations(sorted(values.items()), min(strength, len(values))))


def covering(calls, strength):
    """Returns the names of the calls in a covering array.

    Always chooses the call that adds the most new combinations. A hash of the name breaks ties,
    because always taking the first call would pair most values with the first value of every other
    parameter.

    Args:
        calls: The parameters of each call, as text, by the call's name.
        strength: All combinations of values of this many parameters must occur.
    """
    new = {name: combinations(values, strength) for name, values in calls.items()}
    # Counts never grow, so the first popped call with a current count adds the most.
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
    """Returns the collected tests that the covering array of their test function leaves out.

    Args:
        items: All collected tests.
        strength: The strength of all arrays. If None, each marked function has an array of the
            strength in its mark, and unmarked functions have none.
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
