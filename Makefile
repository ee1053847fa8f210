# Shortcuts for the commands of README.md and CLAUDE.md; `.ci/run` is what has to pass.
.DEFAULT_GOAL := help
.PHONY: help sync test slow lint types lock lock-check bench demo ci chaos fuzz

help: ## Show what there is.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

sync: ## Install every package and the tools into .venv.
	uv sync --all-packages

test: ## Run the fast tests of all packages.
	uv run pytest

slow: ## Run the slow tests.
	uv run pytest -m "slow and not gpu and not network"

lint: ## Check style and formatting.
	uv run ruff check
	uv run ruff format --check

types: ## Check types, package by package.
	scripts/check_types.sh

lock: ## Write requirements/locked.txt anew, after a change to any pyproject.toml.
	scripts/export_lock.sh requirements/locked.txt

lock-check: ## Fail when requirements/locked.txt is stale.
	scripts/export_lock.sh --check requirements/locked.txt

bench: ## Time a ternary step against the dense one (10 minutes).
	uv run python benchmarks/bitlinear.py

demo: ## Train, save and reload a tiny ternary decoder (2 minutes).
	uv run wrinklefree demo

ci: ## Everything that has to pass.
	.ci/run

chaos: ## Kill training 210 times and compare every bit (half an hour).
	uv run pytest tests/test_chaos.py -m slow --kills 70 -s

fuzz: ## Read 10,000 damaged files of each kind that serving reads (ten minutes).
	uv run pytest packages/serving/tests/test_fuzz.py -m fuzz
