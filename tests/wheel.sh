#!/bin/sh
# Build the wheel, install it into an environment of its own, and run it from a folder that knows nothing of the checkout.
set -eu
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
export OMP_NUM_THREADS=1 # the gate has tests beside it: threads that wait for each other would spin, for minutes
"$PYTHON_BIN" -m build --wheel --no-isolation --outdir "$here/dist" . >"$here/build.log" 2>&1 || { cat "$here/build.log"; exit 1; }
"$PYTHON_BIN" -m tests.wheel "$here"/dist/*.whl "$here/venv"
mkdir "$here/elsewhere"
cd "$here/elsewhere"
"$here/venv/bin/python" -m apt_launch profile=tiny_debug trainer.max_batches_per_epoch=20 hydra.run.dir=run
test -s run/metrics.jsonl
"$here/venv/bin/apt-launch" +sweeps=route_temp --cfg job >/dev/null
echo "the wheel runs from another folder"
