#!/usr/bin/env bash
# Trains ViT B-16 and GLSim on one data set with the paper's three seeds:
#     ./scripts/run.sh cub --lr 0.01 [further flags of tools/train.py]
set -euo pipefail
dataset=${1:?name a data set, as configs/ has them: cub}
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for seed in 1 10 100; do
    words=(--cfg "configs/${dataset}_ft_is224_medaugs.yaml" --model_name vit_b16 --seed "$seed" --serial "$seed" "$@")
    "${PYTHON:-python}" tools/train.py "${words[@]}"
    "${PYTHON:-python}" tools/train.py "${words[@]}" --cfg_method configs/methods/glsim.yaml
done
