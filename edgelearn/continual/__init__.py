"""How a device learns without forgetting: client strategies, buffers, Fisher information, metrics.

A client strategy is one short file with a subclass of `ClientStrategy` (see `strategy`): three
ideas, batch, memory and loss. To add one, write the file, name its paper, add it to the
entry-point group `edgelearn.client_strategies`, and run `edgelearn check FILE:Class`.
"""
