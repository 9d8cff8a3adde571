"""The content of an Arrow column by its type alone, and its values as numpy's.

A column is an array of numbers if its items are numbers, or lists of one length, nested or not.  An *extension type*
gives its storage a meaning, so its storage is not its value.  These are known, and a column of any other is not read::

    arrow.fixed_shape_tensor                   a tensor of a shape, its axes possibly permuted
    arrow.bool8                                a byte that is true if it is not 0
    datasets.features.features.Array2D...      nested lists, which are its value
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actshuffle.errors import SourceError
from actshuffle.extras import need

_NAME = b"ARROW:extension:name"  # in the metadata of a field whose extension type is not registered here
_DATASETS = re.compile(r"datasets\.features\.features\.Array[2-5]DExtensionType")


class Layout(NamedTuple):
    """How the items of a column lie in their storage.

    ``sizes`` are those of its nested lists, from the outside, None where lists of any length may stand; ``shape`` and
    ``axes`` are the shape of a tensor in storage, and which of its axes is which of an item, both empty for lists.
    """

    dtype: str  # numpy's name, little-endian
    sizes: tuple[int | None, ...]
    shape: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()

    @property
    def item_shape(self) -> tuple[int | None, ...]:
        return tuple(self.shape[axis] for axis in self.axes) if self.shape else self.sizes


def layout_of(field: Any) -> Layout | str:
    """The layout of a field of a schema; or what it holds, if that is not numbers."""
    kind, name = _unwrapped(field)
    sizes: list[int | None] = []
    types = need("pyarrow", "import").types
    shape: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    if name == "arrow.fixed_shape_tensor" and hasattr(field.type, "permutation"):
        shape = tuple(field.type.shape)
        axes = tuple(field.type.permutation or range(len(shape)))
        if any(axes[axis] != n for n, axis in enumerate(axes)):
            return (
                f"tensors with the permutation {list(axes)}, which pyarrow writes the other way round than the format "
                "says; write them without one"
            )
    elif name and name != "arrow.bool8" and not _DATASETS.fullmatch(name):
        return f"extension type {name}, whose values are not known here"
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        sizes.append(kind.list_size if types.is_fixed_size_list(kind) else None)
        kind, inner = _unwrapped(kind.value_field)
        if inner:
            return f"lists of extension type {inner}, whose values are not known here"
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        return str(field.type)
    dtype = np.dtype("?") if name == "arrow.bool8" else np.dtype(kind.to_pandas_dtype())
    return Layout(dtype.newbyteorder("<").str, tuple(sizes), shape, axes)


def _unwrapped(field: Any) -> tuple[Any, str]:
    """The storage type of a field, and the name of its extension type or nothing."""
    if isinstance(field.type, need("pyarrow", "import").BaseExtensionType):
        return field.type.storage_type, field.type.extension_name
    return field.type, (field.metadata or {}).get(_NAME, b"").decode()


def numbers_of(values: Any, layout: Layout, where: str) -> NDArray[Any]:
    """The values of a column, an Arrow array, as ``(count, *item shape)``."""
    pa, compute = need("pyarrow", "import"), need("pyarrow.compute", "import")
    count = len(values)
    sizes: list[int] = []
    values = values.storage if isinstance(values, pa.ExtensionArray) else values
    for size in (*layout.sizes, None):
        if values.null_count:
            raise SourceError(f"column {where} has {values.null_count:,} missing values")
        if len(sizes) == len(layout.sizes):
            break
        if size is None:
            lengths = compute.min_max(compute.list_value_length(values)).as_py()
            if lengths["min"] != lengths["max"]:
                raise SourceError(
                    f"mixed widths: lists of column {where} have from {lengths['min']:,} to {lengths['max']:,} values"
                )
            size = lengths["max"] or 0
        sizes.append(size)
        values = values.flatten()
    data: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    data = data.reshape(count, *(layout.shape or sizes))
    if layout.axes:
        data = data.transpose(0, *(axis + 1 for axis in layout.axes))
    return data != 0 if layout.dtype == "|b1" and data.dtype != np.bool_ else data
