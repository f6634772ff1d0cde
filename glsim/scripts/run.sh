#!/usr/bin/env bash
# Trains one model on one data set, as the paper does:
#     ./scripts/run.sh --dataset_name cub --lr 0.003 --run           once
#     ./scripts/run.sh --dataset_name cub --run_lr                   with each learning rate, on train, selected on val
#     ./scripts/run.sh --dataset_name cub --lr 0.003 --run_seed      with each seed
# Further: --model_name NAME [vit_b16 with GLSim] (flags may follow the name, in the same quotes), --is_448, --weak_augs,
# --ls, --sd, --serial N, --seed N, --device N (a GPU), --dry-run (print the commands alone).
# What follows -- goes to every tools/train.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

modes=() more=() augs=medaugs dry=false
serial=1 seed=1 lr=0.003 dataset=cub
model="vit_b16 --classifier cls --cfg_method configs/methods/glsim.yaml"
while (($#)); do
    case $1 in
        --run | --run_lr | --run_seed) modes+=("$1") ;;
        --is_448) more+=(--image_size 448) ;;
        --weak_augs) augs=weakaugs ;;
        --ls) more+=(--ls) ;;
        --sd) more+=(--sd 0.1) ;;
        --dry-run) dry=true ;;
        --serial) serial=${2:?}; shift ;;
        --seed) seed=${2:?}; shift ;;
        --lr) lr=${2:?}; shift ;;
        --dataset_name) dataset=${2:?}; shift ;;
        --model_name) model=${2:?}; shift ;;
        --device) export CUDA_VISIBLE_DEVICES=${2:?}; shift ;;
        --) more+=("${@:2}"); break ;;
        *) echo "error: there is no flag $1: $0 says in its first lines which there are" >&2; exit 2 ;;
    esac
    shift
done

# train SEED LR [FLAG ...]: prints the command and starts it.
train() {
    local words=(--serial "$serial" --cfg "configs/${dataset}_ft_is224_$augs.yaml" --seed "$1" --lr "$2")
    read -ra named <<<"$model"
    words+=(--model_name "${named[@]}" "${more[@]}" "${@:3}")
    echo "python tools/train.py ${words[*]}"
    $dry || "${PYTHON:-python}" tools/train.py "${words[@]}"
}

((${#modes[@]})) || { echo "error: say --run, --run_lr or --run_seed" >&2; exit 2; }
for mode in "${modes[@]}"; do
    case $mode in
        --run) train "$seed" "$lr" ;;
        --run_lr) for rate in 0.03 0.01 0.003 0.001; do train "$seed" "$rate" --train_trainval; done ;;
        --run_seed) for each in 1 10 100; do train "$each" "$lr"; done ;;
    esac
done
