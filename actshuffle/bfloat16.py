"""The ``bfloat16`` Zarr data type: ``"data_type": "bfloat16"`` on disk, uint16 bit patterns in memory.

numpy has no bfloat16; tensorstore and zarrs read and write it under this name.  ``import actshuffle``
registers the type with zarr.  An entry point (``zarr.data_type``) declares it too, but zarr up to 3.1.6
collects these without ever loading them, so there the import must come before the store is opened.
In torch: ``torch.from_numpy(x.view("i2")).view(torch.bfloat16)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray
from zarr.core.dtype.common import HasEndianness
from zarr.dtype import DataTypeValidationError, ZDType, data_type_registry


@dataclass(frozen=True, kw_only=True, slots=True)
class BFloat16(ZDType[np.dtypes.UInt16DType, np.uint16], HasEndianness):
    """bfloat16 as its 16 bits.  Zarr v3 only; fill values are hexadecimal bit patterns or numbers.

    `HasEndianness` keeps ``endian`` in the metadata of the bytes codec; other readers refuse an array without it.
    """

    dtype_cls = np.dtypes.UInt16DType
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        # A plain uint16 array means uint16: bfloat16 is chosen by name only.
        raise DataTypeValidationError(f"no numpy data type maps to bfloat16, got {dtype}")

    def to_native_dtype(self) -> np.dtypes.UInt16DType:
        order: Literal["<", ">"] = "<" if self.endianness == "little" else ">"
        return cast(np.dtypes.UInt16DType, np.dtype(np.uint16).newbyteorder(order))

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError("Zarr v2 has no bfloat16")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data != cls._zarr_v3_name:
            raise DataTypeValidationError(f"expected 'bfloat16', got {data!r}")
        return cls()

    def to_json(self, zarr_format: Literal[2, 3]) -> Any:
        if zarr_format == 2:
            raise ValueError("Zarr v2 has no bfloat16")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, (int, np.integer))

    def cast_scalar(self, data: object) -> np.uint16:
        if not self._check_scalar(data):
            raise TypeError(f"a bfloat16 scalar is given by its 16 bits as an int, got {data!r}")
        return np.uint16(cast(int, data))

    def default_scalar(self) -> np.uint16:
        return np.uint16(0)

    def from_json_scalar(self, data: Any, *, zarr_format: Literal[2, 3]) -> np.uint16:
        if isinstance(data, str) and data.startswith("0x"):
            return np.uint16(int(data, 16))
        return float_to_bits(float(data))  # accepts "NaN" and "Infinity" too

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> Any:
        value = bits_to_float(np.uint16(cast(int, data)))
        if np.isnan(value):
            return "NaN" if int(cast(int, data)) == 0x7FC0 else f"0x{int(cast(int, data)):04x}"
        if np.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return value

    @property
    def item_size(self) -> int:
        return 2


data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)  # also when not pip-installed


def float_to_bits(value: float) -> np.uint16:
    """Round a number to bfloat16, nearest even; a NaN stays a NaN."""
    bits = int(np.float32(value).view(np.uint32))
    if np.isnan(value):
        return np.uint16(0x7FC0)
    return np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


def bits_to_float(bits: np.uint16) -> float:
    """The exact value of a bfloat16."""
    return float(np.uint32(int(bits) << 16).view(np.float32))


def widened(bits: NDArray[Any]) -> NDArray[np.float32]:
    """The values of an array of bfloat16 bits (``uint16``), exact in float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
