#!/bin/sh
# On a machine with a GPU: tests marked gpu, the benchmarks and runs; five minutes each at most. Ends with 1 if one of them failed.
# From the repository's root: sh tests/bench/on_gpu.sh [FOLDER]; FOLDER (build/gpu) gets what each of them prints.
set -u
python=${PYTHON:-python}
folder=${1:-build/gpu}
failed=""
export COLUMNS=160 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # installed or not
mkdir -p "$folder"

step() { # NAME COMMAND ...
    name=$1
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    began=$(date +%s)
    timeout ${LIMIT:-300} "$@" >"$folder/$name.txt" 2>&1 || failed="$failed $name"
    cat "$folder/$name.txt"
    printf '== %s took %s s\n' "$name" "$(($(date +%s) - began))"
}

{
    date -u '+%Y-%m-%d %H:%M UTC'
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
} 2>&1 | tee "$folder/machine.txt"

step tests "$python" -m pytest -m gpu --tb=short
step moe "$python" -m tests.bench.bench_moe --device cuda
step gpt "$python" -m tests.bench.bench_gpt --device cuda
step metrics "$python" -m tests.bench.bench_metrics trainer.device=cuda trainer.batch_size=32 \
    model.d_model=768 model.num_layers=12 model.num_heads=12 model.d_ff=1536 model.seq_len=1024
rm -rf "$folder/run" "$folder/run_compiled"
step compiled "$python" -m apt_launch schedule=gpt5_moe trainer.device=cuda trainer.compile=true logger=none \
    hydra.run.dir="$folder/run_compiled"
step run "$python" -m apt_launch schedule=gpt5_moe trainer.device=cuda logger=none hydra.run.dir="$folder/run"

[ -z "$failed" ] || {
    printf '\nfailed:%s\n' "$failed"
    exit 1
}
