#!/bin/bash
# Everything that only a GPU can tell, in under 9 minutes and without a network:
#   tests/gpu_check/check.sh [--dry-run] [--full] [--limit SECONDS] [--out DIR] [STAGE...]
# The stages, by default all: facts build smoke profile cuda ncu sanitizer benchmark. See check.py.
set -euo pipefail

PYTHON=${PYTHON:-python3} # the one that holds torch
if ! command -v "$PYTHON" >/dev/null; then
  echo "gpu_check: no $PYTHON on PATH; set PYTHON to the Python that holds torch" >&2
  exit 2
fi
exec "$PYTHON" "$(dirname "$0")/check.py" "$@"
