#!/bin/sh
# The same with Hydra 1.4 and its OmegaConf, in a folder before those of the environment: composing, plugins, security, any program.
#
#   PYTHON_BIN=.venv/bin/python sh tests/hydra14.sh
set -eu
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
"$PYTHON_BIN" -m pip install --quiet --disable-pip-version-check --no-deps --pre --target "$here" \
    "hydra-core==1.4.0rc3" "omegaconf==2.4.1rc1"
export PYTHONPATH="$here"
"$PYTHON_BIN" -W error -m apt_launch --cfg job >/dev/null # nothing of it will break in 1.5
"$PYTHON_BIN" -m pytest -p no:cacheprovider tests/sweep/test_programs.py tests/sweep/test_any_program.py tests/config/test_guard.py
"$PYTHON_BIN" -m pytest -p no:cacheprovider tests/launch/test_plan.py -k "grammar or alone or reads_back or ones_own"
"$PYTHON_BIN" -m pytest -p no:cacheprovider tests/reliability/test_security.py -k "hostile and removal"
