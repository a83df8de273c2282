"""Making models and updates smaller.

`quantize` holds integer quantization: codes, scales and zero points, as pure functions of tensors.
Each further technique is a file of its own. What executes a compressed model is in `runtime`.
"""
