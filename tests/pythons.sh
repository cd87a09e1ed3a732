#!/bin/sh
# What needs no torch works on the oldest and the newest Python: imports, preview, plan, dry run, the tests of schedule and plan.
# Each has an environment of its own, without torch. An interpreter that is not on this machine is named, and left out.
#
#   PYTHON_BIN=.venv/bin/python sh tests/pythons.sh [VERSION ...]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT

interpreter() { # of version $1; nothing: there is none
    for python in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if "$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
            echo "$python"
            return
        fi
    done
}

check() ( # all of it with interpreter $1, in folder $2
    set -eu
    "$1" -m venv --without-pip "$2/venv"
    python="$2/venv/bin/python"
    # shellcheck disable=SC2046 # one requirement a word
    "$PYTHON_BIN" -m pip --python "$python" install --quiet --disable-pip-version-check --no-compile pytest hypothesis psutil \
        $("$PYTHON_BIN" -c "
import tomllib
found = tomllib.load(open('$root/pyproject.toml', 'rb'))['project']['dependencies']
print(*(one for one in found if not one.startswith('torch')))")
    cd "$2"
    export PYTHONPATH="$root" WANDB_ERROR_REPORTING=false
    "$python" - <<'EOF'
import importlib, pkgutil
import apt_launch, apt_model

loaded, wanting = [], []
for package in (apt_model, apt_launch):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            loaded.append(importlib.import_module(module.name))
        except ModuleNotFoundError as error:
            if error.name.partition(".")[0] not in ("torch", "lightning", "transformers", "datasets", "tokenizers"):
                raise
            wanting.append(module.name)
assert len(loaded) > len(wanting), wanting
print(f"{len(loaded)} modules load without torch, {len(wanting)} want it")
EOF
    "$python" -m apt_launch.preview --out out >preview.txt
    test -s out/preview.png
    "$python" -m apt_launch --dry-run schedule.route_temp.end=0.6 >>preview.txt
    "$python" -m apt_launch --multirun --dry-run schedule.route_temp.end=0.6,0.8 seed=0,0 >plan.txt
    grep -q "4 asked, 2 unique" plan.txt
    "$python" -m apt_launch --help >help.txt
    cd "$root"
    "$python" -m pytest -p no:cacheprovider tests/schedule tests/launch/test_plan.py -k "schedule or grammar or alone or reads_back"
)

for version in "${@:-3.10 3.13}"; do set -- $version; done # the default is two words
running=
for version in "$@"; do
    python=$(interpreter "$version")
    if [ -z "$python" ]; then
        echo "Python $version: SKIPPED, for there is no such interpreter here"
        continue
    fi
    mkdir "$here/$version"
    check "$python" "$here/$version" >"$here/$version/log" 2>&1 &
    running="$running $version=$!"
done
failed=0
for one in $running; do
    version=${one%=*}
    if wait "${one#*=}"; then
        echo "Python $version: works without torch ($(grep "modules load" "$here/$version/log"))"
    else
        failed=1
        echo "Python $version: FAILED"
        cat "$here/$version/log" "$here/$version"/*.txt 2>/dev/null || true
    fi
done
exit $failed
