"""Random numbers that follow from a seed for each token, and not from the state of a generator.

A number is a hash of its token's seed and its column, as in counter-based generators (Salmon et al.
2011). So it is the same on whichever rank and in whichever batch a token is computed, and again
when a run is resumed. On CPUs and GPUs the numbers are the same to the bit.
"""

import torch
from torch import Tensor

# The adapters' dropout hashes the same seeds (lora.seeded_dropout). With this in between, the first
# digits of pi's fraction in hexadecimal, the two have nothing in common, whatever the layer.
NOISE_STREAM = 0x243F6A88


def seeded_uniform(seeds: Tensor, columns: int) -> Tensor:
    """Returns numbers that are uniform in (-1, 1), float32 [tokens, columns].

    seeds: int64 [tokens]. All of their bits count.
    """
    high = (seeds >> 32).to(torch.int32)
    low = seeds.to(torch.int32)
    rows = hash_int32(hash_int32(high ^ NOISE_STREAM) ^ low)  # [tokens]
    column_hashes = hash_int32(torch.arange(columns, dtype=torch.int32, device=seeds.device))
    # Evenly spread over all int32 numbers, [tokens, columns].
    numbers = hash_int32(rows[:, None] ^ column_hashes)
    # float32 holds 24 bits and the half exactly. The half makes them symmetric about 0.
    upper_bits = numbers >> 8
    return (upper_bits.float() + 0.5) * 2.0**-23


def hash_int32(x: Tensor) -> Tensor:
    """Hashes int32 to int32, so that each bit of the result depends on all bits of x.

    Multiplications by odd numbers, of which torch drops the carry, alternate with shifts to the
    right, as in MurmurHash3's last lines (Appleby 2011).
    """
    # 0x85EBCA6B and 0xC2B2AE35, as signed numbers.
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        # The mask makes the shift unsigned.
        unsigned_mask = (1 << (32 - shift)) - 1
        x = (x ^ ((x >> shift) & unsigned_mask)) * factor
    return x ^ ((x >> 16) & 0xFFFF)
