#!/bin/sh
# environment.sh PYTHON FOLDER: make a virtual environment; on Debian and Ubuntu get what that takes, where that is allowed.
set -eu
python=$1 folder=$2

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "$python is not Python 3.10 or newer. Name one that is: make PYTHON=python3.12 ..." >&2
    exit 2
fi
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq python3-venv
    else
        echo "$python cannot make a virtual environment. On Debian or Ubuntu: sudo apt-get install python3-venv" >&2
        exit 2
    fi
fi
rm -rf "$folder"
exec "$python" -m venv "$folder"
