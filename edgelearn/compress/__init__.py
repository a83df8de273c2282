"""Making models and updates smaller.

`quantize` holds integer quantization of a model: codes, scales and zero points, as pure functions
of tensors. `codec` is what encodes updates for the wire (base class, and how a scenario's is made);
`half`, `quantized` and `sparse` are such codecs, over `blocks` (stochastic quantization) and
`packing`. Write another as a class with `pieces`, `encode`, `decode` and `error`, and name it in
the entry-point group `edgelearn.codecs`. `prune` says which weights stay, `sparse_weights` how the
rest are stored. `codes` trains int8 weights as they are, without float ones beside them.
Each further technique is a file of its own. What executes a compressed model is in `runtime`.
"""
