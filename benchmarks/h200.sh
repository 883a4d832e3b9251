#!/bin/sh
# The paper's speed table, measured on the GPU at hand in about ten minutes: the kernels, and decoding with the weights'
# shapes of M1-3B and of Llama-3.2-3B, random, in this engine; transformers' generate, with a static cache, at two cells.
#
#     PYTHON=.venv/bin/python benchmarks/h200.sh [RESULTS_FOLDER]
#
# Long cells are not decoded whole: steps are timed at CONTEXTS contexts (`m1 bench decode --help`).
# Results of an earlier run are replaced.
set -e
cd "$(dirname "$0")/.."
out=${1:-results}
rm -f "$out/h200-decode.png" # an existing plot would be refused
m1() { "${PYTHON:-python}" -c 'from m1.cli import main; main()' "$@"; }
decode() { m1 bench decode --device cuda --shape m1-3b --dtype bfloat16 --prompt 256 --repeats 1 "$@"; }

for kernel in scan state attention; do
  m1 bench $kernel --device cuda --dtype bfloat16 --out "$out/h200-$kernel.json" >/dev/null
done
decode --engines ours-hybrid,ours-transformer --contexts "${CONTEXTS:-5}" \
  --cells 8x4096,16x4096,32x4096,64x4096,128x4096,256x4096,512x4096,128x8192,128x16384,128x20480 \
  --out "$out/h200-decode.json" --plot "$out/h200-decode.png" | grep -v '^{'
decode --engines ours-hybrid,ours-transformer,transformers --cells 8x512,64x512 --out "$out/h200-peer.json" | grep -v '^{'
