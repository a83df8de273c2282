"""What papers found, measured again with this code: one module for each kind of finding.

A measurement is a function `run(seed) -> {name of a number: value}` over scenarios written out in
the same module, scaled to minutes on two cores. What a paper reports stands beside it as data.
"""
