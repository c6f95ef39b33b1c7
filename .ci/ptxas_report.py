"""Reads the output of ``ptxas -v``; prints the registers of each kernel for one architecture and refuses spills."""

import re
import subprocess
import sys

architecture = sys.argv[1]
text = subprocess.run(["c++filt"], input=sys.stdin.read(), capture_output=True, text=True, check=True).stdout
_, *reports = text.split("Compiling entry function ")
kernels, spilling = 0, 0
for report in reports:
    signature, arch = re.match(r"'(.+)' for '(sm_\w+)'", report).groups()
    name = re.sub(r"\(anonymous namespace\)::|ssd_ext::|^void ", "", signature).split("(")[0]
    registers = re.search(r"Used (\d+) registers", report)[1]
    spills = [int(size) for size in re.findall(r"(\d+) bytes spill", report)]  # of the kernel and what it calls
    if not spills:
        sys.exit(f"no word of spills in this report: {report}")
    if arch == architecture:
        kernels += 1
        spilling += any(spills)
        print(f"{registers:>4} registers  {name}")
    if any(spills):
        print(f"     SPILLS {sum(spills)} bytes on {arch}: {name}")
if not kernels:
    sys.exit(f"no kernel was compiled for {architecture}")
print(f"{kernels} kernels on {architecture}, {spilling} spill; {len(reports)} with the other architectures")
sys.exit(spilling > 0)
