"""The federation: the round loop that drives any Flower strategy, and what crosses the wire.

`loop` is the loop; `messages` the wire format; `egress` the guard on the device; `server` finds and
builds server strategies; `checkpoint`, `journal`, `record` and `rundir` make runs durable;
`client_app` and `server_app` make Flower apps of it, with `network` for the fleet behind a real
SuperLink. Private touch points of flwr are in `_flwr_compat` and nowhere else.
"""
