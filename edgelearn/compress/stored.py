"""A compressed network as one file: tensors in safetensors, and what it says about itself.

Three ways of storing weights of quantized layers (`fake_quantized.quantized_weights`): as float32;
as integer codes with a scale for each output channel, 8 bits each or two 4-bit codes in a byte; and
as such codes packed (`sparse_weights`). All other tensors are float32. Codes of NAME are stored as
`codes/NAME`, its scales as `scales/NAME`.

Reading gives named float32 tensors back: float ones as they were, codes times their scales. A file
holds the SHA-256 of all its bytes, its own 64 digits counting as zeros: what was changed or cut on
the way is noticed before anything is made of it. Whoever changes a file on purpose can write
another; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from edgelearn.compress.fake_quantized import quantized_weights
from edgelearn.compress.packing import nibble_bytes, pack_nibbles, unpack_nibbles
from edgelearn.compress.quantize import quantize_weight
from edgelearn.compress.sparse_weights import pack, unpack
from edgelearn.errors import StateError
from edgelearn.params import FlatModel

_CODES, _SCALES = "codes/", "scales/"
_METADATA, _FORMATS = "edgelearn", "edgelearn-network-"
_FORMAT = f"{_FORMATS}2"
_CHECKSUM, _UNKNOWN = "sha256", "0" * 64
_DENSE, _PACKED = "dense", "packed"


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file holds.

    Attributes:
        tensors: Named float32 tensors, as `edgelearn.params.Layout` names them.
        facts: What the file says about itself.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, str]


def store(
    module: nn.Module,
    *,
    bits: int | None = None,
    is_packed: bool = False,
    facts: Mapping[str, str] | None = None,
) -> bytes:
    """Return a network as the bytes of a file.

    Args:
        module: The network.
        bits: Of a quantized weight, 4 or 8; None stores float32.
        is_packed: Whether codes are packed.
        facts: What the file says about itself, such as the name of the network's factory.

    Returns:
        Bytes for `read`; the same for the same network.
    """
    if bits not in (None, 4, 8) or (is_packed and bits is None):
        raise ValueError(f"bits is {bits}; allowed: 4 and 8, and None where nothing is packed")
    model = FlatModel(module)
    quantized = quantized_weights(model) if bits is not None else frozenset()
    out: dict[str, Tensor] = {}
    for name, value in model.layout.views(model.initial()).items():
        if bits is None or name not in quantized:
            out[name] = value.contiguous()
            continue
        codes, scales = quantize_weight(value, largest=2 ** (bits - 1) - 1)
        out[f"{_SCALES}{name}"] = scales
        if is_packed:
            coded = bytearray(pack(codes.numpy()))
            out[f"{_CODES}{name}"] = torch.frombuffer(coded, dtype=torch.uint8)
        else:
            out[f"{_CODES}{name}"] = pack_nibbles(codes.flatten()) if bits == 4 else codes
    shapes = dict(zip(model.layout.names, model.layout.shapes, strict=True))
    own = {
        "format": _FORMAT,
        "weights": _PACKED if is_packed else _DENSE,
        "bits": str(bits or 32),
        "shapes": json.dumps({name: shapes[name] for name in sorted(quantized)}),
        _CHECKSUM: _UNKNOWN,
    }
    # One entry, sorted: of several, safetensors writes now one first and now another.
    said = json.dumps({**(facts or {}), **own}, sort_keys=True)
    data = save(out, metadata={_METADATA: said})
    return _with_checksum(data, _UNKNOWN, hashlib.sha256(data).hexdigest())


def read(data: bytes, *, source: str) -> Stored:
    """Return what a file holds.

    Args:
        data: What `store` returned.
        source: Where it comes from, for the error.

    Raises:
        StateError: If the bytes are damaged, or `store` did not write them.
    """
    facts = _facts(data, source)
    if facts.get("format", "").startswith(_FORMATS) and facts["format"] != _FORMAT:
        raise StateError(
            f"{source}: another version of edgelearn wrote it, in a form that this one does not "
            f"read ({facts['format']}, expected {_FORMAT}); write it anew: edgelearn compress"
        )
    if facts.get("format") != _FORMAT:
        raise StateError(
            f"{source}: not a network with its name, as `edgelearn compress` writes it "
            f"(format: {facts.get('format', 'none')}, expected {_FORMAT})"
        )
    _verify(data, facts.get(_CHECKSUM, ""), source)
    try:
        found = load(data)
        bits, is_packed = int(facts["bits"]), facts["weights"] == _PACKED
        shapes: dict[str, list[int]] = json.loads(facts["shapes"])
        tensors = {name: value for name, value in found.items() if "/" not in name}
        for name, shape in shapes.items():
            codes = _codes(found[f"{_CODES}{name}"], shape, bits=bits, is_packed=is_packed)
            scales = found[f"{_SCALES}{name}"].view(-1, *[1] * (len(shape) - 1))
            tensors[name] = codes.to(torch.float32) * scales
    except (
        SafetensorError, StateError, KeyError, ValueError, TypeError, AttributeError, RuntimeError
    ) as error:  # fmt: skip
        raise StateError(f"{source}: damaged: {error}") from error
    return Stored(tensors, facts)


def _with_checksum(data: bytes, old: str, new: str) -> bytes:
    """Return the bytes of a file with another checksum in their place; facts say it behind its key.

    In the header, what a file says of itself is JSON within JSON.
    """

    def entry(checksum: str) -> bytes:
        return json.dumps(json.dumps({_CHECKSUM: checksum})[1:-1])[1:-1].encode()

    return data.replace(entry(old), entry(new), 1)


def _verify(data: bytes, checksum: str, source: str) -> None:
    found = hashlib.sha256(_with_checksum(data, checksum, _UNKNOWN)).hexdigest()
    if found != checksum:
        raise StateError(
            f"{source}: damaged: its {len(data)} bytes have the SHA-256 {found[:12]}..., expected "
            f"{f'{checksum[:12]}...' if checksum else 'one, and it has none'}; write it anew"
        )


def _codes(stored: Tensor, shape: list[int], *, bits: int, is_packed: bool) -> Tensor:
    """Return the codes of a weight, int8."""
    count = int(np.prod(shape))
    if is_packed:
        flat = torch.from_numpy(unpack(stored.numpy().tobytes()))
    elif bits == 4:
        if len(stored) != nibble_bytes(count):
            raise StateError(f"{len(stored)} bytes of 4-bit codes for {count} weights")
        flat = unpack_nibbles(stored, count)
    else:
        flat = stored
    return flat.reshape(shape)


def _facts(data: bytes, source: str) -> dict[str, str]:
    """Return the metadata of a safetensors file, which its loader keeps to itself."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        found: dict[str, str] = json.loads(header.get("__metadata__", {}).get(_METADATA, "{}"))
    except (ValueError, AttributeError, TypeError) as error:
        raise StateError(f"{source}: damaged, or not a safetensors file: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise StateError(f"{source}: damaged: what it says of itself is no table of texts")
    return found
