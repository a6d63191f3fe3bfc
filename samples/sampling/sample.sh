#!/bin/sh
# Draws every prompt of a list at three strengths of an adapter, in two processes:
#   sh samples/sampling/sample.sh outputs/demo/adapter.safetensors outputs/strengths
set -eu
here=$(dirname "$0")
# With GPUs, each process takes one. --multi_gpu makes accelerate start several processes on a machine without any, too.
accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
    -m svft_diffusion sample \
    --adapter "$1" --weights 0 0.5 1 --prompts "$here/prompts.txt" --num_inference_steps 10 --output_dir "$2"
