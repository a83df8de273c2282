"""Published experiments, run again: their settings, and what comes out beside what was published.

A module here is one experiment. It names the paper, holds its settings in a frozen dataclass, says
what was scaled down, and returns numbers from a seed: nothing is printed, nothing is cached. It
uses the same functions and strategies as a fleet does, so that a result speaks for them.

To add one: the setting as a frozen dataclass with the paper's values, a function from seed to
numbers, and the published numbers with where they stand. What differs from the paper is said at
the top of the module, and a number that was not reached is listed like any other.
"""
