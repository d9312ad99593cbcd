#!/bin/sh
# Make the project's environment: [PYTHON=3.13] scripts/venv.sh DIR DATA_REQUIREMENT
#
# uv makes it where uv is installed, a Python of at least 3.11 with its own venv module elsewhere, whose pip installs a
# uv for the rest. What is installed is pinned by constraints.txt either way.
set -eu

venv=$1
data=$2
least="3.11"
# The uv that pip installs where there is none.
uv_version="0.13.8"

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' >/dev/null 2>&1
}

can_make_environments() {
    is_new_enough "$1" && "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

# The first Python on the PATH that holds: $1 is the name of a test. The plain names come last: `python3` is often an
# older one.
find_python() {
    names="python3.11 python3.12 python3.13 python3.14 python3 python"
    for name in ${PYTHON:+"python$PYTHON"} ${PYTHON:-$names}; do
        if command -v "$name" >/dev/null 2>&1 && "$1" "$name"; then
            command -v "$name"
            return 0
        fi
    done
    return 1
}

has_uv() {
    command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1
}

# An environment whose Python is gone or too old (a pyenv that was removed, a checkout that was moved) is made anew.
if [ -e "$venv" ] && ! is_new_enough "$venv/bin/python"; then
    echo "The Python of $venv is missing or older than $least: making it anew." >&2
    rm -rf "$venv"
fi

# Install all into the environment with a uv: $1 is the program.
install_with_uv() {
    "$1" pip install --quiet --python "$venv/bin/python" --constraints constraints.txt --editable ./debian_extension --editable ".[dev]" &&
        "$1" pip install --quiet --python "$venv/bin/python" --no-deps "$data"
}

pip() {
    "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"
}

if has_uv; then
    if [ ! -e "$venv" ]; then
        # uv fetches one when the machine has none.
        if [ -n "${PYTHON:-}" ] || ! uv venv --quiet --python 3.11 "$venv" 2>/dev/null; then
            uv venv --quiet --python "${PYTHON:->=$least}" "$venv"
        fi
    fi
    echo "Installing into $venv with uv (constraints.txt) ..."
    install_with_uv uv
elif [ -x "$venv/bin/python" ] || python=$(find_python can_make_environments || find_python is_new_enough); then
    if [ ! -e "$venv" ] && ! "$python" -m venv "$venv"; then
        rm -rf "$venv"
        echo "$python cannot make an environment: install its venv module (on Debian and Ubuntu: apt-get install python3-venv), or uv." >&2
        exit 1
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        "$venv/bin/python" -m ensurepip >/dev/null
    fi
    # pip takes minutes for what uv does in a quarter of the time, so pip installs uv first. There is no uv for every
    # machine, and it reads none of pip's settings (an index of a company's own, say): pip does it all where it cannot.
    echo "Installing into $venv with a uv that pip installs there (constraints.txt) ..."
    if ! { pip install "uv==$uv_version" && install_with_uv "$venv/bin/uv"; }; then
        echo "That uv could not: installing with pip, which takes a few minutes ..." >&2
        pip install --constraint constraints.txt --editable ./debian_extension --editable ".[dev]"
        pip install --use-pep517 --no-deps "$data"
    fi
else
    echo "This needs uv or a Python ${PYTHON:-of at least $least}, and neither is on the PATH: install one of them and run make again." >&2
    exit 1
fi
