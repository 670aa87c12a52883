"""Small integers packed into bytes, as they lie in a file.

Bits: value `i` of a tensor takes the bits `i b` to `(i + 1) b - 1` of the stream, low bits first; values may cross byte
borders and the last byte is filled with zeros. Trits: five three-valued codes per byte, `sum_i (t_i + 1) 3^i`, which is
1.6 bits each. Tensors are flattened in row-major order. Everything is NumPy: packing happens once, on the host.
"""

from __future__ import annotations

import math

import numpy as np

from qtx.errors import UserError

MAX_BITS = 16
TRITS_PER_BYTE = 5

_POWERS = 3 ** np.arange(TRITS_PER_BYTE, dtype=np.uint8)


def packed_size(count: int, bits: int) -> int:
    """Returns how many bytes `pack` makes of `count` integers of `bits` bits."""
    return -(-count * bits // 8)


def trits_size(count: int) -> int:
    """Returns how many bytes `pack_trits` makes of `count` codes."""
    return -(-count // TRITS_PER_BYTE)


def pack(integers: np.ndarray, bits: int, minimum: int = 0) -> np.ndarray:
    """Packs integers of a few bits each.

    Args:
      integers: any shape, values `minimum` to `minimum + 2^bits - 1`.
      bits: 1 to 16.
      minimum: the value that is stored as 0.

    Returns:
      uint8 `[packed_size(count, bits)]`.

    Raises:
      UserError: on values outside the range, a tensor that is not of integers, or bits outside 1 to 16.
    """
    _check_bits(bits)
    flat = _in_range(integers, minimum, minimum + 2**bits - 1, f"{bits} bits")
    codes = (flat.astype(np.int32) - minimum).astype(np.uint16)
    # Eight values fill `bits` whole bytes, whatever their width, and none touches more than three bytes.
    blocks = np.pad(codes, (0, -codes.size % 8)).reshape(-1, 8)
    stream = np.zeros((blocks.shape[0], bits), np.uint8)
    for i in range(8):
        first, shift = divmod(i * bits, 8)
        shifted = blocks[:, i].astype(np.uint32) << shift
        for byte in range(first, (i * bits + bits - 1) // 8 + 1):
            stream[:, byte] |= (shifted >> 8 * (byte - first)).astype(np.uint8)
    return stream.reshape(-1)[: packed_size(codes.size, bits)]


def unpack(data: np.ndarray, bits: int, minimum: int, shape: tuple[int, ...]) -> np.ndarray:
    """Reads what `pack` wrote.

    Args:
      data: uint8 `[packed_size(count, bits)]`.
      bits: as when packed.
      minimum: as when packed.
      shape: of the tensor.

    Returns:
      int32 of `shape`.

    Raises:
      UserError: if the number of bytes does not fit the shape, or on bits outside 1 to 16.
    """
    _check_bits(bits)
    count = math.prod(shape)
    _check_size(data, packed_size(count, bits), shape, f"{bits} bits")
    stream = np.pad(data, (0, -data.size % bits)).reshape(-1, bits)
    blocks = np.empty((stream.shape[0], 8), np.int32)
    for i in range(8):
        first, shift = divmod(i * bits, 8)
        wide = np.zeros(stream.shape[0], np.uint32)
        for byte in range(first, (i * bits + bits - 1) // 8 + 1):
            wide |= stream[:, byte].astype(np.uint32) << 8 * (byte - first)
        blocks[:, i] = wide >> shift & 2**bits - 1
    return (blocks.reshape(-1)[:count] + minimum).reshape(shape)


def pack_trits(codes: np.ndarray) -> np.ndarray:
    """Packs codes -1, 0 and 1, five to a byte.

    Args:
      codes: integers, any shape.

    Returns:
      uint8 `[trits_size(count)]`.

    Raises:
      UserError: on other values, or a tensor that is not of integers.
    """
    digits = (_in_range(codes, -1, 1, "ternary codes") + 1).astype(np.uint8)
    blocks = np.pad(digits, (0, -digits.size % TRITS_PER_BYTE)).reshape(-1, TRITS_PER_BYTE)
    return (blocks * _POWERS).sum(1, dtype=np.uint8)


def unpack_trits(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Reads what `pack_trits` wrote.

    Args:
      data: uint8 `[trits_size(count)]`.
      shape: of the tensor.

    Returns:
      int32 of `shape`, values -1, 0 and 1.

    Raises:
      UserError: if the number of bytes does not fit the shape, or a byte is above 242, the greatest five trits make.
    """
    count = math.prod(shape)
    _check_size(data, trits_size(count), shape, "ternary codes")
    if data.size and data.max() >= 3**TRITS_PER_BYTE:
        raise UserError(f"byte {data.max()} holds no five ternary codes; was this packed as trits?")
    digits = data[:, None] // _POWERS % 3
    return (digits.reshape(-1)[:count].astype(np.int32) - 1).reshape(shape)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise UserError(f"cannot pack integers of {bits} bits; packing takes 1 to {MAX_BITS}")


def _check_size(data: np.ndarray, expected: int, shape: tuple[int, ...], what: str) -> None:
    if data.dtype != np.uint8 or data.shape != (expected,):
        raise UserError(
            f"a tensor of shape {shape} in {what} takes {expected} bytes of uint8, not {data.shape} of {data.dtype}; "
            "unpack it with the bits and shape that it was packed with"
        )


def _in_range(integers: np.ndarray, low: int, high: int, what: str) -> np.ndarray:
    flat = np.asarray(integers).reshape(-1)
    if not np.issubdtype(flat.dtype, np.integer):
        raise UserError(f"packing takes integers, not {flat.dtype}; quantize the tensor first")
    if flat.size and (flat.min() < low or flat.max() > high):
        raise UserError(f"values {flat.min()} to {flat.max()} do not fit {what}: they hold {low} to {high}")
    return flat
