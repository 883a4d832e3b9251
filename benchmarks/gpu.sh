#!/bin/sh
# Measures the GPU at hand, in parts of at most nine minutes. Every result names the card, in "machine".
#
#     [PYTHON=.venv/bin/python] [VLLM_PYTHON=PATH] [OUT=results] benchmarks/gpu.sh [PART...]      (default: all parts)
#
# kernels      one layer's scan, state update and attention
# decode       the paper's speed table: the weights' shapes of M1-3B and of Llama-3.2-3B, random, in this engine.
#              Steps are timed at CONTEXTS contexts, because long cells take too long (`m1 bench decode --help`).
# decode-peer  transformers' generate, with a static cache, and vLLM at two cells
# jobs         512 prompts of 128 tokens, 256 new tokens each, at two shapes, beside vLLM
# samples      16 samples of one prompt of 64 to 4,096 tokens
# lengths      512 prompts, with new tokens drawn from those of real reasoning traces (trace_lengths.jsonl)
#
# vLLM runs under VLLM_PYTHON, else under PYTHON if that has it, else it is left out. Earlier results are replaced.
set -e
cd "$(dirname "$0")/.."
out=${OUT:-results}
m1() { "${PYTHON:-python}" -m m1 "$@" | grep -v '^{'; } # the last line is the result, which --out writes
decode() { m1 bench decode --device cuda --shape m1-3b --dtype bfloat16 --prompt 256 --repeats 1 "$@"; }
jobs() { m1 bench jobs --device cuda --dtype bfloat16 ${VLLM_PYTHON:+--vllm-python "$VLLM_PYTHON"} "$@"; }

for part in ${*:-kernels decode decode-peer jobs samples lengths}; do
  case $part in
  kernels)
    for kernel in scan state attention; do
      m1 bench $kernel --device cuda --dtype bfloat16 --out "$out/gpu-$kernel.json"
    done
    ;;
  decode)
    rm -f "$out/gpu-decode.png" # an existing plot would be refused
    decode --engines ours-hybrid,ours-transformer --contexts "${CONTEXTS:-5}" \
      --cells 8x4096,16x4096,32x4096,64x4096,128x4096,256x4096,512x4096,128x8192,128x16384,128x20480 \
      --out "$out/gpu-decode.json" --plot "$out/gpu-decode.png"
    ;;
  decode-peer)
    decode --engines ours-hybrid,ours-transformer,transformers,vllm --cells 8x512,64x512 \
      ${VLLM_PYTHON:+--vllm-python "$VLLM_PYTHON"} --out "$out/gpu-decode-peer.json"
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
    echo "no part $part: choose kernels, decode, decode-peer, jobs, samples or lengths" >&2
    exit 2
    ;;
  esac
done
