"""The runs of tests marked `pairwise`: enough of them that any two values of parameters meet.

A fault that takes three values at once to show is what `make test-all` looks for, with all runs.
"""

import collections
import itertools


def function_of(item):
    return item.nodeid.split("[")[0]


def values_of(item):
    return [(name, repr(value)) for name, value in sorted(item.callspec.params.items())]


def covering(items):
    """A few of the runs of one test, in which each pair of values is that is in any of them."""
    values = {item: values_of(item) for item in items}
    pairs = {
        item: set(itertools.combinations(values[item], 2)) or set(values[item]) for item in items
    }
    missing, uses = set().union(*pairs.values()), collections.Counter()
    while missing:
        # Of those with as many new pairs the one whose values were rarest so far.
        best = max(
            items, key=lambda i: (len(pairs[i] & missing), -sum(uses[value] for value in values[i]))
        )
        missing -= pairs[best]
        uses.update(values[best])
        yield best


def left_out(items, missing):
    """Items that need not run. `missing(item)` says that its device is not there.

    Of runs that will be skipped for that one is kept, which says so.
    """
    tests = {}
    for item in items:
        if item.get_closest_marker("pairwise") is not None and hasattr(item, "callspec"):
            tests.setdefault(function_of(item), []).append(item)
    kept = set()
    for runs in tests.values():
        there = [item for item in runs if not missing(item)]
        kept |= set(covering(there))
        kept |= set([item for item in runs if missing(item)][:1])
    return {item for runs in tests.values() for item in runs} - kept
