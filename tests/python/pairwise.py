"""The runs of tests marked `pairwise`: enough of them that any two values of parameters meet.

A fault that takes three values at once to show is what `make test-all` looks for, with all runs.
"""

import itertools


def function_of(item):
    return item.nodeid.split("[")[0]


def pairs_of(item):
    """Pairs of the values of a test's parameters, with their names; with one, its value."""
    values = [(name, repr(value)) for name, value in sorted(item.callspec.params.items())]
    return set(itertools.combinations(values, 2)) or set(values)


def covering(items):
    """A few of the runs of one test, in which each pair is that is in any of them."""
    pairs = {item: pairs_of(item) for item in items}
    missing = set().union(*pairs.values())
    while missing:
        best = max(items, key=lambda item: len(pairs[item] & missing))
        missing -= pairs[best]
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
