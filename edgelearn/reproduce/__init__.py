"""What papers found, measured again with this code: one module for each kind of finding.

A measurement is a function that takes a seed and returns numbers by name, over scenarios written
out in the same module and scaled to minutes on two cores.
"""
