#!/bin/sh
# Measures the GPU at hand, in parts of at most nine minutes. Every result names the card, in "machine".
#
#     [PYTHON=.venv/bin/python] [VLLM_PYTHON=PATH] [OUT=results] benchmarks/gpu.sh [PART...]      (default: all parts)
#
# kernels      one layer's scan, state update and attention
# decode-128   the paper's speed table beside vLLM, whole batches: the shapes of M1-3B and of Llama-3.2-3B, random weights
# decode-256   its larger batches
# decode-512
# decode-long  its longer samples: steps timed at five contexts in each engine (`m1 bench decode --help`)
# decode-peer  transformers' generate, with a static cache, at two cells
# jobs         512 prompts of 128 tokens, 256 new tokens each, at two shapes, beside vLLM
# samples      16 samples of one prompt of 64 to 4,096 tokens
# lengths      512 prompts, with new tokens drawn from those of real reasoning traces (trace_lengths.jsonl)
#
# vLLM runs under VLLM_PYTHON, else under PYTHON if that has it, else it is left out. Earlier results are replaced.
set -e
cd "$(dirname "$0")/.."
out=${OUT:-results}
m1() { "${PYTHON:-python}" -m m1 "$@" | grep -v '^{'; } # the last line is the result, which --out writes
on_gpu() { m1 bench "$@" --device cuda --dtype bfloat16 ${VLLM_PYTHON:+--vllm-python "$VLLM_PYTHON"}; }
decode() { on_gpu decode --shape m1-3b --prompt 256 --repeats 1 "$@"; }
jobs() { on_gpu jobs "$@"; }

for part in ${*:-kernels decode-128 decode-256 decode-512 decode-long decode-peer jobs samples lengths}; do
  case $part in
  kernels)
    for kernel in scan state attention; do
      m1 bench $kernel --device cuda --dtype bfloat16 --out "$out/gpu-$kernel.json"
    done
    ;;
  decode-128)
    decode --cells 8x4096,16x4096,32x4096,64x4096,128x4096 --out "$out/gpu-decode-128.json"
    ;;
  decode-256 | decode-512)
    batch=${part#decode-}
    decode --cells "${batch}x4096" --out "$out/gpu-decode-$batch.json"
    ;;
  decode-long)
    decode --contexts 5 --cells 128x8192,128x16384,128x20480 --out "$out/gpu-decode-long.json"
    ;;
  decode-peer)
    decode --engines ours-hybrid,ours-transformer,transformers --cells 8x512,64x512 --out "$out/gpu-decode-peer.json"
    ;;
  jobs)
    for shape in smollm2-135m m1-3b; do
      jobs --shape $shape --jobs 512x128x1x256 --out "$out/gpu-jobs-$shape.json"
    done
    ;;
  samples)
    jobs --shape m1-3b --jobs 1x64x16x64,1x512x16x64,1x4096x16x64 --out "$out/gpu-samples.json"
    ;;
  lengths)
    jobs --shape m1-3b --engines ours-hybrid,vllm --jobs 512x128x1x32768 --repeats 1 \
      --lengths benchmarks/trace_lengths.jsonl --out "$out/gpu-lengths.json"
    ;;
  *)
    echo "no part $part: the parts are named at the top of this file" >&2
    exit 2
    ;;
  esac
done
