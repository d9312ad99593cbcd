#!/bin/sh
# Resolve all extras for every platform and Python into constraints.txt. Versions that still fit are kept.
# `UPGRADE=1 make lock` takes the newest of everything.
#
# A machine's own configuration stays out of the resolution, and the --no-emit flags keep hosts and paths out of the file:
# it holds names, versions and markers only. Extras are stripped because pip takes none in constraints.
set -eu

if ! command -v uv >/dev/null 2>&1; then
    echo "make lock needs uv: install it and run make lock again." >&2
    exit 1
fi

uv pip compile pyproject.toml --quiet --no-config --universal --all-extras --python-version 3.11 \
    --no-header --no-annotate --strip-extras --no-emit-index-url --no-emit-find-links \
    ${UPGRADE:+--upgrade} --output-file constraints.txt
