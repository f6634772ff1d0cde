#!/usr/bin/env bash
# Writes the csv files of every data set that is there, or of those named:
#     ./prepare_datasets.sh [--dataset_name cub [--dataset_root_path DIR]]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec "${PYTHON:-python}" tools/preprocess/custom_datasets.py "$@"
