"""Which versions of what are installed here."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "wrinklefree",
    "bitnet-arch",
    "data-handler",
    "bitnet-serving",
    "wrinklefree-durable",
    "torch",
    "transformers",
    "pytorch-lightning",
    "accelerate",
    "safetensors",
    "gguf",
)


def installed_versions() -> dict[str, str]:
    """Python and every package that a run's numbers may depend on."""
    return {"python": platform.python_version(), **{name: _version_of(name) for name in PACKAGES}}


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
