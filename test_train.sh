#!/bin/sh
# The whole job on the shipped base: sets up the environment if need be, trains the quickstart concept, scores it,
# and says where the pictures, the scores and the files are. Arguments go to train.py (--runtime.seed 1, say).
set -eu
cd "$(dirname "$0")"
./setup.sh

n=1
while [ -e "runs/quickstart-$n" ]; do n=$((n + 1)); done
run="runs/quickstart-$n"

.venv/bin/python train.py presets/quickstart.json --runtime.out runs --runtime.name "quickstart-$n" "$@"
.venv/bin/python -m testbed score "$run"

echo
echo "grid:    $run/samples/grid.png"
echo "scores:  $run/scores.json"
echo "report:  $run/report.html"
echo "files:   $run/export"
echo
echo "This was one seed. Three of each method: .venv/bin/python -m bench.quality (ours: bench/results/quality.json)"
