#!/usr/bin/env bash
# Writes the csv files of NCFM from what Kaggle's train.zip unpacks to in data/ncfm: train/<fish>/<image>.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -d data/ncfm/train && ! -e data/ncfm/data ]]; then
    mv data/ncfm/train data/ncfm/data
fi
exec "${PYTHON:-python}" tools/preprocess/custom_datasets.py --dataset_name ncfm
