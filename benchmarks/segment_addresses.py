"""Which way the driver hands out segments: planner/allocator.py takes falling addresses. Needs a GPU and two seconds.

python -m benchmarks.segment_addresses
"""

from __future__ import annotations

import itertools

SIZES_MIB = (20, 20, 64, 448, 448, 1000, 2000, 2000, 22, 20)


def main() -> int:
    """Make one tensor per segment and print where each lies from the one before; 0 if every step falls."""
    import torch

    kept = [torch.empty(mib << 20, dtype=torch.uint8, device="cuda") for mib in SIZES_MIB]
    addresses = [tensor.data_ptr() for tensor in kept]
    steps = [after - before for before, after in itertools.pairwise(addresses)]
    for mib, address, step in zip(SIZES_MIB[1:], addresses[1:], steps, strict=True):
        print(f"{mib:5d} MiB at {address:#x}: {step / 2**20:+.0f} MiB from the one before")
    return 0 if all(step < 0 for step in steps) else 1


if __name__ == "__main__":
    raise SystemExit(main())
