"""A device: its profile and budget, its durable state, how it learns, and the loop of its life.

`learner` trains with a client strategy, `course` takes it from one experience to the next, and
`learners` has one for each kind of device of a scenario; `evaluate` measures what the device
serves; `store` and `fleet_store` keep state, for one real device and for a simulated fleet;
`resident` is a real device under a server, which stores samples and forgets them in time;
`profile` says what a kind of device can do; `runtimes` what it serves with and the activation
ranges that it keeps, which `tracking` widens after training; `loop` is infer -> feedback -> learn.
"""
