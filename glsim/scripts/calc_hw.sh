#!/usr/bin/env bash
# Prints the sizes of the images of every data set that is there, or of those named:
#     ./scripts/calc_hw.sh [--dataset_name cub [--dataset_root_path DIR]]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" tools/preprocess/calc_hw.py "$@"
