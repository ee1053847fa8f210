"""The README.md of a saved model: what it is, and how to load it without this package."""

from bitnet_arch.record import BitnetRecord

HEADER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [bitnet, ternary, 1.58-bit]
---

# {architecture}, ternary

{num_ternary} projections hold weights in {{-1, 0, +1}} times one scale each, and quantise their inputs to
int8 per token (BitNet b1.58, arXiv 2402.17764). {subln}
"""

STOCK = """
## Load it

Plain transformers {transformers} or newer is enough ({weights}):

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this/directory")
```

transformers needs `accelerate` for this, and compiles its quantisers at their first call, which takes some
ten seconds and a C++ compiler. Where there is none, or for a short run, set the environment variable
`TORCHDYNAMO_DISABLE=1`.{rounding}

With bitnet-arch the same directory loads to the bit as it was saved:
"""

ROUNDING = """

The scales are stored in float32. transformers rounds them to the dtype of the model; pass
`dtype="float32"` to keep them exact."""

TRAINING = """
## Load it

These are the weights as they are trained{reason}. transformers alone would take them for those of a dense
model. With bitnet-arch:
"""

OURS = """
```python
from bitnet_arch import load_bitnet{more_imports}

model = load_bitnet("this/directory")
```
"""

EXPORT = """
To write the layout that transformers runs as ternary, at λ = μ = 1:
`save_bitnet(model, "other/directory", layout="stock")`.
"""


def model_card(record: BitnetRecord, architecture: str, dtype: str) -> str:
    """Markdown, with the front matter that model hubs read."""
    header = HEADER.format(
        architecture=architecture, num_ternary=len(record.ternary), subln=_subln_sentence(record)
    )
    ours = OURS.format(more_imports="" if record.layout == "stock" else ", save_bitnet")
    if record.layout == "stock":
        weights = (
            "codes and scales, four weights to a byte"
            if record.packed
            else "latent weights, quantised as they run"
        )
        card = STOCK.format(
            transformers=record.versions["transformers"],
            weights=weights,
            rounding=ROUNDING if record.packed and dtype != "float32" else "",
        )
        return header + card + ours
    return header + TRAINING.format(reason=_unfinished(record)) + ours + EXPORT


def _subln_sentence(record: BitnetRecord) -> str:
    count = len(record.subln.inserted) + len(record.subln.own)
    if not count:
        return "There is no norm in front of them but those of the architecture."
    return f"{count} of them normalise their input first (SubLN, arXiv 2510.13998)."


def _unfinished(record: BitnetRecord) -> str:
    amounts = {name: record.settings[name] for name in ("quant_amount", "subln_amount")}
    below = [f"{name} {value:g}" for name, value in amounts.items() if value != 1]
    parts = below + (["with low-rank corrections"] if record.lrc else [])
    return f" ({', '.join(parts)})" if parts else ""
