#!/bin/sh
# The whole job on the shipped base: sets up the environment if need be, trains the quickstart concept, scores it,
# and says where the pictures, the scores and the files are. Arguments go to train.py (--runtime.seed 1, say).
#   ./test_train.sh --cog      the same concept through Cog's real server, without Docker: trains, then draws
#   ./test_train.sh --docker   builds the image with cog, and does it in containers of it
set -eu
cd "$(dirname "$0")"

how="${1:-}"
if [ "$how" = --docker ]; then
    for needed in docker cog; do
        if ! command -v "$needed" >/dev/null 2>&1; then
            echo "test_train.sh: --docker needs $needed, which is not installed here; --cog does without both" >&2
            exit 2
        fi
    done
    if ! docker info >/dev/null 2>&1; then
        echo "test_train.sh: --docker needs a running Docker, and \`docker info\` fails; --cog does without it" >&2
        exit 2
    fi
fi
./setup.sh

n=1
while [ -e "runs/quickstart-$n" ]; do n=$((n + 1)); done
run="runs/quickstart-$n"

if [ "$how" = --cog ]; then
    shift
    exec .venv/bin/python -m bench.cog job "$run" "$@"
fi
if [ "$how" = --docker ]; then
    shift
    cog build -t tempera
    exec .venv/bin/python -m bench.cog job "$run" --docker tempera "$@"
fi

.venv/bin/python train.py presets/quickstart.json --runtime.out runs --runtime.name "quickstart-$n" "$@"
.venv/bin/python -m testbed score "$run"

echo
echo "grid:    $run/samples/grid.png"
echo "scores:  $run/scores.json"
echo "report:  $run/report.html"
echo "files:   $run/export"
echo
echo "This was one seed. Three of each method: .venv/bin/python -m bench.quality (ours: bench/results/quality.json)"
