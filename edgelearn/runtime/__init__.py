"""How a model is executed for inference on a device: runtimes and the predictors they prepare.

`protocol` says what a runtime is; `int8` is the reference one (integer arithmetic, exactly);
`float` serves the float model; `onnxruntime` serves int8 with an engine's own kernels
(`network_reader` reads what a network computes, `qdq` writes it down). `observers` take ranges of
activations, `ranges` keeps them from one model to the next. `measure` is the one way to
measure all.
To add one, write a class with `prepare` and name it in the entry-point group `edgelearn.runtimes`.
If what it prepares is a `GroupPrepared`, a simulated fleet is evaluated many devices at a time,
wherever the network keeps rows apart (`rows` decides).
"""
