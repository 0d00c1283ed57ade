#!/usr/bin/env bash
# BERT-base, or any BERT in a folder, to 50 million parameters: compressed and healed on unlabelled text, then fine-tuned and
# scored on SST-2 and MRPC beside its original.
#
#   runs/bert_base.sh MODEL TEXT DATA [OUTPUT]
#
# MODEL: folder or hub id (bert-base-uncased); TEXT: a text file, one sentence a line; DATA: a folder with sst2/ and mrpc/.
# BUDGET, HEAL, MORE (other options of hpr compress) and STEPS (of fine-tuning; -1 for whole epochs) may be set in the environment.
set -euo pipefail
model=${1:?a folder or hub id} text=${2:?a text file} data=${3:?a folder with sst2/ and mrpc/} output=${4:-out/bert-base}
budget=${BUDGET:-50M} heal=${HEAL:-2h} steps=${STEPS:--1}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [ ! -f "$output/plan.json" ]; then
  hpr compress "$model" --budget "$budget" --data "$text" --heal "$heal" --output "$output" ${MORE:-}
fi
hpr eval "$output" --teacher "$model"
python "$here/glue.py" sst2 --data "$data/sst2" --steps "$steps" "$model" "$output"
python "$here/glue.py" mrpc --data "$data/mrpc" --steps "$steps" --epochs 5 "$model" "$output"
