"""Chooses which calls of a parametrized test `make test` and `make test-all` run.

A covering array of strength n is a subset of a test's calls that contains every combination of
values of any n parameters. If n is 0, the array is a single call. A test marked `covering(n)` runs
a covering array of strength n. `make test-all` also runs an array of strength max(n, 3).
"""

import heapq
import itertools
import zlib


def combinations(values, strength):
    """Returns each combination of `strength` parameter values of a call (or of all, if fewer)."""
    return set(itertools.combinations(sorted(values.items()), min(strength, len(values))))


def covering(calls, strength):
    """Returns the names of the calls in a covering array, chosen greedily.

    Repeatedly chooses the call that adds the most new combinations. Breaks ties by a hash of the
    call's name, because breaking them by position would pair most values with the first value of
    every other parameter.

    Args:
        calls: Maps the name of each call to its parameters, as text.
        strength: The array contains all combinations of values of any `strength` parameters.
    """
    new = {name: combinations(values, strength) for name, values in calls.items()}
    # Counts only decrease, so a popped call with an up-to-date count has the most combinations.
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
        strength: The strength for all test functions. If None, a function uses the strength in its
            mark, and a function without a mark runs all its calls.
        least: The minimum strength for functions with a mark.
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
