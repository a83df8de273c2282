"""The federation: the round loop that drives any Flower strategy, and what crosses the wire.

`loop` is the loop; `messages` the wire format; `egress` the guard on the device; `server` finds and
builds server strategies; `checkpoint` and `record` make runs durable; `client_app` and `server_app`
make Flower apps of it. Private touch points of flwr are in `_flwr_compat` and nowhere else.
"""
