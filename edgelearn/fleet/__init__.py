"""The simulator: a fleet of devices in one process tree, on a virtual clock.

`grid` is a Flower `Grid` in process; `workbench` does a device's work; `evaluation` groups devices
that are evaluated in one pass; `reference` and `pool` are the engines that run a cohort on
workbenches; `cohort` turns messages into their jobs; `simulate` is
the whole. Every engine gives the same bits for any number of workers.
"""
