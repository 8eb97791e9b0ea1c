"""What stands beside exported weights for people: README.md, and for what derives from Gemma its terms and notice."""

from __future__ import annotations

import shutil
from pathlib import Path

from vlm2vla_schema.types import ModelCard

_GEMMA_NOTICE = """Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms

This folder is a model derivative of Gemma: it was fine-tuned from the base model named in model_card.json. Whoever
passes it on must pass on these terms, mark changed files, and hold recipients to the use restrictions of
https://ai.google.dev/gemma/prohibited_use_policy
"""
_WHAT = {
    "adapter": "a LoRA adapter",
    "merged": "a whole model, a LoRA adapter merged into its base",
    "merged-fp8": "a whole model, a LoRA adapter merged into its base, the language model's linears in fp8 (E4M3, "
    "compressed-tensors)",
    "full": "every weight",
    "full-fp8": "every weight, the language model's linears in fp8 (E4M3, compressed-tensors)",
}
_KIND = {True: "A policy that acts in text", False: "A model that was not trained to act"}


def write_texts(folder: Path, card: ModelCard, base: Path, what: str, servable: bool) -> None:
    """Write README.md and notices into `folder`.

    Args:
        base: model folder whose licence files are passed on. what: a key of `_WHAT`.
        servable: False for an adapter that vLLM would load wrongly.
    """
    examples = card.training.get("examples")
    how = "--adapter NAME=FOLDER" if what == "adapter" else "--model FOLDER"
    lines = [
        f"# {card.name}",
        "",
        f"{_KIND[card.policy]}: {_WHAT[what]}, trained on `{card.base_model}`"
        + (f" with {examples} examples." if examples else "."),
        f"Facts are in `model_card.json`; serve it with `vlm2vla-server serve {how}`.",
        "",
        f"Licence: {card.licence or 'that of the base model'}.",
    ]
    if not servable:
        lines += ["", "Its scope reaches into the vision tower: use it with `--engine transformers`, not with vLLM."]
    if any(name.startswith("bridge") for name in card.training.get("sources", [])):
        lines += [
            "",
            "Trained on data derived from BridgeData V2 (Walke et al., CC BY 4.0), relabelled, merged and rescaled.",
        ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if "gemma" in f"{card.licence} {card.base_model}".lower():
        (folder / "NOTICE").write_text(_GEMMA_NOTICE, encoding="utf-8")
        for path in base.glob("*"):
            if path.is_file() and path.stem.upper() in ("LICENSE", "TERMS", "USE_POLICY"):
                shutil.copyfile(path, folder / path.name)
