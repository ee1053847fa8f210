#!/usr/bin/env bash
# Resolve the workspace from nothing and write every version with its hashes; with --check, compare instead.
#
#   scripts/export_lock.sh requirements/locked.txt
#   scripts/export_lock.sh --check requirements/locked.txt
#
# The file names no index: it says what is installed, wherever it comes from.
set -euo pipefail

check=false
if [ "${1:-}" = --check ]; then
    check=true
    shift
fi
target=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rm -f uv.lock
uv lock --quiet
export_lock() {
    uv export --quiet --locked --all-packages --no-emit-workspace --no-header --format requirements-txt
}

if ! $check; then
    export_lock > "$target"
elif ! export_lock | diff -u "$target" - >&2; then
    echo "error: ${target##*/} is stale; fix: run 'make lock' and commit the result" >&2
    exit 1
fi
