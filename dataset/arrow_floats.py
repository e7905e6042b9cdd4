"""Numbers of 32 and 16 bits in Parquet and Arrow files, as their writer wrote them.

Python has numbers of 64 bits alone, in which the 0.1 of a float32 is 0.10000000149011612. What a
model is to read is 0.1: the shortest decimal that is this float32.
"""

import math


def has_short_floats(kind) -> bool:
    """True if values of a type of Arrow are, or hold, numbers of 32 or 16 bits."""
    import pyarrow

    if pyarrow.types.is_float32(kind) or pyarrow.types.is_float16(kind):
        return True
    return any(has_short_floats(kind.field(i).type) for i in range(kind.num_fields))


def with_short_floats(value: object, kind) -> object:
    """Returns a value of a type of Arrow, as Python has it, with each number of 32 or 16 bits as the
    shortest decimal that is this number."""
    import numpy as np
    import pyarrow

    if value is None:
        return None
    if isinstance(value, float):
        if pyarrow.types.is_float32(kind):
            return float(str(np.float32(value))) if math.isfinite(value) else value
        if pyarrow.types.is_float16(kind):
            return float(str(np.float16(value))) if math.isfinite(value) else value
        return value
    # A map comes as a list of pairs, whose type is that of its one field.
    if isinstance(value, tuple) and kind.num_fields == len(value):
        types = [kind.field(i).type for i in range(kind.num_fields)]
        return tuple(map(with_short_floats, value, types))
    if isinstance(value, list) and kind.num_fields == 1:
        return [with_short_floats(each, kind.field(0).type) for each in value]
    if isinstance(value, dict):
        types = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return {key: with_short_floats(each, types[key]) for key, each in value.items()}
    return value
