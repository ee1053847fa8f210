#!/usr/bin/env bash
# mypy --strict over everything, package by package: their test modules may share names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for part in packages/*/ tests/ benchmarks/; do
    echo "mypy $part"
    uv run mypy --strict "$part"
done
