#!/bin/sh
# Prints the path of a Python 3.12 to 3.14 that really runs and can make virtual environments.
#
#   find_python.sh            looks on PATH, then under the pyenv root, else gets one through uv into .uv/
#   find_python.sh PYTHON     checks the given interpreter and uses no other
#
# A name on PATH proves nothing: a pyenv shim may exist and fail, a distribution may ship venv without ensurepip.
set -u

probe='
import ctypes, ensurepip, ssl, sys, sysconfig, venv, zlib
ok = (3, 12) <= sys.version_info[:2] <= (3, 14) and not sysconfig.get_config_var("Py_GIL_DISABLED")
sys.exit(0 if ok and sys.version_info.releaselevel == "final" else 3)'

works() {
    "$1" -c "$probe" </dev/null >/dev/null 2>&1
}

candidates() {
    printf '%s\n' ${PYTHON:+"$PYTHON"} python3.14 python3.13 python3.12 python3 python
    for root in "${PYENV_ROOT:-}" "$(pyenv root 2>/dev/null)" "${HOME:-}/.pyenv"; do
        [ -n "$root" ] && for minor in 14 13 12; do ls -d "$root"/versions/3.$minor.*/bin/python3 2>/dev/null; done
    done
    ls -d .uv/python/cpython-3.1[2-4]*/bin/python3 2>/dev/null
}

through_uv() {
    uv=$(command -v uv) || {
        echo "No Python 3.12 to 3.14 found; getting one through uv (into .uv/)" >&2
        { python3 -m venv .uv && .uv/bin/python -m pip install --quiet uv; } </dev/null >&2 ||
            python3 -m pip install --quiet --target .uv uv </dev/null >&2 || return 1
        uv=.uv/bin/uv
    }
    UV_PYTHON_INSTALL_DIR=$PWD/.uv/python UV_PYTHON_BIN_DIR=$PWD/.uv/bin "$uv" python install 3.12 </dev/null >&2
}

first_that_works() {
    candidates | while read -r python; do
        if works "$python"; then
            command -v "$python"
            break
        fi
    done
}

if [ $# -gt 0 ]; then
    works "$1" && command -v "$1" && exit 0
    echo "error: PYTHON=$1 is not a Python 3.12 to 3.14 with venv, ensurepip, ssl and ctypes" >&2
    echo "       it answers: $("$1" --version 2>&1 </dev/null | head -n 1)" >&2
    exit 1
fi

found=$(first_that_works)
[ -n "$found" ] || { through_uv && found=$(first_that_works); }
[ -n "$found" ] && echo "$found" && exit 0
cat >&2 <<'EOF'
error: no Python 3.12, 3.13 or 3.14 was found, and uv could not get one. Install one, for example with

    apt install python3.12 python3.12-venv      (Debian, Ubuntu)
    dnf install python3.12                      (Fedora)
    brew install python@3.13                    (macOS)
    pyenv install 3.13                          (anywhere)
    uv python install 3.13                      (anywhere)

and run make again, or name it: make PYTHON=/path/to/python3.13 ...
EOF
exit 1
