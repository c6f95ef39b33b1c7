"""Shows that the sanitizers see into torch's memory and our kernels: each planted fault must stop the process."""

import ctypes
import subprocess
import sys

import torch

ROWS = 8
library = ctypes.CDLL(sys.argv[1])


def encode(rows, priors, deltas):
    """Run the kernel on ``ROWS`` rows of buffers that may be too short for them."""
    tensors = [torch.rand(n, 4) for n in (rows, priors, deltas)]
    library.encode_rows(*(ctypes.c_void_p(t.data_ptr()) for t in tensors), ctypes.c_int64(ROWS))


RUNS = {
    "no fault": (lambda: encode(ROWS, ROWS, ROWS), None),
    "reads a row too many": (lambda: encode(ROWS - 1, ROWS, ROWS), "ERROR: AddressSanitizer"),
    "reads a prior too many": (lambda: encode(ROWS, ROWS - 1, ROWS), "ERROR: AddressSanitizer"),
    "writes a row too many": (lambda: encode(ROWS, ROWS, ROWS - 1), "ERROR: AddressSanitizer"),
    "signed overflow": (lambda: library.successor(2**31 - 1), "runtime error: signed integer overflow"),
}

if len(sys.argv) > 2:
    RUNS[sys.argv[2]][0]()
    sys.exit()
for name, (_, expected) in RUNS.items():
    run = subprocess.run([sys.executable, __file__, sys.argv[1], name], capture_output=True, text=True)
    as_expected = run.returncode != 0 and expected in run.stderr if expected else run.returncode == 0
    print(f"planted: {name}: {'as expected' if as_expected else 'NOT NOTICED'}")
    if not as_expected:
        sys.exit(run.stderr or "no report")
