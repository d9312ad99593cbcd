# What the findings share: a temporary folder with pinned public packages in it, and a comparison. Sourced, not run.

set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
chmod 755 "$folder"
trap 'rm -rf "$folder"' EXIT

# install PACKAGE==VERSION... [-c FILE]: into an environment of the folder's own.
install() {
    if command -v uv >/dev/null 2>&1; then
        uv venv --quiet --python "${PYTHON:-3.11}" "$folder/env"
        uv pip install --quiet --python "$folder/env/bin/python" "$@"
    else
        "python${PYTHON:-3.11}" -m venv "$folder/env"
        "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    fi
}

# seen_is "WHAT": compare standard input with what was seen when the finding was written.
seen_is() {
    cat >"$folder/now"
    printf '%s\n' "$1" >"$folder/then"
    if ! diff -u --label "seen then" --label "seen now" "$folder/then" "$folder/now"; then
        echo "NO LONGER SO: $(basename "$0")" >&2
        exit 1
    fi
    cat "$folder/now"
}
