#!/usr/bin/env bash
# Downloads the authors' checkpoints to ckpts/: ViT B-16 with GLSim, trained on CUB, DAFB, iNaturalist 2017 and NABirds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/fetch.sh

host=https://huggingface.co/NYCU-PCSxNTHU-MIS/GLSim/resolve/main
fetch "$host/cub_vit_b16_16_2.pth" ckpts/cub_glsim_224.pth
fetch "$host/dafb_vit_b16_16_2.pth" ckpts/dafb_glsim.pth
fetch "$host/inat17_vit_b16_16_2.pth" ckpts/inat_glsim.pth
fetch "$host/nabirds_vit_b16_16_2.pth" ckpts/nabirds_glsim.pth
