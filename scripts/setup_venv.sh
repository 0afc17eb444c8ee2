#!/bin/sh
# Makes .venv if it is missing or broken and installs the project into it, editable.
#
#   setup_venv.sh EXTRAS [PYTHON]     e.g. setup_venv.sh dev,cuda13 python3.13
#
# Without PYTHON an environment that works is kept, whatever interpreter made it.
set -eu
cd "$(dirname "$0")/.."
extras=$1
wanted=${2:-}

runs='import pip, sys; sys.exit(sys.version_info < (3, 12))'
base='import os, sys; print(os.path.realpath(sys.executable))'
fresh=no
.venv/bin/python -c "$runs" >/dev/null 2>&1 </dev/null || fresh=yes
if [ -n "$wanted" ]; then
    wanted=$(sh scripts/find_python.sh "$wanted")
    [ $fresh = yes ] || [ "$(.venv/bin/python -c "$base")" = "$("$wanted" -c "$base")" ] || fresh=yes
fi
if [ $fresh = yes ]; then
    [ -n "$wanted" ] || wanted=$(sh scripts/find_python.sh)
    echo "Setting up .venv with $wanted ($("$wanted" --version))"
    "$wanted" -m venv --clear .venv
fi
echo "Installing jaxpaged[$extras] into .venv (the first time takes a few minutes)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input -e ".[$extras]" </dev/null
